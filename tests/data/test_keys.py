"""Keys: one for each recording, however the datasets write its id."""

import pytest

from ask_lightning.data.keys import possible_keys


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("b0RFKhbpFJA", "youtube:b0RFKhbpFJA"),
        ("Yb0RFKhbpFJA.flac", "youtube:b0RFKhbpFJA"),
        ("audio/train/b0RFKhbpFJA_30.000_40.000.wav", "youtube:b0RFKhbpFJA"),
        ("-_-_-_-_-_-", "youtube:-_-_-_-_-_-"),
        ("180913.flac", "freesound:180913"),
        ("Grillons-d&#39;Italie-Ardeche.wav", "file:grillons d italie ardeche"),
        ("FR.CTC.08.CoyuyoS.001.wav", "file:fr ctc 08 coyuyos 001"),
        ("97151", "audiocap:97151"),
        ("freesound:180913", "freesound:180913"),
    ],
)
def test_ids_are_understood_as_people_write_them(written, key):
    assert key in possible_keys(written)

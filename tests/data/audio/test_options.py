"""The settings of audio: what is allowed, and what the errors say."""

import pytest

from ask_lightning.data import AudioOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 0}, "`sample_rate` has to be an integer of at least 1, but got 0"),
        ({"seconds": 0}, "`seconds` has to be at least 3.125e-05, but got 0"),
        ({"seconds": float("inf")}, r"`seconds` has to be finite, but got inf\. For whole"),
        ({"seed": -1}, "`seed` has to be an integer of at least 0, but got -1"),
        ({"crop": "left"}, "`crop` has to be one of .*'random', 'center', 'full'.* but got 'left'"),
        ({"check": "all"}, "`check` has to be one of .*'header', 'decode', 'none'.* but got 'all'"),
        ({"features": "mfcc"}, "`features` has to be one of .*None, 'log_mel'.* but got 'mfcc'"),
        ({"num_mels": 0}, "`num_mels` has to be an integer of at least 1, but got 0"),
        ({"features": "log_mel", "crop": "full"}, '`crop` has to be "random" or "center" with `features`'),
    ],
)
def test_arguments_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        AudioOptions(**options)


@pytest.mark.parametrize(("seconds", "rate", "length"), [(2.01, 8000, 16080), (4.1, 16000, 65600)])
def test_lengths_are_rounded_to_the_nearest_sample(seconds, rate, length):
    assert AudioOptions(sample_rate=rate, seconds=seconds).num_samples == length

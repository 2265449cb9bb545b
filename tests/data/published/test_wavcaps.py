"""The collections of WavCaps."""

import pytest

from tests.helpers.published import wavcaps


def test_collections_of_wavcaps(written):
    assert {clip.collection for clip in wavcaps(written, collections=["SoundBible", "FreeSound"]).clips} == {
        "SoundBible",
        "FreeSound",
    }
    with pytest.raises(
        ValueError, match=r"`collections` has to be one of .*AudioSet_SL.* but got 'FreeSounds'"
    ):
        wavcaps(written, collections=["FreeSounds"])


def test_a_collection_that_is_not_there(roots):
    (roots / "wavcaps" / "json_files" / "FreeSound" / "fsd_final.json").unlink()
    assert len(wavcaps(roots)) == 12
    with pytest.raises(
        FileNotFoundError, match=r"there is no fsd_final.json of the collection FreeSound below"
    ):
        wavcaps(roots, collections=["FreeSound"])


def test_numbers_of_two_collections_do_not_mix(roots):
    audio = roots / "wavcaps" / "audio"
    (audio / "SoundBible" / "1.flac").rename(audio / "FreeSound" / "1.flac")
    with pytest.warns(UserWarning, match=r"WavCaps SoundBible: 1 clips have no audio \(1\)"):
        assert len(wavcaps(roots)) == 15

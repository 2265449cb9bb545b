"""Files of clips: found by path, name or id, never outside the folder."""

import io

import numpy as np
import pytest
import soundfile

from ask_lightning.page.audio_files import find_audio_files, playable_sound
from tests.helpers.media_files import write_media


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(folder, name, file=""):
    """The path of one clip's file relative to the folder, or None."""
    (path,) = find_audio_files(folder, [name], [file]).paths
    return path and path.relative_to(folder).as_posix()


def test_the_written_path_counts_most(tmp_path):
    touch(tmp_path, "x/a.wav", "y/a.wav", "deep/z/b.flac")
    assert found(tmp_path, "file:x/a.wav") == "x/a.wav"
    assert found(tmp_path, "7", "y/a.wav") == "y/a.wav"
    assert found(tmp_path, "7", str(tmp_path / "x" / "a.wav")) == "x/a.wav"
    assert found(tmp_path, "7", "z/b.flac") == "deep/z/b.flac"
    assert found(tmp_path, "7", "elsewhere/b.wav") == "deep/z/b.flac"
    several = find_audio_files(tmp_path, ["a take", "b"], ["a.wav", "b.flac"])
    assert several.paths == [None, tmp_path / "deep/z/b.flac"]
    assert several.ambiguous == ["a take"]


def test_ids_of_published_datasets(tmp_path):
    touch(tmp_path, "YvfY_TJq7n_U.wav", "b0RFKhbpFJA_30_40.wav", "180913.flac", "Rain 1.wav")
    assert found(tmp_path, "youtube:vfY_TJq7n_U", "vfY_TJq7n_U") == "YvfY_TJq7n_U.wav"
    assert found(tmp_path, "youtube:b0RFKhbpFJA@30") == "b0RFKhbpFJA_30_40.wav"
    assert found(tmp_path, "freesound:180913") == "180913.flac"
    assert found(tmp_path, "freesound:12", "rain_1.wav") == "Rain 1.wav"
    assert found(tmp_path, "freesound:13") is None


@pytest.mark.parametrize("name", ["../secret.wav", "x/../../secret.wav", "{root}/secret.wav"])
def test_nothing_outside_the_folder_and_nothing_but_audio(tmp_path, name):
    inside = tmp_path / "audio"
    touch(tmp_path, "secret.wav", "audio/notes.txt", "audio/x/a.wav")
    assert found(inside, f"file:{name.format(root=tmp_path)}") is None
    assert found(inside, "file:notes.txt") is None
    assert found(inside, "7", name.format(root=tmp_path)) is None


def test_what_browsers_do_not_play_becomes_wav(tmp_path):
    samples = np.linspace(-0.5, 0.5, 800)
    for name in ("a.wav", "a.aiff"):
        soundfile.write(tmp_path / name, samples, 8000)
    assert playable_sound(tmp_path / "a.wav") == (tmp_path / "a.wav", "audio/wav")
    content, media_type = playable_sound(tmp_path / "a.aiff")
    assert media_type == "audio/wav"
    read, rate = soundfile.read(io.BytesIO(content))
    assert rate == 8000
    np.testing.assert_allclose(read, samples, atol=1e-4)


@pytest.mark.parametrize(("name", "codec", "picture"), [("a.m4a", "aac", False), ("a.mp4", "aac", True)])
def test_sound_tracks_are_found_and_become_wav(tmp_path, name, codec, picture):
    pytest.importorskip("av", reason='m4a needs: pip install "ask-lightning[media]"')
    path = write_media(tmp_path / name, 0.5 * np.sin(np.arange(8000) / 5), 16000, codec, picture=picture)
    assert found(tmp_path, f"file:{name}", name) == name
    content, media_type = playable_sound(path)
    assert media_type == "audio/wav"
    read, rate = soundfile.read(io.BytesIO(content))
    assert rate == 16000
    assert len(read) >= 8000
    assert np.abs(read).max() > 0.3

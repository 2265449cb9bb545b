"""Sound tracks that PyAV reads: m4a, mp4 with a picture, webm and Matroska."""

import sys

import numpy as np
import pytest
import soundfile

from ask_lightning.data import AudioFileError
from ask_lightning.data.audio.decoding import check_recording, open_audio, read_segment
from tests.helpers.audio_folder import folder_of
from tests.helpers.media_files import write_film, write_media

pytest.importorskip("av", reason='other formats need: pip install "ask-lightning[media]"')

RATE = 48000
FORMATS = [
    pytest.param("a.m4a", "aac", False, id="m4a"),
    pytest.param("a.mp4", "aac", True, id="mp4"),
    pytest.param("a.webm", "libopus", False, id="webm"),
    pytest.param("a.mkv", "pcm_s16le", False, id="mkv"),
]


def sweep(seconds=3.0, rate=RATE):
    """A tone that rises, so that each place sounds different."""
    time = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 + 300 * time) * time)).astype(np.float32)


@pytest.mark.parametrize(("name", "codec", "picture"), FORMATS)
def test_the_sound_is_that_of_the_wav(tmp_path, name, codec, picture):
    samples = sweep()
    path = write_media(tmp_path / name, samples, RATE, codec, picture=picture)
    with open_audio(name, path) as recording:
        check_recording(recording, samples=True)
        assert recording.rate == RATE
        assert recording.frames == pytest.approx(len(samples), abs=0.06 * RATE)  # what codecs add
        heard = recording.read(0, len(samples))
    assert heard.shape[1] == 1
    assert len(heard) == pytest.approx(len(samples), abs=0.02 * RATE)
    inside = slice(4800, 120000)
    assert np.corrcoef(heard[inside, 0], samples[inside])[0, 1] > 0.99


@pytest.mark.parametrize(("name", "codec", "picture"), FORMATS)
def test_any_part_in_any_order_is_that_of_the_whole(tmp_path, name, codec, picture):
    path = write_media(tmp_path / name, sweep(), RATE, codec, picture=picture)
    to_the_sample = name.endswith(("m4a", "mp4"))
    with open_audio(name, path) as recording:
        whole = recording.read(0, recording.frames)
        for start, count in ((100000, 3000), (0, 500), (500, 500), (60000, 48000), (60000, 10)):
            part = recording.read(start, count)
            # Marks of whole milliseconds place a part after a jump to half of one.
            shifts = [0] if to_the_sample else range(-min(start, 25), 26)
            differences = [np.abs(part - whole[start + by : start + by + count]).max() for by in shifts]
            assert min(differences) < (1e-4 if to_the_sample else 5e-3)
        assert not len(recording.read(2 * recording.frames, 10))
        assert read_segment(recording, 16000, 16000, 8000).shape == (8000,)


def test_bytes_are_read_like_a_file(tmp_path):
    path = write_media(tmp_path / "a.mp4", sweep(), RATE, "aac", picture=True)
    with open_audio("a.mp4", path) as recording:
        from_file = recording.read(1000, 2000)
    with open_audio("row 3", path.read_bytes()) as recording:
        np.testing.assert_array_equal(recording.read(1000, 2000), from_file)


def test_a_folder_of_all_kinds(tmp_path):
    soundfile.write(tmp_path / "a.wav", sweep(1.0), RATE)
    write_media(tmp_path / "b.m4a", sweep(1.0), RATE, "aac")
    write_media(tmp_path / "c.MP4", sweep(1.0), RATE, "aac", picture=True)
    clips = folder_of(tmp_path, "a.wav", "b.m4a", "c.MP4", sample_rate=16000, seconds=0.5)
    wav, *others = (clips[index]["waveform"] for index in range(3))
    for waveform in others:
        assert np.corrcoef(wav, waveform)[0, 1] > 0.98


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (write_film, "a.mp4: it has no sound track. Replace it"),
        (lambda path: path.write_bytes(b"no film" * 100), "a.mp4: PyAV cannot open it"),
        (lambda path: path.write_bytes(b""), "a.mp4: the file is empty"),
    ],
)
def test_files_without_sound(tmp_path, make, message):
    path = tmp_path / "a.mp4"
    make(path)
    with pytest.raises(AudioFileError, match=message), open_audio("a.mp4", path):
        pass


def test_a_film_that_was_cut_short_is_found(tmp_path):
    path = write_media(tmp_path / "a.mkv", sweep(), RATE, "pcm_s16le")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with open_audio("a.mkv", path) as recording, pytest.raises(AudioFileError, match="can be read"):
        check_recording(recording, samples=True)


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    path = write_media(tmp_path / "a.m4a", sweep(0.5), RATE, "aac")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"ask-lightning\[media\]"), open_audio("a.m4a", path):
        pass

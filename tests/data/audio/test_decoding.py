"""Parts of recordings are those of the whole, whatever the rate, and damage is noticed."""

import struct

import numpy as np
import pytest
import soundfile
import torch

from ask_lightning.data import AudioFileError
from ask_lightning.data.audio import decoding
from ask_lightning.data.audio.decoding import (
    ArrayRecording,
    check_recording,
    crop_step,
    open_audio,
    read_segment,
    resampled_length,
)

RATE = 16000


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("kind", ["MP3", "OGG", "FLAC"])
def test_a_stretch_of_a_compressed_file_is_what_one_would_cut_from_the_whole(tmp_path, rate, kind):
    """A frame of an mp3 needs those before it, which a tone, that is small, shows best."""
    times = np.arange(4 * rate) / rate
    soundfile.write(tmp_path / "a", 0.4 * np.sin(2 * np.pi * (200 + 80 * times) * times), rate, format=kind)
    with open_audio("a", tmp_path / "a") as recording:
        whole = recording.read(0, recording.frames)
        for start in (1, 4321, 3 * rate, 2 * rate + 7, 2 * rate + 3007, 0):
            part = recording.read(start, 3000)
            np.testing.assert_allclose(part, whole[start : start + 3000], rtol=0, atol=1e-5)


def test_the_last_page_of_an_ogg_file(tmp_path):
    """It ends before its last block does, so that libsndfile counts wrongly back from its end."""
    path, rate = tmp_path / "a.ogg", 44100
    times = np.arange(int(3.7 * rate)) / rate
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (300 + 15 * times) * times), rate, subtype="VORBIS")
    with open_audio("a.ogg", path) as recording:
        whole = recording.read(0, recording.frames)
    for start in (105_434, 131_464, 149_375, len(whole) - 10):
        for count in (10, 8271, len(whole)):
            with open_audio("a.ogg", path) as recording:
                part = recording.read(start, count)
            np.testing.assert_allclose(part, whole[start : start + count], rtol=0, atol=1e-5)


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32"])
def test_a_stretch_of_a_file_in_which_one_cannot_jump(tmp_path, subtype):
    path = tmp_path / "a.wav"
    soundfile.write(path, 0.4 * np.sin(np.arange(16000) / 30), 8000, subtype=subtype)
    with soundfile.SoundFile(path) as file:
        whole = file.read(16000, "float32")
    with open_audio("a.wav", path) as recording:
        for start in (12000, 0, 7):
            np.testing.assert_array_equal(recording.read(start, 900)[:, 0], whole[start : start + 900])


def test_ogg_streams_in_a_row_are_not_heard_in_part(tmp_path):
    paths = [tmp_path / f"{number}.ogg" for number in range(2)]
    for path in paths:
        soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 4000), RATE)
    first, second = (path.read_bytes() for path in paths)
    old, new = second[14:18], bytes(byte ^ 255 for byte in first[14:18])
    row = first + second.replace(old, new)
    (tmp_path / "row.ogg").write_bytes(row)
    for given in (row, tmp_path / "row.ogg"):
        with pytest.raises(AudioFileError, match=r"row.ogg: the file is several Ogg streams in a row"):
            open_audio("row.ogg", given).__enter__()


@pytest.mark.parametrize("rate", [96000, 44100, 22050, 16000, 8000])
@pytest.mark.parametrize("channels", [1, 6])
def test_a_stretch_is_what_one_would_cut_from_the_whole(tmp_path, rate, channels):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (rate, channels))
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    with open_audio("a.wav", tmp_path / "a.wav") as recording:
        whole = read_segment(recording, 32000)
        assert len(whole) == resampled_length(recording.frames, rate, 32000) == 32000
        step = crop_step(rate, 32000)
        for start in (0, step, 5 * step, 17 * step, 32000 - 4000 // step * step):
            part = read_segment(recording, 32000, start, 4000)
            torch.testing.assert_close(part, whole[start : start + 4000], rtol=0, atol=1e-6)


def test_headers_that_promise_more_than_there_is(tmp_path):
    class Short(ArrayRecording):
        def read(self, start, count):
            return super().read(start, count)[: max(0, 950 - start)]

    recording = Short("a", np.arange(1000) / 1000, frames=1000, rate=100)
    assert read_segment(recording, 100, 900, 100)[-1] == pytest.approx(0.949), "the last that can be read"
    broken = Short("a", np.arange(2000) / 2000, frames=2000, rate=100)
    with pytest.raises(AudioFileError, match=r"a: the file is damaged: 950 of 2000 samples can be read"):
        read_segment(broken, 100, 900, 100)


def test_integers_are_scaled():
    samples = np.array([-32768, 0, 16384], dtype=np.int16)
    assert ArrayRecording("a", samples, 3, RATE).read(0, 3)[:, 0].tolist() == [-1, 0, 0.5]


def test_the_end_of_a_long_file_is_found_without_keeping_all_of_it():
    """An mp3 of an hour whose header is wrong would be 2 GB."""

    class Long(ArrayRecording):
        kept = 0

        def read(self, start, count):
            self.kept = max(self.kept, count)
            return super().read(start, count)[: max(0, 5_000_000 - start)]

    recording = Long("a", np.arange(5_200_000, dtype=np.float32), frames=5_200_000, rate=100)
    heard = read_segment(recording, 100, 4_999_990, 100)
    assert heard.tolist() == list(range(4_999_900, 5_000_000))
    assert recording.kept <= 1_000_000


@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.au", "a.rf64", "a.w64"])
@pytest.mark.parametrize("share", [0.25, 0.9])
def test_a_file_that_was_cut_short(tmp_path, name, share):
    path = tmp_path / name
    soundfile.write(path, np.zeros(RATE), RATE)
    content = path.read_bytes()
    with open_audio(name, path) as recording:
        assert recording.frames == RATE
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(AudioFileError, match=rf"{name}: the file was cut short: \d+ of \d+ bytes"):
        open_audio(name, path).__enter__()
    with pytest.raises(AudioFileError, match="cut short"):
        open_audio(name, path.read_bytes()).__enter__()


@pytest.mark.parametrize("promised", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 2 * RATE + 44])
def test_a_wav_that_was_written_to_a_pipe_is_whole(tmp_path, promised):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(RATE), RATE, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = struct.pack("<I", promised)
    path.write_bytes(content)
    with open_audio("a.wav", path) as recording:
        assert recording.frames == RATE


def test_a_flac_that_does_not_say_its_length(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros(RATE), RATE)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the upper four of the 36 bits that hold the number of samples
    content[22:26] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(AudioFileError, match=r"a.flac: the file does not say how long it is.*Write it anew"):
        open_audio("a.flac", path).__enter__()


def test_samples_that_no_audio_has():
    recording = ArrayRecording("a", np.array([0, -1e30]), 2, RATE)
    with pytest.raises(AudioFileError, match=r"a: the file holds samples of 1e\+30, but those of audio lie"):
        read_segment(recording, RATE)
    with pytest.raises(AudioFileError, match=r"samples of 1e\+30"):
        check_recording(recording, samples=True)
    # Floating-point numbers that were never divided by the range of 32-bit integers.
    assert read_segment(ArrayRecording("a", np.array([0, 2.0**31]), 2, RATE), RATE)[1] == 2**31


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_file_that_ends_within_a_page(tmp_path, subtype):
    path = tmp_path / "a.ogg"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * 48000)
    soundfile.write(path, noise, 48000, format="OGG", subtype=subtype)
    content = path.read_bytes()
    last_page = content.rindex(b"OggS")
    for whole in (content, content + b"TAG" + bytes(100), content + bytes(100_000)):
        with open_audio("a.ogg", whole) as recording:
            assert recording.frames == 3 * 48000
    path.write_bytes(content[:last_page])  # and this cannot be told from a file that ends there
    with open_audio("a.ogg", path) as recording:
        assert 0 < recording.frames < 3 * 48000
    for end in (len(content) - 1, last_page + 30, last_page + 10, len(content) // 2):
        path.write_bytes(content[:end])
        for given in (path, path.read_bytes()):
            with pytest.raises(AudioFileError, match=r"a.ogg: the file was cut short: \d+ of \d+ bytes"):
                open_audio("a.ogg", given).__enter__()


@pytest.mark.parametrize("rate", [22254, 11127, 47999])
def test_rates_that_share_no_large_factor_with_the_wanted_one(rate, monkeypatch):
    """torchaudio would compute gigabytes of filters for each clip."""
    monkeypatch.setattr(decoding, "import_optional", None)
    time = np.arange(2 * rate) / rate
    recording = ArrayRecording("a", np.sin(2 * np.pi * 1000 * time), len(time), rate)
    heard = read_segment(recording, 32000)
    expected = torch.sin(2 * torch.pi * 1000 * torch.arange(64000, dtype=torch.float64) / 32000).float()
    assert heard.dtype == torch.float32
    torch.testing.assert_close(heard[1000:-1000], expected[1000:-1000], rtol=0, atol=2e-3)
    step = crop_step(rate, 32000)
    part = read_segment(recording, 32000, step, 4000)
    torch.testing.assert_close(part, heard[step : step + 4000], rtol=0, atol=1e-6)

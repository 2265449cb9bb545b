"""A folder of audio files with a CSV: lengths, rates, channels, crops, features, bad files and the cache."""

import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch

from ask_lightning.data import AudioFileError, AudioFolder, Soundscapes, log_mel
from ask_lightning.data.audio.features import SILENCE
from tests.helpers.audio_folder import folder_of


def test_items_have_the_layout_of_soundscapes(tmp_path, record):
    record("a.wav")
    item = folder_of(tmp_path, "a.wav", seconds=1)[0]
    assert set(item) == {"waveform", "num_samples", "caption", "clip_id", "caption_id"}
    assert item["waveform"].shape == (16000,)
    assert item["waveform"].dtype == torch.float32
    assert item["caption"] == "what a.wav sounds like"
    assert item["num_samples"] == 16000
    assert set(Soundscapes(1, seconds=1)[0]) == set(item)


def test_takes_of_one_recording_share_its_clip_id_and_so_do_captions(tmp_path, record):
    rows = ["file,recording,first,second"]
    for name, recording in (("a.wav", 7), ("b.wav", 8), ("c.wav", 7)):
        record(name)
        rows.append(f"{name},{recording},{name} once,{name} again")
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    clips = AudioFolder(
        tmp_path,
        tmp_path / "clips.csv",
        filename_column="file",
        caption_columns=["first", "second"],
        clip_id_column="recording",
    )
    ids = [item["clip_id"] for item in clips]
    assert ids == [ids[0], ids[0], ids[2], ids[2], ids[0], ids[0]]
    assert ids[0] != ids[2]


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
@pytest.mark.parametrize(("rate", "channels"), [(16000, 2), (44100, 1), (8000, 3)])
def test_rates_channels_and_formats_are_brought_together(tmp_path, record, name, rate, channels):
    record(name, rate=rate, channels=channels)
    heard = folder_of(tmp_path, name, seconds=1)[0]["waveform"]
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(heard.numpy() - expected)[1000:-1000].max() < 0.02


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.tile([0.5, 0.25], (1600, 1)), 16000, subtype="FLOAT")
    heard = folder_of(tmp_path, "a.wav", seconds=0.1)[0]["waveform"]
    torch.testing.assert_close(heard, torch.full((1600,), 0.375))


def test_short_files_end_in_silence(tmp_path, record):
    record("a.wav", seconds=1)
    heard = folder_of(tmp_path, "a.wav", seconds=1.5)[0]["waveform"]
    assert heard.shape == (24000,)
    assert heard[:16000].abs().max() > 0.4
    assert heard[16000:].abs().max() == 0
    seen = folder_of(tmp_path, "a.wav", seconds=1.5, features="log_mel", num_mels=32)[0]["log_mel"]
    assert seen.shape == log_mel(heard, num_mels=32).shape
    assert torch.equal(seen[-1], torch.full((32,), SILENCE))


def test_long_files_are_cropped_in_the_middle(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.arange(3200) / 3200, 16000, subtype="FLOAT")
    heard = folder_of(tmp_path, "a.wav", seconds=0.1)[0]["waveform"]
    torch.testing.assert_close(heard, torch.arange(800, 2400) / 3200)


@pytest.mark.parametrize("features", [None, "log_mel"])
def test_random_crops_depend_on_seed_epoch_and_index_alone(tmp_path, features):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 330000), 16000)

    def crops(epoch=0, **options):
        clips = folder_of(tmp_path, "a.wav", "a.wav", seconds=1, features=features, **options)
        clips.set_epoch(epoch)
        key = features or "waveform"
        return [item[key].numpy().tobytes() for item in clips]

    first = crops(crop="random")
    torch.rand(10)
    assert crops(crop="random") == first
    assert crops(crop="random", cache="memory") == first
    others = [first[1], *crops(crop="random", epoch=1), *crops(crop="random", seed=1), *crops()]
    assert first[0] not in others


def test_reading_does_not_draw_from_the_global_generator(tmp_path, record):
    record("a.wav", seconds=3)
    clips = folder_of(tmp_path, "a.wav", seconds=1, crop="random")
    before = torch.get_rng_state()
    _ = clips[0]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def bad_folder(tmp_path, record):
    record("good.wav")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no audio at all")
    (tmp_path / "samples.raw").write_bytes(bytes(64))
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 16000)
    return tmp_path


BAD = {
    "missing.wav": "missing.wav: the file does not exist",
    "empty.wav": "empty.wav: the file is empty",
    "text.wav": "text.wav: not an audio file that soundfile can read",
    "nothing.wav": "nothing.wav: the file holds no samples",
    "samples.raw": "samples.raw: not an audio file that soundfile can read",
    f"{'a caption ' * 30}": "a caption: the file cannot be looked for",
}
if sys.version_info >= (3, 11):  # before, a table with this character cannot be read
    BAD["nul\0.wav"] = "the file does not exist"


@pytest.mark.parametrize(("name", "message"), BAD.items())
def test_strict_names_the_file(bad_folder, name, message):
    with pytest.raises(AudioFileError, match=message):
        folder_of(bad_folder, "good.wav", name, strict=True)


def test_bad_files_are_left_out_and_named_once(bad_folder):
    with pytest.warns(UserWarning, match=f"Left out {len(BAD)} clips whose audio cannot be used") as caught:
        clips = folder_of(bad_folder, "missing.wav", "good.wav", *BAD, seconds=1)
    assert len(caught) == 1
    for message in list(BAD.values())[:5]:
        assert message in str(caught[0].message)
    assert set(clips.skipped) == {f"file:{name.strip()}" for name in BAD}
    assert len(clips) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clips[0]["caption"] == "what good.wav sounds like"
        clips.variant(crop="random")


@pytest.mark.parametrize("name", ["Sub/Café 1.WAV", "sub\\cafe\u0301_1.wav", "SUB/CAFÉ-1.wav"])
def test_a_name_that_is_spelled_otherwise_is_suggested(tmp_path, record, name):
    (tmp_path / "sub").mkdir()
    record("sub/Café_1.wav")
    record("good.wav")
    with pytest.warns(
        UserWarning, match=r"file does not exist. There is .*/sub/Café_1.wav, which differs in"
    ):
        folder_of(tmp_path, "good.wav", name)
    with pytest.raises(AudioFileError, match=r"There is .*/sub/Café_1.wav"):
        folder_of(tmp_path, name, check="none")[0]


def test_a_wav_that_was_cut_is_left_out(tmp_path, record):
    record("good.wav")
    damaged(record("cut.wav"))
    with pytest.warns(UserWarning, match=r"cut.wav: the file was cut short"):
        assert len(folder_of(tmp_path, "good.wav", "cut.wav")) == 1
    with pytest.raises(AudioFileError, match=r"cut.wav: the file was cut short"):
        folder_of(tmp_path, "good.wav", "cut.wav", check="decode", strict=True)


@pytest.mark.parametrize("samples", [1, 100, 256])
@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_clips_shorter_than_a_window_have_spectrograms(tmp_path, samples, rate):
    soundfile.write(tmp_path / "a.wav", np.full(samples, 0.5), 16000)
    for crop in ("center", "random"):
        item = folder_of(tmp_path, "a.wav", features="log_mel", sample_rate=rate, crop=crop, seconds=0.1)[0]
        assert item["log_mel"].isfinite().all()
        assert item["log_mel"].max() > SILENCE


def test_of_many_bad_files_the_first_are_named(tmp_path, record):
    record("good.wav")
    with pytest.warns(UserWarning, match=r"Left out 12 .*5.wav.*And 7 more") as caught:
        folder_of(tmp_path, "good.wav", *(f"{index}.wav" for index in range(1, 13)))
    assert "6.wav" not in str(caught[0].message)


def test_no_usable_file(tmp_path):
    with pytest.raises(
        AudioFileError, match=r"No clip is left that can be used. .*a.wav: the file does not exist"
    ):
        folder_of(tmp_path, "a.wav")


def damaged(path):
    """Cut a file in half: its header still promises all of it."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_damaged_file_with_a_good_header_is_an_error_when_read(tmp_path, record):
    damaged(record("a.flac", seconds=2))
    clips = folder_of(tmp_path, "a.flac")
    with pytest.raises(AudioFileError, match=r'a.flac: the file is damaged .*with `check="decode"` find'):
        _ = clips[0]


def test_decoding_at_the_start_finds_damaged_files(tmp_path, record):
    record("good.wav")
    damaged(record("bad.flac", seconds=2))
    damaged(record("short.mp3", seconds=4, pitch=1000))
    with pytest.warns(UserWarning, match=r"Left out 2 .*bad.flac: the file is damaged.*short.mp3"):
        clips = folder_of(tmp_path, "good.wav", "bad.flac", "short.mp3", check="decode")
    assert [clip.name for clip in clips.clips] == ["good.wav"]
    with pytest.raises(AudioFileError, match=r"bad.flac: the file is damaged"):
        folder_of(tmp_path, "good.wav", "bad.flac", check="decode", strict=True)


def test_samples_that_are_not_numbers(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    clips = folder_of(tmp_path, "a.wav")
    with pytest.raises(AudioFileError, match=r"a.wav: the file holds samples that are NaN or infinite"):
        _ = clips[0]


def test_a_file_that_vanishes(tmp_path, record):
    path = record("a.wav")
    clips = folder_of(tmp_path, "a.wav", cache="memory")
    path.unlink()
    with pytest.raises(AudioFileError, match=r"a.wav: the file was there at the start and does not exist"):
        _ = clips[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 0}, "`sample_rate` has to be an integer of at least 1, but got 0"),
        ({"check": "all"}, r"`check` has to be one of .*'header', 'decode'.* but got 'all'"),
        ({"caption_columns": []}, "`caption_columns` has to name at least one column"),
    ],
)
def test_arguments_outside_their_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        folder_of(tmp_path, "a.wav", **options)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of audio files at .*none"):
        AudioFolder(tmp_path / "none", "clips.csv")


def test_spectrograms_of_long_recordings_are_those_of_the_crop(tmp_path, decoded):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 61 * 8000), 8000)
    options = {"seconds": 1, "sample_rate": 8000}
    heard = folder_of(tmp_path, "a.wav", **options)[0]["waveform"]
    seen = folder_of(tmp_path, "a.wav", features="log_mel", **options)[0]["log_mel"]
    torch.testing.assert_close(seen, log_mel(heard, sample_rate=8000))


def test_spectrograms_cannot_be_padded_in_batches(tmp_path, record):
    record("a.wav")
    with pytest.raises(ValueError, match=r'`crop` has to be "random" or "center" with `features`'):
        folder_of(tmp_path, "a.wav", features="log_mel", crop="full")

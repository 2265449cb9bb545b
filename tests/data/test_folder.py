"""A folder of audio files: lengths, rates, channels, crops, bad files and the cache."""

import warnings

import numpy as np
import pytest
import soundfile
import torch

import ask_lightning.data.audio.cache as cache_module
import ask_lightning.data.folder as folder_module
from ask_lightning.data import AudioFileError, AudioFolder, CaptionedFile, log_mel
from ask_lightning.data.audio.features import SILENCE


def pairs_of(*names):
    return [CaptionedFile(name, f"what {name} sounds like", index) for index, name in enumerate(names)]


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that were decoded, in order."""
    names = []
    decode = folder_module._decode

    def spy(path, sample_rate):
        names.append(path.name)
        return decode(path, sample_rate)

    monkeypatch.setattr(folder_module, "_decode", spy)
    return names


def test_items_have_the_layout_of_soundscapes(tmp_path, record):
    record("a.wav")
    item = AudioFolder(tmp_path, pairs_of("a.wav"), seconds=1)[0]
    assert set(item) == {"waveform", "caption", "clip_id"}
    assert item["waveform"].shape == (16000,)
    assert item["waveform"].dtype == torch.float32
    assert item["caption"] == "what a.wav sounds like"
    assert item["clip_id"] == 0


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
@pytest.mark.parametrize(("rate", "channels"), [(16000, 2), (44100, 1), (8000, 3)])
def test_rates_channels_and_formats_are_brought_together(tmp_path, record, name, rate, channels):
    record(name, rate=rate, channels=channels)
    heard = AudioFolder(tmp_path, pairs_of(name), seconds=1)[0]["waveform"]
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(heard.numpy() - expected)[1000:-1000].max() < 0.02


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.tile([0.5, 0.25], (1600, 1)), 16000, subtype="FLOAT")
    heard = AudioFolder(tmp_path, pairs_of("a.wav"), seconds=0.1)[0]["waveform"]
    torch.testing.assert_close(heard, torch.full((1600,), 0.375))


def test_short_files_end_in_silence(tmp_path, record):
    record("a.wav", seconds=1)
    heard = AudioFolder(tmp_path, pairs_of("a.wav"), seconds=1.5)[0]["waveform"]
    assert heard.shape == (24000,)
    assert heard[:16000].abs().max() > 0.4
    assert heard[16000:].abs().max() == 0
    seen = AudioFolder(tmp_path, pairs_of("a.wav"), seconds=1.5, num_mels=32)[0]["log_mel"]
    assert seen.shape == log_mel(heard, num_mels=32).shape
    assert torch.equal(seen[-1], torch.full((32,), SILENCE))


def test_long_files_are_cropped_in_the_middle(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.arange(3200) / 3200, 16000, subtype="FLOAT")
    heard = AudioFolder(tmp_path, pairs_of("a.wav"), seconds=0.1)[0]["waveform"]
    torch.testing.assert_close(heard, torch.arange(800, 2400) / 3200)


@pytest.mark.parametrize("num_mels", [None, 32])
def test_random_crops_depend_on_seed_epoch_and_index_alone(tmp_path, num_mels):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 330000), 16000)
    pairs = pairs_of("a.wav") * 2

    def crops(epoch=0, **options):
        clips = AudioFolder(tmp_path, pairs, seconds=1, num_mels=num_mels, **options)
        clips.set_epoch(epoch)
        key = "waveform" if num_mels is None else "log_mel"
        return [item[key].numpy().tobytes() for item in clips]

    first = crops(train=True)
    torch.rand(10)
    assert crops(train=True) == first
    others = [first[1], *crops(train=True, epoch=1), *crops(train=True, seed=1), *crops()]
    assert first[0] not in others


def test_reading_does_not_draw_from_the_global_generator(tmp_path, record):
    record("a.wav", seconds=3)
    clips = AudioFolder(tmp_path, pairs_of("a.wav"), seconds=1, train=True)
    before = torch.get_rng_state()
    _ = clips[0]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def bad_folder(tmp_path, record):
    record("good.wav")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no audio at all")
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 16000)
    return tmp_path


BAD = {
    "missing.wav": "missing.wav: the file does not exist",
    "empty.wav": "empty.wav: the file is empty",
    "text.wav": "text.wav: not an audio file that soundfile can read",
    "nothing.wav": "nothing.wav: the file holds no samples",
}


@pytest.mark.parametrize(("name", "message"), BAD.items())
def test_strict_names_the_file(bad_folder, name, message):
    with pytest.raises(AudioFileError, match=message):
        AudioFolder(bad_folder, pairs_of("good.wav", name), strict=True)


def test_bad_files_are_left_out_and_named_once(bad_folder):
    with pytest.warns(UserWarning, match="left out 4 of the audio files") as caught:
        clips = AudioFolder(bad_folder, pairs_of("missing.wav", "good.wav", *BAD), seconds=1)
    assert len(caught) == 1
    for message in BAD.values():
        assert message in str(caught[0].message)
    assert list(clips.skipped) == list(BAD)
    assert len(clips) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clips[0]["clip_id"] == 1
        clips.part([0], train=True)


def test_of_many_bad_files_the_first_are_named(tmp_path, record):
    record("good.wav")
    with pytest.warns(UserWarning, match="left out 12 .*5.wav.*And 7 more") as caught:
        AudioFolder(tmp_path, pairs_of("good.wav", *(f"{index}.wav" for index in range(1, 13))))
    assert "6.wav" not in str(caught[0].message)


def test_no_usable_file(tmp_path):
    with pytest.raises(AudioFileError, match=r"no audio file can be used. .*a.wav: the file does not exist"):
        AudioFolder(tmp_path, pairs_of("a.wav"))


def damaged(path):
    """Cut a file in half: its header still promises all of it."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_damaged_file_with_a_good_header_is_an_error_when_read(tmp_path, record):
    damaged(record("a.flac", seconds=2))
    clips = AudioFolder(tmp_path, pairs_of("a.flac"))
    with pytest.raises(AudioFileError, match=r'a.flac: the file is damaged .*pass `check="decode"`'):
        _ = clips[0]


def test_decoding_at_the_start_finds_damaged_files(tmp_path, record):
    record("good.wav")
    damaged(record("bad.flac", seconds=2))
    damaged(record("short.mp3", seconds=4, pitch=1000))
    with pytest.warns(UserWarning, match=r"left out 2 .*bad.flac: the file is damaged.*short.mp3"):
        clips = AudioFolder(tmp_path, pairs_of("good.wav", "bad.flac", "short.mp3"), check="decode")
    assert [pair.filename for pair in clips.pairs] == ["good.wav"]
    with pytest.raises(AudioFileError, match=r"bad.flac: the file is damaged"):
        AudioFolder(tmp_path, pairs_of("good.wav", "bad.flac"), check="decode", strict=True)


def test_samples_that_are_not_numbers(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    clips = AudioFolder(tmp_path, pairs_of("a.wav"))
    with pytest.raises(AudioFileError, match=r"a.wav: the file holds samples that are NaN or infinite"):
        _ = clips[0]


def test_a_file_that_vanishes(tmp_path, record):
    path = record("a.wav")
    clips = AudioFolder(tmp_path, pairs_of("a.wav"), cache="memory")
    path.unlink()
    with pytest.raises(AudioFileError, match=r"a.wav: the file was there at the start and does not exist"):
        _ = clips[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 0}, "`sample_rate` has to be positive, but got 0"),
        ({"seconds": 0}, "`seconds` has to be at least one sample long, but got 0"),
        ({"seed": -1}, "`seed` has to be at least 0, but got -1"),
        ({"check": "none"}, "`check` has to be 'header' or 'decode', but got 'none'"),
    ],
)
def test_arguments_outside_their_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        AudioFolder(tmp_path, pairs_of("a.wav"), **options)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of audio files at .*none"):
        AudioFolder(tmp_path / "none", pairs_of("a.wav"))


@pytest.mark.parametrize("num_mels", [None, 32])
@pytest.mark.parametrize("place", ["memory", "folder"])
def test_the_second_read_hits(tmp_path, record, decoded, place, num_mels):
    record("a.wav", seconds=2)
    cache = "memory" if place == "memory" else tmp_path / "new" / "cache"
    options = {"seconds": 1, "num_mels": num_mels}
    clips = AudioFolder(tmp_path, pairs_of("a.wav"), cache=cache, **options)
    key = "waveform" if num_mels is None else "log_mel"
    first, second = clips[0][key], clips[0][key]
    assert decoded == ["a.wav"]
    assert torch.equal(first, second)
    assert torch.equal(first, AudioFolder(tmp_path, pairs_of("a.wav"), **options)[0][key])


def test_without_a_cache_every_read_decodes(tmp_path, record, decoded):
    record("a.wav")
    clips = AudioFolder(tmp_path, pairs_of("a.wav"))
    _ = clips[0], clips[0]
    assert decoded == ["a.wav", "a.wav"]


def test_a_folder_serves_other_datasets_lengths_and_crops(tmp_path, record, decoded):
    record("a.wav", seconds=3)
    for options in ({"seconds": 1}, {"seconds": 2, "train": True}, {"seconds": 4, "seed": 3}):
        _ = AudioFolder(tmp_path, pairs_of("a.wav"), cache=tmp_path / "cache", **options)[0]
    assert decoded == ["a.wav"]


@pytest.mark.parametrize("change", [{"sample_rate": 8000}, {"num_mels": 32}])
def test_other_settings_miss(tmp_path, record, decoded, change):
    record("a.wav")
    _ = AudioFolder(tmp_path, pairs_of("a.wav"), cache=tmp_path / "cache")[0]
    _ = AudioFolder(tmp_path, pairs_of("a.wav"), cache=tmp_path / "cache", **change)[0]
    assert decoded == ["a.wav", "a.wav"]


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_a_changed_file_misses(tmp_path, record, place):
    record("a.wav", pitch=440)
    cache = "memory" if place == "memory" else tmp_path / "cache"
    clips = AudioFolder(tmp_path, pairs_of("a.wav"), cache=cache, seconds=1)
    before = clips[0]["waveform"]
    record("a.wav", pitch=880)
    assert not torch.equal(clips[0]["waveform"], before)


@pytest.mark.parametrize("kept", [0, 5, 100, 1000])
def test_a_truncated_cache_file_is_written_anew(tmp_path, record, decoded, kept):
    record("a.wav")
    clips = AudioFolder(tmp_path, pairs_of("a.wav"), cache=tmp_path / "cache", seconds=1)
    whole = clips[0]["waveform"]
    (stored,) = (tmp_path / "cache").iterdir()
    stored.write_bytes(stored.read_bytes()[:kept])
    assert torch.equal(clips[0]["waveform"], whole)
    assert torch.equal(clips[0]["waveform"], whole)
    assert decoded == ["a.wav", "a.wav"]


def test_an_interrupted_write_leaves_nothing(tmp_path, record, monkeypatch):
    record("a.wav")
    clips = AudioFolder(tmp_path, pairs_of("a.wav"), cache=tmp_path / "cache", seconds=1)

    def interrupted(file, *_, **__):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.np, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _ = clips[0]
    assert list((tmp_path / "cache").iterdir()) == []
    assert clips[0]["waveform"].abs().max() > 0.4


def test_decoding_at_the_start_fills_the_cache(tmp_path, record, decoded):
    record("a.wav")
    clips = AudioFolder(tmp_path, pairs_of("a.wav"), cache="memory", check="decode")
    _ = clips.part([0], train=True)[0]
    assert decoded == ["a.wav"]

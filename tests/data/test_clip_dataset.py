"""Clips as waveforms: lengths, crops, the cache, and audio that is not as it should be."""

import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import Subset

import ask_lightning.data.audio.stores as stores_module
from ask_lightning.data import AudioFileError, AudioOptions, Clip, ClipDataset, collate_pairs
from ask_lightning.data.audio.decoding import open_audio
from ask_lightning.data.audio.stores import FileStore
from ask_lightning.utilities.clip_ids import integer_ids

RATE = 16000


def clips_of(*names, captions=1):
    texts = tuple(f"caption {number}" for number in range(captions))
    return [Clip(f"file:{name}", texts, name) for name in names]


def dataset(folder, *names, captions=1, **options):
    store = FileStore(folder, {f"file:{name}": name for name in names})
    audio = AudioOptions(**{"sample_rate": RATE, "seconds": 1, **options})
    return ClipDataset(clips_of(*names, captions=captions), store, audio)


@pytest.fixture
def noise(tmp_path):
    def write(name, seconds=3.0, rate=RATE, channels=1, subtype="FLOAT"):
        random = np.random.default_rng(len(name))
        samples = random.uniform(-0.5, 0.5, (int(seconds * rate), channels)).astype(np.float32)
        soundfile.write(tmp_path / name, samples, rate, subtype=subtype if name.endswith("wav") else None)
        return samples

    return write


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that were opened, in order."""
    names = []
    real = open_audio

    def spy(name, content):
        names.append(content.name)
        return real(name, content)

    monkeypatch.setattr(stores_module, "open_audio", spy)
    return names


def test_layout_of_items_and_batches(tmp_path, noise):
    noise("a.wav", seconds=3)
    noise("b.wav", seconds=0.5)
    clips = dataset(tmp_path, "a.wav", "b.wav", captions=5)
    assert len(clips) == 10
    batch = collate_pairs([clips[index] for index in (0, 4, 5)])
    assert set(batch) == {"waveform", "num_samples", "caption", "clip_id", "caption_id"}
    assert batch["waveform"].shape == (3, 16000)
    assert batch["waveform"].dtype == torch.float32
    assert batch["num_samples"].tolist() == [16000, 16000, 8000]
    assert batch["num_samples"].dtype == batch["clip_id"].dtype == torch.int64
    assert batch["caption"] == ["caption 0", "caption 4", "caption 0"]
    assert batch["clip_id"].tolist() == integer_ids(["file:a.wav", "file:a.wav", "file:b.wav"]).tolist()
    assert batch["waveform"][2, 8000:].abs().max() == 0


def test_full_clips_make_padded_batches_up_to_the_longest_length_allowed(tmp_path, noise):
    heard = noise("a.wav", seconds=0.25), noise("bb.wav", seconds=0.75), noise("ccc.wav", seconds=3)
    clips = dataset(tmp_path, "a.wav", "bb.wav", "ccc.wav", crop="full")
    batch = collate_pairs(list(clips))
    assert batch["num_samples"].tolist() == [4000, 12000, 16000]
    assert batch["waveform"].shape == (3, 16000)
    assert torch.equal(batch["waveform"][1, :12000], torch.from_numpy(heard[1][:, 0]))
    assert torch.equal(batch["waveform"][2], torch.from_numpy(heard[2][16000:32000, 0]))
    assert collate_pairs([clips[0], clips[1]])["waveform"].shape == (2, 12000)


def test_center_crops_are_the_middle(tmp_path, noise):
    heard = noise("a.wav", seconds=2)
    assert torch.equal(dataset(tmp_path, "a.wav")[0]["waveform"], torch.from_numpy(heard[8000:24000, 0]))


def test_random_crops_depend_on_seed_epoch_and_index_alone(tmp_path, noise):
    noise("a.wav", seconds=4)

    def crops(epoch=0, **options):
        clips = dataset(tmp_path, "a.wav", captions=2, crop="random", **options)
        clips.set_epoch(epoch)
        return [item["waveform"].numpy().tobytes() for item in clips]

    first = crops()
    torch.rand(3)
    assert crops() == first
    assert crops(check="none") == first
    assert crops(cache="memory") == first
    assert first[0] not in [first[1], *crops(epoch=1), *crops(seed=1)]


def test_six_channels_at_96_khz(tmp_path, noise):
    noise("a.wav", seconds=2, rate=96000, channels=6)
    item = dataset(tmp_path, "a.wav", sample_rate=32000)[0]
    assert item["waveform"].shape == (32000,)
    assert item["num_samples"] == 32000


def test_of_an_hour_only_the_crop_is_read(tmp_path, monkeypatch):
    path = tmp_path / "hour.wav"
    with soundfile.SoundFile(path, "w", 8000, 1, subtype="PCM_U8") as file:
        for minute in range(60):
            file.write(np.full(60 * 8000, minute / 128))
    read = []
    real = soundfile.SoundFile.read

    def spy(self, frames=-1, *args, **options):
        samples = real(self, frames, *args, **options)
        read.append(len(samples))
        return samples

    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    for crop in ("random", "center", "full"):
        for cache in (None, "memory"):
            item = dataset(tmp_path, "hour.wav", crop=crop, cache=cache)[0]
            assert item["waveform"].shape == (16000,)
    assert max(read) < 9000
    assert dataset(tmp_path, "hour.wav", sample_rate=8000)[0]["waveform"].mean() == pytest.approx(
        29.5 / 128, abs=0.01
    )


def test_a_cached_crop_is_not_taken_from_behind_the_end_of_an_mp3_that_was_cut(tmp_path, noise):
    noise("a.mp3", seconds=30)
    content = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(content[: int(0.93 * len(content))])  # its header still says 30 s
    clips = dataset(tmp_path, "a.mp3", crop="random", cache="memory")
    for epoch in range(40):
        clips.set_epoch(epoch)
        assert clips[0]["num_samples"] == 16000


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_formats(tmp_path, noise, name):
    noise(name, seconds=2, rate=44100)
    for crop in ("random", "center", "full"):
        assert dataset(tmp_path, name, crop=crop)[0]["waveform"].shape == (16000,)


def test_five_captions_are_decoded_once_in_evaluation(tmp_path, noise, opened):
    noise("a.wav")
    noise("b.wav")
    clips = dataset(tmp_path, "a.wav", "b.wav", captions=5)
    opened.clear()
    assert len(list(clips)) == 10
    assert opened == ["a.wav", "b.wav"]
    assert torch.equal(clips[3]["waveform"], clips[0]["waveform"])


@pytest.mark.parametrize("crop", ["random", "center", "full"])
@pytest.mark.parametrize("place", ["memory", "folder"])
def test_the_cache_changes_nothing_and_is_read_instead_of_the_file(tmp_path, noise, opened, place, crop):
    noise("a.wav", rate=22050)
    noise("b.wav", seconds=0.5)
    cache = "memory" if place == "memory" else str(tmp_path / "cache")
    plain = dataset(tmp_path, "a.wav", "b.wav", crop=crop)
    kept = dataset(tmp_path, "a.wav", "b.wav", crop=crop, cache=cache)
    for epoch in range(3):
        plain.set_epoch(epoch)
        expected = list(plain)
        opened.clear()
        kept.set_epoch(epoch)
        for item, same in zip(kept, expected, strict=True):
            assert torch.allclose(item["waveform"], same["waveform"], atol=1e-6)
            assert item["num_samples"] == same["num_samples"]
        assert opened == (["a.wav", "b.wav"] if epoch == 0 else [])
    if place == "folder":
        opened.clear()
        again = dataset(tmp_path, "a.wav", "b.wav", crop="center", cache=cache)
        opened.clear()
        _ = list(again)
        assert opened == []


def test_cached_clips_do_not_share_memory_with_items(tmp_path, noise):
    noise("a.wav")
    clips = dataset(tmp_path, "a.wav", cache="memory", crop="random")
    clips[0]["waveform"].zero_()
    assert clips[0]["waveform"].abs().max() > 0.1


@pytest.mark.parametrize("crop", ["center", "full"])
def test_what_is_done_to_an_item_does_not_reach_the_next_caption(tmp_path, noise, crop):
    noise("a.wav")
    clips = dataset(tmp_path, "a.wav", captions=2, crop=crop)
    clips[0]["waveform"].zero_()
    assert clips[1]["waveform"].abs().max() > 0.1


def test_longer_recordings_are_cached_as_cropped(tmp_path, noise):
    noise("a.wav", seconds=70, rate=8000)
    _ = dataset(tmp_path, "a.wav", cache=str(tmp_path / "cache"))[0]
    (stored,) = (tmp_path / "cache").iterdir()
    assert stored.stat().st_size < 100_000


@pytest.fixture
def bad_folder(tmp_path, noise):
    noise("good.wav")
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), RATE)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no audio at all")
    samples = np.zeros(2 * RATE)
    samples[RATE + 5] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, RATE, subtype="FLOAT")
    noise("cut.flac")
    whole = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    return tmp_path


BAD = {
    "nothing.wav": "nothing.wav: the file holds no samples",
    "empty.wav": "empty.wav: the file is empty",
    "text.wav": "text.wav: not an audio file that soundfile can read",
    "missing.wav": "missing.wav: the file does not exist",
}
DAMAGED = {
    "nan.wav": "nan.wav: the file holds samples that are NaN",
    "cut.flac": "cut.flac: the file is damaged",
}


def test_files_without_audio_are_left_out_and_named(bad_folder):
    with pytest.warns(UserWarning, match="Left out 4 clips whose audio cannot be used") as caught:
        clips = dataset(bad_folder, *BAD, "good.wav", *DAMAGED)
    assert len(caught) == 1
    assert all(message in str(caught[0].message) for message in BAD.values())
    assert [clip.name for clip in clips.clips] == ["good.wav", *DAMAGED]
    assert list(clips.skipped) == [f"file:{name}" for name in BAD]


@pytest.mark.parametrize(("name", "message"), DAMAGED.items())
def test_damage_is_an_error_when_read_or_left_out_when_looked_for(bad_folder, name, message):
    with pytest.raises(AudioFileError, match=rf'{message}.*datasets with `check="decode"`'):
        _ = dataset(bad_folder, name, seconds=2.5)[0]
    with pytest.warns(UserWarning, match=message):
        assert len(dataset(bad_folder, "good.wav", name, check="decode")) == 1


@pytest.mark.parametrize(("name", "message"), {**BAD, **DAMAGED}.items())
def test_strict(bad_folder, name, message):
    with pytest.raises(AudioFileError, match=message):
        dataset(bad_folder, "good.wav", name, strict=True, check="decode")


def test_nothing_that_can_be_used(bad_folder):
    with pytest.raises(
        AudioFileError, match=r"No clip is left that can be used. .*nothing.wav: the file holds no"
    ):
        dataset(bad_folder, "nothing.wav")


def test_without_a_check_bad_files_are_errors_when_read(bad_folder):
    clips = dataset(bad_folder, *BAD, check="none")
    for index, message in enumerate(BAD.values()):
        with pytest.raises(AudioFileError, match=message):
            _ = clips[index]


def test_one_sample(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0.5]), 44100, subtype="FLOAT")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for crop in ("random", "center", "full"):
            item = dataset(tmp_path, "a.wav", crop=crop)[0]
            assert item["num_samples"] == 1
            assert item["waveform"].shape == ((1,) if crop == "full" else (16000,))
            assert torch.isfinite(item["waveform"]).all()


def test_a_file_that_vanishes_or_changes(tmp_path, noise):
    noise("a.wav")
    for cache in (None, "memory"):
        clips = dataset(tmp_path, "a.wav", cache=cache)
        (tmp_path / "a.wav").unlink()
        with pytest.raises(AudioFileError, match=r"a.wav: the file (was there at the start|does not exist)"):
            _ = clips[0]
        noise("a.wav", seconds=2)
        with pytest.raises(AudioFileError, match=r"a.wav: the file has changed since the start. Start anew"):
            _ = clips[0]
        noise("a.wav")


def test_variants_share_the_audio_and_crop_otherwise(tmp_path, noise, opened):
    noise("a.wav")
    noise("b.wav")
    clips = dataset(tmp_path, "a.wav", "b.wav", crop="random")
    opened.clear()
    other = clips.variant(crop="full", seconds=2, clips=[Clip("file:b.wav", ("x", "y"), "b.wav")])
    assert opened == []
    assert len(other) == 2
    assert other[1]["caption"] == "y"
    assert other[1]["waveform"].shape == (32000,)
    assert len(clips) == 2
    seeded = clips.variant(seed=5)
    assert (clips.audio.seed, seeded.audio.seed, seeded.audio.crop) == (0, 5, "random")
    with pytest.raises(
        ValueError, match=r"`crop` has to be one of .*'random', 'center', 'full'.* but got 'left'"
    ):
        clips.variant(crop="left")
    with pytest.raises(ValueError, match=r"`seconds` has to be at least 6.25e-05, but got 0"):
        clips.variant(seconds=0)


def test_a_dataset_can_be_pickled(tmp_path, noise):
    noise("a.wav")
    clips = dataset(tmp_path, "a.wav")
    assert torch.equal(pickle.loads(pickle.dumps(clips))[0]["waveform"], clips[0]["waveform"])


@pytest.mark.parametrize("integers", [np.array, torch.tensor])
def test_numbers_of_items_may_be_of_any_kind_of_integer(tmp_path, noise, integers):
    noise("a.wav")
    clips = dataset(tmp_path, "a.wav", captions=2, crop="random")
    batch = collate_pairs([Subset(clips, integers([1, 0]))[item] for item in range(2)])
    assert batch["caption_id"].tolist() == [clips[1]["caption_id"], clips[0]["caption_id"]]
    assert torch.equal(batch["waveform"][0], clips[1]["waveform"])


def test_a_caption_keeps_its_id_among_others(tmp_path, noise):
    """In the knowledge, a dataset may have fewer clips and further captions."""
    noise("a.wav")
    noise("b.wav")
    texts = ("rain", "a dog", "rain")
    clips = [replace(clip, captions=texts, group="session") for clip in clips_of("a.wav", "b.wav")]
    whole = dataset(tmp_path, "a.wav", "b.wav").variant(clips=clips)
    ids = [item["caption_id"] for item in whole]
    assert len(set(ids)) == 6, "those of clips of one recording and of repeated texts differ as well"
    assert collate_pairs([whole[0], whole[5]])["caption_id"].dtype == torch.int64
    part = whole.variant(clips=[replace(clips[1], captions=("thunder", *texts))])
    assert [item["caption_id"] for item in part][1:] == ids[3:]
    assert part[0]["caption_id"] not in ids


def test_iteration_ends(tmp_path, noise):
    noise("a.wav")
    clips = dataset(tmp_path, "a.wav")
    assert len(list(clips)) == 1
    with pytest.raises(IndexError, match="Index 1 is outside the 1 items"):
        _ = clips[1]

"""The cache: what is decoded once, what misses, and what an interruption leaves."""

import errno
import resource
import signal

import numpy as np
import pytest
import soundfile
import torch

import ask_lightning.data.audio.cache as cache_module
from tests.helpers.audio_folder import folder_of


@pytest.mark.parametrize("features", [None, "log_mel"])
@pytest.mark.parametrize("place", ["memory", "folder"])
def test_the_second_read_hits(tmp_path, record, decoded, place, features):
    record("a.wav", seconds=2)
    cache = "memory" if place == "memory" else tmp_path / "new" / "cache"
    options = {"seconds": 1, "features": features, "crop": "random"}
    clips = folder_of(tmp_path, "a.wav", cache=cache, **options)
    key = features or "waveform"
    first, second = clips[0][key], clips[0][key]
    assert decoded == ["a.wav"]
    assert torch.equal(first, second)
    assert torch.equal(first, folder_of(tmp_path, "a.wav", **options)[0][key])


def test_without_a_cache_every_read_decodes(tmp_path, record, decoded):
    record("a.wav")
    clips = folder_of(tmp_path, "a.wav", crop="random")
    _ = clips[0], clips[0]
    assert decoded == ["a.wav", "a.wav"]


def test_a_folder_serves_other_datasets_lengths_and_crops(tmp_path, record, decoded):
    record("a.wav", seconds=3)
    for options in ({"seconds": 1}, {"seconds": 2, "crop": "random"}, {"seconds": 4, "seed": 3}):
        _ = folder_of(tmp_path, "a.wav", cache=tmp_path / "cache", **options)[0]
    assert decoded == ["a.wav"]


@pytest.mark.parametrize("change", [{"sample_rate": 8000}, {"features": "log_mel"}])
def test_other_settings_miss(tmp_path, record, decoded, change):
    record("a.wav")
    _ = folder_of(tmp_path, "a.wav", cache=tmp_path / "cache")[0]
    _ = folder_of(tmp_path, "a.wav", cache=tmp_path / "cache", **change)[0]
    assert decoded == ["a.wav", "a.wav"]


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_a_changed_file_misses(tmp_path, record, place):
    record("a.wav", pitch=440)
    cache = "memory" if place == "memory" else tmp_path / "cache"
    clips = folder_of(tmp_path, "a.wav", cache=cache, seconds=0.9, crop="random")
    before = clips[0]["waveform"]
    record("a.wav", pitch=880)
    assert not torch.equal(clips[0]["waveform"], before)


@pytest.mark.parametrize("kept", [0, 5, 100, 1000])
def test_a_truncated_cache_file_is_written_anew(tmp_path, record, decoded, kept):
    record("a.wav")
    clips = folder_of(tmp_path, "a.wav", cache=tmp_path / "cache", seconds=1, crop="random")
    whole = clips[0]["waveform"]
    (stored,) = (tmp_path / "cache").iterdir()
    stored.write_bytes(stored.read_bytes()[:kept])
    assert torch.equal(clips[0]["waveform"], whole)
    assert torch.equal(clips[0]["waveform"], whole)
    assert decoded == ["a.wav", "a.wav"]


def test_an_interrupted_write_leaves_nothing(tmp_path, record, monkeypatch):
    record("a.wav")
    clips = folder_of(tmp_path, "a.wav", cache=tmp_path / "cache", seconds=1, crop="random")

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
    clips = folder_of(tmp_path, "a.wav", cache="memory", check="decode")
    decoded.clear()
    _ = clips.variant(crop="random")[0]
    assert decoded == []


def test_spectrograms_are_the_same_with_and_without_a_cache(tmp_path, record):
    record("long.wav", seconds=3, rate=22050)
    record("short.wav", seconds=0.4)
    soundfile.write(tmp_path / "one.wav", np.array([0.5]), 16000, subtype="FLOAT")
    names = ("long.wav", "short.wav", "one.wav")
    options = {"seconds": 1, "features": "log_mel", "crop": "random"}
    plain = folder_of(tmp_path, *names, **options)
    kept = folder_of(tmp_path, *names, cache=tmp_path / "cache", **options)
    for _ in range(2):
        for item, same in zip(plain, kept, strict=True):
            assert torch.equal(item["log_mel"], same["log_mel"])
            assert item["log_mel"].shape == (63, 64)
    assert set(plain[0]) == {"log_mel", "caption", "clip_id", "caption_id"}


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"`cache` has to be None, \"memory\" or a folder .* got '.*file' \(File"
    ):
        cache_module.AudioCache(tmp_path / "file")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    limits, answer = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    (tmp_path / "a.wav").touch()
    cache = cache_module.AudioCache(tmp_path / "cache")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match=r"File too large: .*/cache/\w+\.npy'") as caught:
            cache.get(tmp_path / "a.wav", "", lambda: torch.ones(16_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, answer)
    assert caught.value.errno == errno.EFBIG
    assert not list((tmp_path / "cache").iterdir())
    assert torch.equal(cache.get(tmp_path / "a.wav", "", lambda: torch.ones(16_000)), torch.ones(16_000))

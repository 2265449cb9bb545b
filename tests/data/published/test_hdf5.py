"""HDF5 files as ML-ACT packs them."""

import pickle

import numpy as np
import pytest
import torch

from ask_lightning.data import AudioCapsData, AudioOptions, ClipDataset
from ask_lightning.data.audio.decoding import AudioFileError
from ask_lightning.data.published.hdf5 import HDF5Store, read_hdf5

h5py = pytest.importorskip("h5py")

RATE = 32000


def tone(index, seconds=1.0):
    time = np.arange(int(seconds * RATE)) / RATE
    return (0.5 * np.sin(2 * np.pi * 110 * (index + 1) * time)).astype(np.float32)


def pack(path, *, captions=1, dtype=np.float32, size=8, word="video"):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.stack([np.pad(tone(index, 0.5 + index / 20), (0, RATE))[:RATE] for index in range(size)])
    text = h5py.special_dtype(vlen=str)
    with h5py.File(path, "w") as file:
        names = [f"Y{word}_{index:05d}.wav" for index in range(size)]
        file.create_dataset("audio_name", data=names, dtype=text)
        file["audio_length"] = np.array([len(tone(i, 0.5 + i / 20)) for i in range(size)], dtype=np.uint32)
        file["waveform"] = samples if dtype == np.float32 else (samples * 32767).astype(dtype)
        texts = [[f"tone {index} said {say}" for say in range(captions)] for index in range(size)]
        shape = (size,) if captions == 1 else (size, captions)
        data = np.array(texts, dtype=object).reshape(shape)
        file.create_dataset("caption", data=data, dtype=text)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_hdf5_holds_the_same_sound_and_captions(tmp_path, dtype):
    path = pack(tmp_path / "val.h5", captions=5, dtype=dtype)
    clips = read_hdf5(path, "youtube")
    data = ClipDataset(clips, HDF5Store(path, RATE), AudioOptions(seconds=0.5))
    assert len(data) == 40
    assert clips[3].key == "youtube:video_00003"
    item = data[16]
    assert item["caption"] == "tone 3 said 1"
    assert item["num_samples"] == 16000
    start = (20800 - 16000) // 2
    expected = torch.from_numpy(tone(3, 0.65)[start : start + 16000])
    torch.testing.assert_close(item["waveform"], expected, atol=1e-4, rtol=0)


def test_the_filling_at_the_end_of_a_row_is_no_audio(tmp_path):
    path = pack(tmp_path / "val.h5", captions=5)
    data = ClipDataset(read_hdf5(path, "youtube"), HDF5Store(path, RATE), AudioOptions(crop="full"))
    assert [data[index]["num_samples"] for index in (0, 5, 10)] == [16000, 17600, 19200]
    assert (
        ClipDataset(data.clips, HDF5Store(path, 16000), AudioOptions(crop="full"))[0]["num_samples"] == 32000
    )


def test_a_corrected_rate_misses_the_cache(tmp_path):
    path, clips = pack(tmp_path / "val.h5"), read_hdf5(tmp_path / "val.h5", "youtube")
    for rate in (16000, RATE):
        cached, uncached = (
            ClipDataset(clips, HDF5Store(path, rate), AudioOptions(seconds=0.5, cache=cache))[0]["waveform"]
            for cache in (tmp_path / "cache", None)
        )
        assert torch.equal(cached, uncached)


@pytest.mark.parametrize("cache", [None, "cache"])
def test_a_file_that_is_replaced_meanwhile_is_noticed(tmp_path, cache):
    path = pack(tmp_path / "val.h5")
    options = AudioOptions(seconds=0.5, cache=cache and tmp_path / cache)
    data = ClipDataset(read_hdf5(path, "youtube"), HDF5Store(path, RATE), options)
    assert data[0]["num_samples"] == 16000
    other = pack(tmp_path / "other.h5")
    with h5py.File(other, "r+") as file:
        file["waveform"][:] = file["waveform"][:] / 2
    other.replace(path)
    with pytest.raises(AudioFileError, match=r"val.h5: the file has changed since the start. Start anew."):
        _ = data[1]
    anew = ClipDataset(data.clips, HDF5Store(path, RATE), options)[1]["waveform"]
    assert torch.equal(anew, ClipDataset(data.clips, HDF5Store(path, RATE))[1]["waveform"][800:16800])


def test_the_layout_of_ml_act_as_a_data_module(tmp_path):
    for split, captions in (("train", 1), ("val", 5), ("test", 5)):
        pack(tmp_path / "hdf5s" / split / f"{split}.h5", captions=captions, word=f"{split:_<5}")
    (tmp_path / "csv_files").mkdir()
    (tmp_path / "csv_files" / "train.csv").write_text("file_name,caption\n")
    data = AudioCapsData(tmp_path, seconds=0.5, batch_size=4, num_workers=2, check_counts=False)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [batch["waveform"].shape for batch in batches] == [(4, 16000), (4, 16000)]
    assert len(data.datasets["val"]) == 40
    assert len(data.knowledge_dataset()) == 8


def test_forked_and_other_processes_open_the_file_themselves(tmp_path):
    path = pack(tmp_path / "val.h5")
    data = ClipDataset(read_hdf5(path, "youtube"), HDF5Store(path, RATE), AudioOptions(seconds=0.5))
    first = data[0]["waveform"]
    loader = torch.utils.data.DataLoader(data, num_workers=1, multiprocessing_context="fork", batch_size=None)
    assert torch.equal(next(iter(loader))["waveform"], first)
    assert torch.equal(pickle.loads(pickle.dumps(data))[0]["waveform"], first)


def test_hdf5_that_is_something_else(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["waveform"] = np.zeros((1, 2))
    with pytest.raises(
        ValueError, match=r"no dataset 'audio_name', 'audio_length', 'caption'; it has \['waveform'\]"
    ):
        read_hdf5(tmp_path / "a.h5", "youtube")
    (tmp_path / "b.h5").write_bytes(b"half of a download")
    with pytest.raises(ValueError, match=r"b.h5: not an HDF5 file, or one that was cut short"):
        read_hdf5(tmp_path / "b.h5", "youtube")
    with pytest.raises(FileNotFoundError, match=r"no HDF5 file at .*none"):
        read_hdf5(tmp_path / "none.h5", "youtube")


def test_an_hdf5_row_without_samples_is_left_out(tmp_path):
    path = pack(tmp_path / "val.h5")
    with h5py.File(path, "a") as file:
        file["audio_length"][2] = 0
    with pytest.warns(UserWarning, match=r"'Yvideo_00002.wav': the file holds no samples"):
        assert len(ClipDataset(read_hdf5(path, "youtube"), HDF5Store(path, RATE))) == 7

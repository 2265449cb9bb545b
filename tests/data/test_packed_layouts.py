"""HDF5 as ML-ACT packs it, parquet, and what the `datasets` library loads."""

import io
import pickle
import sys

import numpy as np
import pytest
import soundfile
import torch

from ask_lightning.data import AudioCapsData, AudioFileError, ClipDataset, ClothoData
from ask_lightning.data.audio.stores import HDF5Store, read_hdf5
from ask_lightning.data.published.parquet import read_parquet

h5py = pytest.importorskip("h5py")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

RATE = 32000
VIDEOS = [f"video_{index:05d}" for index in range(8)]


def tone(index, seconds=1.0):
    time = np.arange(int(seconds * RATE)) / RATE
    return (0.5 * np.sin(2 * np.pi * 110 * (index + 1) * time)).astype(np.float32)


def encoded(index, seconds=1.0, rate=RATE):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(index, seconds), rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


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
    data = ClipDataset(clips, HDF5Store(path, RATE), seconds=0.5)
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
    data = ClipDataset(read_hdf5(path, "youtube"), HDF5Store(path, RATE), crop="full")
    assert [data[index]["num_samples"] for index in (0, 5, 10)] == [16000, 17600, 19200]
    assert (
        ClipDataset(data.clips, HDF5Store(path, 16000), sample_rate=RATE, crop="full")[0]["num_samples"]
        == 32000
    )


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
    data = ClipDataset(read_hdf5(path, "youtube"), HDF5Store(path, RATE), seconds=0.5)
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


def rows(captions=1, name="youtube_id"):
    return [
        {
            name: video if name == "youtube_id" else f"{video}.wav",
            "caption": f"tone {index} said {say}",
            "audiocap_id": 10 * index + say,
            "start_time": 30,
            "audio": {"bytes": encoded(index), "path": f"{video}.wav"},
        }
        for index, video in enumerate(VIDEOS)
        for say in range(captions)
    ]


def write_parquet(path, content, groups=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path, row_group_size=groups)
    return path


def test_parquet_in_parts_and_groups(tmp_path):
    content = rows(captions=2)
    first = write_parquet(tmp_path / "val-00000-of-00002.parquet", content[:7])
    second = write_parquet(tmp_path / "val-00001-of-00002.parquet", content[7:])
    clips, store = read_parquet([first, second], "youtube")
    assert store.num_rows == 16
    assert len(clips) == 8
    assert clips[2].keys == {"youtube:video_00002", "audiocap:20", "audiocap:21"}
    assert clips[3].captions == ("tone 3 said 0", "tone 3 said 1"), "over the border of the parts"
    data = pickle.loads(pickle.dumps(ClipDataset(clips, store, seconds=1, check="none")))
    for index in (15, 0, 7, 6):
        assert torch.equal(data[index]["waveform"], torch.from_numpy(tone(index // 2)))


def test_audio_by_path_and_as_bare_bytes(tmp_path):
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "a.wav", tone(0), RATE, subtype="FLOAT")
    tables = [
        [{"audio": "audio/a.wav", "text": "a tone"}],
        [{"audio": {"bytes": None, "path": "audio/a.wav"}, "captions": ["a tone"]}],
        [{"audio": encoded(0), "file_name": "a.wav", "caption_1": "a tone"}],
    ]
    for number, table in enumerate(tables):
        path = write_parquet(tmp_path / f"{number}.parquet", table)
        clips, store = read_parquet([path], "file")
        assert [(clip.key, clip.captions) for clip in clips] == [("file:a", ("a tone",))]
        data = ClipDataset(clips, store, seconds=1)
        assert torch.equal(data[0]["waveform"], torch.from_numpy(tone(0)))


def test_parquet_that_is_something_else(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"sound": b"", "caption": "a"}])
    with pytest.raises(
        ValueError, match=r"it needs a column 'audio' and one called caption.*but has \['sound', 'cap"
    ):
        read_parquet([path], "file")
    path = write_parquet(tmp_path / "a.parquet", [{"audio": b"", "caption": "a"}])
    with pytest.raises(ValueError, match=r"row 0: no name. A row needs one of youtube_id, file_name"):
        read_parquet([path], "file")
    (tmp_path / "a.parquet").write_bytes(b"half of a download")
    with pytest.raises(ValueError, match=r"a.parquet: not a parquet file, or one that was cut short"):
        read_parquet([path], "file")


def test_cells_without_audio(tmp_path):
    content = [
        {"audio": {"bytes": b"", "path": None}, "id": "a", "caption": "x"},
        {"audio": {"bytes": None, "path": "none.wav"}, "id": "b", "caption": "x"},
        {"audio": {"bytes": b"text", "path": None}, "id": "c", "caption": "x"},
    ]
    clips, store = read_parquet([write_parquet(tmp_path / "a.parquet", content)], "file")
    data = ClipDataset(clips, store, check="none")
    messages = ["its audio is empty", "'b': the file does not exist", "'c': not an audio file that soundfile"]
    for index, message in enumerate(messages):
        with pytest.raises(AudioFileError, match=message):
            _ = data[index]


def test_workers_read_parquet_after_the_parent_did(tmp_path):
    write_parquet(tmp_path / "data" / "train.parquet", rows())
    data = AudioCapsData(tmp_path, seconds=0.5, batch_size=4, num_workers=2, check_counts=False)
    _ = data.datasets["train"][0]
    heard = [batch["caption"] for batch in data.train_dataloader()]
    assert sorted(caption for batch in heard for caption in batch) == [f"tone {i} said 0" for i in range(8)]


@pytest.mark.parametrize("given", [None, "data", "data/test-*.parquet"])
def test_parquet_as_a_data_module_with_a_cache(tmp_path, given):
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows(captions=5))
    options = {"cache": str(tmp_path / "cache"), "check": "decode", "check_counts": False, "batch_size": 4}
    data = AudioCapsData(tmp_path, test=given, seconds=0.5, **options)
    data.setup("test")
    assert len(list((tmp_path / "cache").iterdir())) == 8
    assert torch.cat([batch["clip_id"] for batch in data.test_dataloader()]).unique().numel() == 8
    with pytest.raises(ValueError, match=r"There is no train dataset. Pass one as `train`"):
        data.train_dataloader()


def test_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    content = datasets.Dataset.from_list(rows(captions=5))
    content = content.cast_column("audio", datasets.Audio())
    other = datasets.Dataset.from_list(
        [row | {"youtube_id": f"val{row['youtube_id'][3:]}"} for row in rows(5)]
    )
    datasets.DatasetDict({"train": content, "validation": other}).save_to_disk(tmp_path / "saved")
    data = AudioCapsData(tmp_path, hub=str(tmp_path / "saved"), seconds=0.5, batch_size=4, check_counts=False)
    batch = next(iter(data.val_dataloader()))
    assert batch["caption"] == [f"tone 0 said {say}" for say in range(4)]
    assert torch.equal(batch["waveform"][0], torch.from_numpy(tone(0)[8000:24000]))
    assert len(data.datasets["train"]) == len(data.knowledge_dataset()) == 40
    assert "test" not in data.datasets
    with pytest.raises(ValueError, match=r"There is no test dataset"):
        data.test_dataloader()
    content.rename_column("audio", "sound").save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other, train: it needs a column 'audio' and one called caption"):
        AudioCapsData(tmp_path, hub=str(tmp_path / "other")).setup("fit")


def test_clotho_in_parquet(tmp_path):
    content = [
        {"file_name": f"Rain {i}.wav", "caption_1": "a", "caption_2": "b", "audio": encoded(i)}
        for i in range(3)
    ]
    write_parquet(tmp_path / "data" / "evaluation.parquet", content)
    data = ClothoData(tmp_path, check_counts=False)
    assert len(data.datasets["test"]) == 6
    assert [clip.key for clip in data.datasets["test"].clips] == ["file:rain 0", "file:rain 1", "file:rain 2"]


def test_importing_the_data_room_needs_none_of_them():
    import subprocess

    code = "import ask_lightning.data, sys; assert not {'h5py', 'pyarrow', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)

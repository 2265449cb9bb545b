"""Parquet files, and what the `datasets` library loads."""

import io
import pickle

import numpy as np
import pytest
import soundfile
import torch

from ask_lightning.data import AudioCapsData, AudioFileError, AudioOptions, ClipDataset, ClothoData
from ask_lightning.data.published.parquet import read_parquet

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")

RATE = 32000
VIDEOS = [f"video_{index:05d}" for index in range(8)]


def tone(index, seconds=1.0):
    time = np.arange(int(seconds * RATE)) / RATE
    return (0.5 * np.sin(2 * np.pi * 110 * (index + 1) * time)).astype(np.float32)


def encoded(index, seconds=1.0, rate=RATE):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(index, seconds), rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


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
    assert len(clips) == 8
    assert clips[2].keys == {"youtube:video_00002", "audiocap:20", "audiocap:21"}
    assert clips[3].captions == ("tone 3 said 0", "tone 3 said 1"), "over the border of the parts"
    data = pickle.loads(pickle.dumps(ClipDataset(clips, store, AudioOptions(seconds=1, check="none"))))
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
        data = ClipDataset(clips, store, AudioOptions(seconds=1))
        assert torch.equal(data[0]["waveform"], torch.from_numpy(tone(0)))


def test_rows_named_by_the_path_of_their_audio_are_read_without_the_audio(tmp_path, monkeypatch):
    read = []
    as_list = datasets.Dataset.to_list
    monkeypatch.setattr(datasets.Dataset, "to_list", lambda self: read.append(as_list(self)) or read[-1])
    audio = {"bytes": encoded(0), "path": "audio/a.wav"}
    clips, _ = read_parquet([write_parquet(tmp_path / "a.parquet", [{"audio": audio, "text": "a"}])], "file")
    assert [clip.key for clip in clips] == ["file:a"]
    assert read == [[{"text": "a"}], [{"audio.path": "audio/a.wav"}]]


@pytest.mark.parametrize("cell", ["audio/a.wav", {"bytes": None, "path": "audio/a.wav"}])
def test_a_changed_file_beside_the_table_misses_the_cache(cell, tmp_path):
    (tmp_path / "audio").mkdir()
    table = write_parquet(tmp_path / "0.parquet", [{"audio": cell, "text": "a tone"}])
    clips, store = read_parquet([table], "file")
    for number in range(2):
        soundfile.write(tmp_path / "audio" / "a.wav", tone(number), RATE, subtype="FLOAT")
        data = ClipDataset(clips, store, AudioOptions(seconds=1, cache=tmp_path / "cache"))
        assert torch.equal(data[0]["waveform"], torch.from_numpy(tone(number)))
        assert data.origin(clips[0]) == (tmp_path / "audio" / "a.wav", "")


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
    data = ClipDataset(clips, store, AudioOptions(check="none"))
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
    data = AudioCapsData(tmp_path, annotations=given and {"test": given}, seconds=0.5, **options)
    data.setup("test")
    assert len(list((tmp_path / "cache").iterdir())) == 8
    assert torch.cat([batch["clip_id"] for batch in data.test_dataloader()]).unique().numel() == 8
    with pytest.raises(ValueError, match=r"There is no train dataset, only test"):
        data.train_dataloader()


def test_the_datasets_library(tmp_path):
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


@pytest.mark.parametrize(
    "option", [{"annotations": {"train": "train.csv"}}, {"audio_folder": "audio"}, {"layout": "hdf5"}]
)
def test_what_says_where_files_are_is_refused_beside_the_hub(option, tmp_path):
    (name,) = option
    with pytest.raises(ValueError, match=rf"Arguments `hub` and `{name}` exclude each other: .* 'me/sounds'"):
        AudioCapsData(tmp_path, hub="me/sounds", **option)


def test_clotho_in_parquet(tmp_path):
    content = [
        {"file_name": f"Rain {i}.wav", "caption_1": "a", "caption_2": "b", "audio": encoded(i)}
        for i in range(3)
    ]
    write_parquet(tmp_path / "data" / "evaluation.parquet", content)
    data = ClothoData(tmp_path, check_counts=False)
    assert len(data.datasets["test"]) == 6
    assert [clip.key for clip in data.datasets["test"].clips] == ["file:rain 0", "file:rain 1", "file:rain 2"]


def test_stretches_of_one_video_are_clips_of_their_own(tmp_path):
    content = rows(captions=2)[:4]
    for row in content[2:]:
        row |= {"youtube_id": VIDEOS[0], "start_time": 130.0}
    clips, store = read_parquet([write_parquet(tmp_path / "val.parquet", content)], "youtube")
    assert [(clip.key, clip.start, clip.captions) for clip in clips] == [
        (f"youtube:{VIDEOS[0]}@30", 30, ("tone 0 said 0", "tone 0 said 1")),
        (f"youtube:{VIDEOS[0]}@130", 130, ("tone 1 said 0", "tone 1 said 1")),
    ]
    assert clips[1].keys == {f"youtube:{VIDEOS[0]}@130", f"youtube:{VIDEOS[0]}", "audiocap:10", "audiocap:11"}
    data = ClipDataset(clips, store, AudioOptions(seconds=1, check="none"))
    assert torch.equal(data[2]["waveform"], torch.from_numpy(tone(1)))
    assert data[0]["clip_id"] != data[2]["clip_id"]


def test_a_row_may_have_the_id_0(tmp_path):
    content = [{"id": i, "name": "recording", "caption": f"tone {i}", "audio": encoded(i)} for i in range(2)]
    clips, _ = read_parquet([write_parquet(tmp_path / "val.parquet", content)], "file")
    assert [(clip.key, clip.captions) for clip in clips] == [
        ("file:0", ("tone 0",)),
        ("file:1", ("tone 1",)),
    ]


@pytest.mark.parametrize("start", ["0:30", float("inf")])
def test_a_start_that_is_no_number_of_seconds_is_named_with_its_row(start, tmp_path):
    content = [row | {"start_time": start} for row in rows()[:1]]
    told = rf"row 0: start_time has to be a number of seconds, but is {start!r}"
    with pytest.raises(ValueError, match=told):
        read_parquet([write_parquet(tmp_path / "val.parquet", content)], "youtube")

"""Where one's own recordings may be: tables of several kinds, a folder without one, saved datasets."""

import io
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ask_lightning.data import FolderData
from ask_lightning.data.recordings import TableFormat, read_recordings

NAMES = [f"{index}.wav" for index in range(8)]


@pytest.fixture
def sounds(tmp_path) -> Path:
    """A folder of eight short files."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    for index, name in enumerate(NAMES):
        soundfile.write(folder / name, np.full(800, index / 10), 16000)
    return folder


def found(folder: Path, form: TableFormat | None = None, annotations: str | None = None):
    return read_recordings(folder, annotations, None, form or TableFormat())


@pytest.mark.parametrize(
    ("name", "delimiter"), [("t.csv", ";"), ("t.tsv", "\t"), ("t.csv", "|"), ("t.CSV", ",")]
)
def test_the_only_table_of_a_folder_and_its_delimiter_are_found(sounds, name, delimiter):
    said = "rain, then wind" if delimiter in ";|" else "rain; then | wind"
    lines = [f"File Name{delimiter}Description", *(f"{file}{delimiter}{said} {file}" for file in NAMES)]
    (sounds / name).write_text("\n".join(lines))
    recordings = found(sounds)
    assert recordings.delimiter == delimiter
    assert recordings.columns.filename == "File Name"
    assert recordings.clips[3].captions == (f"{said} 3.wav",)
    assert len(FolderData(sounds, seconds=0.05).datasets["train"].clips) == 6


def test_columns_without_a_usual_name(sounds):
    (sounds / "t.csv").write_text("sound;what;who\n0.wav;rain;me")
    message = (
        r"t.csv: no column 'caption' or of another usual name \(text, .*it has \['sound', 'what', 'who'\]. "
        r"Name the column that holds the captions by the argument `caption_columns`."
    )
    with pytest.raises(ValueError, match=message):
        found(sounds)
    assert found(sounds, TableFormat(caption_columns="what")).clips[0].captions == ("rain",)
    (sounds / "t.csv").write_text("a;caption\n0.wav;rain")
    with pytest.raises(
        ValueError, match=r"no column 'filename' .* the audio files by the argument `filename_"
    ):
        found(sounds)


def test_a_folder_without_a_table_is_searched_by_names(sounds):
    (sounds / "deep").mkdir()
    soundfile.write(sounds / "deep/Dog_bark-02.flac", np.zeros(800), 16000)
    (sounds / "notes.txt").write_text("no sound")
    (sounds / ".hidden.wav").write_bytes(b"")
    with pytest.warns(UserWarning, match="so the names of its 9 audio files are their captions"):
        recordings = found(sounds)
    assert {clip.path for clip in recordings.clips} == {*NAMES, "deep/Dog_bark-02.flac"}
    (dog,) = [clip for clip in recordings.clips if clip.path.startswith("deep")]
    assert dog.captions == ("dog bark 02",)
    assert recordings.columns is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such names")
def test_a_file_name_of_another_encoding(sounds):
    (sounds / "7.wav").rename(os.fsdecode(os.fsencode(sounds) + b"/gro\xdf.wav"))
    data = FolderData(sounds, seconds=0.05, cache=str(sounds / "cache"), strict=True, batch_size=8)
    (batch,) = data.ordered_dataloader("all")
    assert batch["waveform"][:, 0].tolist() == pytest.approx([index / 10 for index in range(8)], abs=1e-3)


def test_folders_of_which_nobody_knows_what_to_read(sounds, tmp_path):
    for name in ("a.csv", "b.tsv"):
        (sounds / name).write_text("file,caption\n0.wav,rain")
    with pytest.raises(ValueError, match=r"has 2 tables: a.csv, b.tsv. Name that of the captions as `annot"):
        found(sounds)
    assert found(sounds, annotations="a.csv").clips[0].captions == ("rain",)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no audio files and no table. Correct `root`"):
        found(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no folder of audio files at nowhere"):
        found(Path("nowhere"))
    with pytest.raises(ValueError, match=r"--data.root FOLDER` and `--data.hub NAME"):
        read_recordings(None, None, None, TableFormat())
    with pytest.raises(ValueError, match="`hub` has to stand alone"):
        read_recordings(sounds, None, "a/b", TableFormat())


def test_splits_of_a_table(sounds):
    splits = ["train"] * 5 + ["Test"] * 3
    lines = [f"{name},said {name},{split}" for name, split in zip(NAMES, splits, strict=True)]
    (sounds / "t.csv").write_text("\n".join(["file,caption,subset", *lines]))
    data = FolderData(sounds, seconds=0.05, fractions=(0.8, 0.2))
    sizes = {split: len(part.clips) for split, part in data.datasets.items()}
    assert sizes == {"train": 4, "val": 1, "test": 3}, "validation clips are training clips"
    (sounds / "t.csv").write_text("file,caption,split\n0.wav,rain,train\n1.wav,wind,fold 3")
    with pytest.raises(ValueError, match=r"column 'split' says 'fold 3' of '1.wav', but has to say one of"):
        found(sounds)
    assert not found(sounds, TableFormat(split_column=None)).splits
    (sounds / "t.csv").write_text("file,caption,split\n0.wav,rain,test\n1.wav,wind,test")
    with pytest.raises(ValueError, match="no clip is for training"):
        _ = FolderData(sounds, seconds=0.05).datasets


def encoded(index: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(800, index / 10), 16000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def level(data: FolderData, split: str) -> list[float]:
    """How loud the first clips of a split are, which tells one from another."""
    dataset = data.ordered_dataloader(split).dataset
    levels = [round(float(dataset[item]["waveform"].max()), 3) for item in range(len(dataset))]
    return list(dict.fromkeys(levels))[:3]


def test_parquet_with_paths_and_with_bytes(sounds):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [["rain", "it rains"], *([f"said {index}"] for index in range(1, 8))]
    paths = pyarrow.table({"path": NAMES, "captions": texts})
    parquet.write_table(paths, sounds / "t.parquet")
    recordings = found(sounds)
    assert [clip.captions for clip in recordings.clips[:2]] == [("rain", "it rains"), ("said 1",)]
    options = {"seconds": 0.05, "check": "decode"}
    from_paths = level(FolderData(sounds, **options), "all")

    rows = [
        {
            "audio": {"bytes": encoded(index), "path": None},
            "text": f"said {index}",
            "clip_id": f"take {index}",
        }
        for index in range(8)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), sounds / "t.parquet")
    recordings = found(sounds)
    assert recordings.columns.filename == "audio"
    assert [clip.group for clip in recordings.clips[:2]] == ["take 0", "take 1"]
    assert level(FolderData(sounds, **options), "all") == pytest.approx(from_paths, abs=1e-3)

    rows[5]["clip_id"] = None
    parquet.write_table(pyarrow.Table.from_pylist(rows), sounds / "t.parquet")
    with pytest.raises(ValueError, match=r"row 5: column 'clip_id' is empty. Fill it or remove the row"):
        found(sounds)
    rows[5]["clip_id"] = "nan"
    parquet.write_table(pyarrow.Table.from_pylist(rows), sounds / "t.parquet")
    with pytest.raises(ValueError, match=r"row 5: column 'clip_id' says 'nan'. Fill it or remove the row"):
        found(sounds)
    (sounds / "t.parquet").write_bytes((sounds / "t.parquet").read_bytes()[:200])
    with pytest.raises(ValueError, match="not a parquet file, or one that was cut short"):
        found(sounds)


@pytest.mark.parametrize("cells", ["paths", "bytes", "both"])
def test_parquet_with_large_texts_as_pandas_and_polars_write_them(sounds, cells):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    texts, contents = pyarrow.large_string(), pyarrow.large_binary()
    audio = {
        "paths": pyarrow.array(NAMES, texts),
        "bytes": pyarrow.array([encoded(index) for index in range(8)], contents),
        "both": pyarrow.array(
            [{"bytes": encoded(index), "path": name} for index, name in enumerate(NAMES)],
            pyarrow.struct([("bytes", contents), ("path", texts)]),
        ),
    }
    captions = pyarrow.array([f"said {index}" for index in range(8)], texts)
    parquet.write_table(pyarrow.table({"audio": audio[cells], "caption": captions}), sounds / "t.parquet")
    assert [clip.captions[0] for clip in found(sounds).clips] == captions.to_pylist()
    data = FolderData(sounds, seconds=0.05, check="decode")
    assert level(data, "all") == pytest.approx([0.0, 0.1, 0.2], abs=1e-3)


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_a_local_dataset_in_place_of_the_hub(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    place = tmp_path / "dataset"

    def part(first: int, count: int):
        rows = range(first, first + count)
        audio = [{"bytes": encoded(index), "path": f"{index}.wav"} for index in rows]
        made = datasets.Dataset.from_dict({"recording": audio, "text": [f"said {index}" for index in rows]})
        return made.cast_column("recording", datasets.Audio(decode=False))

    parts = datasets.DatasetDict({"train": part(0, 4), "validation": part(4, 3), "test": part(6, 3)})
    if form == "saved":
        parts.save_to_disk(place)
    else:
        place.mkdir()
        for name, rows in parts.items():
            rows.to_parquet(place / f"{name}-00000-of-00001.parquet")
    data = FolderData(hub=str(place), seconds=0.05)
    sizes = {split: len(rows.clips) for split, rows in data.datasets.items()}
    assert sizes == {"train": 4, "val": 3, "test": 3}
    assert level(data, "val") == [0.4, 0.5, 0.6]
    assert data.datasets["test"].clips[1].captions == ("said 7",)
    common = part(0, 2)
    datasets.DatasetDict({"train": common, "test": common}).save_to_disk(tmp_path / "leak")
    with pytest.warns(UserWarning, match="2 validation and test clips have the audio of a training clip"):
        read_recordings(None, None, str(tmp_path / "leak"), TableFormat())


def saved(place: Path, audio: list[tuple[int, str]], **columns: object) -> Path:
    """A dataset of the hub as `save_to_disk` writes it, with a sound and a name in each row."""
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encoded(index), "path": name} for index, name in audio]
    made = datasets.Dataset.from_dict({"audio": cells, **columns})
    made = made.cast_column("audio", datasets.Audio(decode=False))
    for name in {"label", "split"} & set(columns):
        made = made.cast_column(name, datasets.ClassLabel(names=["train", "test"]))
    made.save_to_disk(place)
    return place


def test_a_split_of_a_dataset_that_is_replaced_alone_misses_the_cache(tmp_path):
    folder = tmp_path / "dataset"
    saved(folder / "train", [(index, f"{index}.wav") for index in range(4)], text=list("abcd"))
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')

    def heard_in_test(first: int) -> list[float]:
        shutil.rmtree(folder / "test", ignore_errors=True)
        audio = [(first + index, f"{first + index}.wav") for index in range(2)]
        saved(folder / "test", audio, text=["e", "f"])
        os.utime(next((folder / "test").glob("*.arrow")), (first, first))
        data = FolderData(
            hub=str(folder), fractions=(0.5, 0.25, 0.25), seconds=0.05, cache=tmp_path / "cache"
        )
        return level(data, "test")

    assert heard_in_test(4) == [0.4, 0.5]
    assert heard_in_test(6) == [0.6, 0.7]


def test_the_same_audio_under_two_names_is_one_clip(tmp_path):
    audio = [(0, "a.wav"), (1, "b.wav"), (0, "copy.wav"), (2, "b.wav"), (2, "other.wav")]
    place = saved(
        tmp_path / "d", audio, text=["rain", "wind", "it rains", "dog", "bark"], split=[0, 0, 0, 1, 1]
    )
    recordings = read_recordings(None, None, str(place), TableFormat())
    assert [(clip.name, clip.captions, recordings.splits[clip.key]) for clip in recordings.clips] == [
        ("a.wav", ("rain", "it rains"), "train"),
        ("b.wav", ("wind",), "train"),
        ("b.wav#3", ("dog", "bark"), "test"),
    ]


@pytest.mark.parametrize("table", ["t.csv", "t.parquet"])
def test_all_names_of_a_file_are_one_clip(sounds, table):
    (sounds / "link.wav").symlink_to(sounds / "0.wav")
    names = ["0.wav", "./0.wav", str(sounds / "0.wav"), "link.wav", str(sounds / "1.wav"), "1.wav"]
    if table == "t.csv":
        (sounds / table).write_text(
            "\n".join(["file,text", *(f"{name},{i}" for i, name in enumerate(names))])
        )
    else:
        pytest.importorskip("datasets")
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"file": names, "text": list("012345")}), sounds / table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clips = found(sounds).clips
    assert [clip.key for clip in clips] == ["file:0.wav", "file:1.wav"]
    assert [clip.captions for clip in clips] == [("0", "1", "2", "3"), ("4", "5")]


def test_a_link_in_a_folder_without_a_table_is_another_name_of_its_file(sounds):
    (sounds / "a dog.wav").symlink_to(sounds / "7.wav")
    with pytest.warns(UserWarning, match="the names of its 8 audio files are their captions"):
        clips = found(sounds).clips
    assert [clip.captions for clip in clips if clip.path == "7.wav"] == [("7", "a dog")]


def test_cells_of_captions_that_hold_no_texts(tmp_path):
    audio = [(0, "a.wav"), (1, "b.wav")]

    def captions(place: str, **columns: object) -> list[tuple[str, ...]]:
        form = TableFormat(caption_columns=list(columns))
        return [
            clip.captions
            for clip in read_recordings(
                None, None, str(saved(tmp_path / place, audio, **columns)), form
            ).clips
        ]

    nan = float("nan")
    assert captions("none", text=[["rain", None], ["wind", "storm"]]) == [("rain",), ("wind", "storm")]
    assert captions("nan", text=["rain", "wind"], text_2=[nan, nan]) == [("rain",), ("wind",)]
    assert captions("class", label=[0, 1]) == [("train",), ("test",)]
    for place, cell in (("number", 3), ("mapping", {"en": "rain"}), ("list", [4])):
        with pytest.raises(ValueError, match=r"row 0: column 'text' has to hold a caption or a list of capt"):
            captions(place, text=[cell, cell])


def test_the_same_audio_with_two_clip_ids_is_refused(tmp_path):
    place = saved(tmp_path / "d", [(0, "a.wav"), (0, "a.wav")], text=["rain", "wind"], clip_id=[1, 2])
    with pytest.raises(ValueError, match=r"row 1: the audio 'a.wav' has the clip id '2', but had '1' above"):
        read_recordings(None, None, str(place), TableFormat())
    form = TableFormat(clip_id_column=None)
    assert len(read_recordings(None, None, str(place), form).clips) == 1


@pytest.mark.parametrize("name", ["1.wav", "./1.wav"])
def test_a_file_in_two_splits_is_refused(sounds, name):
    rows = ["0.wav,rain,train", "1.wav,wind,train", f"{name},a storm,test", "2.wav,dog,val"]
    (sounds / "t.csv").write_text("\n".join(["file,caption,split", *rows]))
    with pytest.raises(ValueError, match=rf"line 4: '{name}' is in the split 'test', but was in 'train' abo"):
        found(sounds)

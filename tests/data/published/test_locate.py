"""Annotation files are found by name, or given."""

import json
import shutil

import pytest

from ask_lightning.data import (
    AudioCapsData,
    ClothoData,
    WavCaps,
)
from ask_lightning.data.published.locate import SPLIT_WORDS, find_metadata_table
from tests.helpers.published import audiocaps, clotho


def test_annotation_files_are_found_by_name_or_given(roots):
    root = roots / "audiocaps"
    (root / "dataset").mkdir()
    for name in ("train.csv", "val.csv"):
        (root / name).rename(root / "dataset" / name)
    (root / "test.csv").rename(root / "audiocaps_test.csv")
    assert set(audiocaps(roots).datasets) == {"train", "val", "test"}
    (root / "dataset" / "train_fixed.csv").write_text("not for us")
    assert len(audiocaps(roots).datasets["train"]) == 8, "the plain name wins"
    (root / "dataset2.0").mkdir()
    shutil.copy(root / "dataset" / "train.csv", root / "dataset2.0" / "train.csv")
    with pytest.raises(
        ValueError, match=r"several files could be the train split: dataset/train.csv, dataset2.0/train"
    ):
        _ = audiocaps(roots).datasets
    assert len(audiocaps(roots, annotations={"train": "dataset2.0/train.csv"}).datasets["train"]) == 8
    with pytest.raises(FileNotFoundError, match=r"There is nothing at .*none.csv. Pass the path of a file"):
        _ = audiocaps(roots, annotations={"train": "none.csv"}).datasets
    (root / "train.tsv").touch()
    with pytest.raises(
        ValueError, match=r"train.tsv: the ending has to be one of .h5, .hdf5, .parquet, .csv, .json"
    ):
        _ = audiocaps(roots, annotations={"train": "train.tsv"}).datasets


def test_no_dataset(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no annotations of a split. Looked for .*as `annotations`, by split"
    ):
        _ = AudioCapsData(tmp_path).datasets
    with pytest.raises(FileNotFoundError, match=r"no folder of a dataset at .*none"):
        _ = ClothoData(tmp_path / "none").datasets
    with pytest.raises(
        FileNotFoundError, match=r"there is no JSON of WavCaps below it. Looked for as_final.json"
    ):
        WavCaps(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder of WavCaps at"):
        WavCaps(tmp_path / "none")


def test_the_table_of_metadata_is_the_twin_of_that_of_captions(tmp_path):
    """DCASE's table of its own test split lies in the same folder."""
    names = ("clotho_metadata_evaluation.csv", "clotho_metadata_test.csv", "clotho_captions_evaluation.csv")
    for name in names:
        (tmp_path / name).touch()
    found = find_metadata_table(tmp_path / "clotho_captions_evaluation.csv", SPLIT_WORDS["test"])
    assert found.name == "clotho_metadata_evaluation.csv"
    with pytest.warns(
        UserWarning, match=r"Clotho_val.json: several tables .*evaluation.csv, clotho_metadata_t"
    ):
        assert find_metadata_table(tmp_path / "Clotho_val.json", SPLIT_WORDS["test"]) is None
    (tmp_path / names[0]).unlink()
    found = find_metadata_table(tmp_path / "clotho_captions_evaluation.csv", SPLIT_WORDS["test"])
    assert found.name == "clotho_metadata_test.csv"
    assert find_metadata_table(tmp_path / "clotho_captions_evaluation.csv", SPLIT_WORDS["val"]) is None


def test_clotho_with_the_metadata_of_dcase_beside_it(roots):
    (metadata,) = (roots / "clotho").rglob("clotho_metadata_evaluation.csv")
    shutil.copy(metadata, metadata.with_name("clotho_metadata_test.csv"))
    clips = clotho(roots).datasets["test"].clips
    assert all(clip.key.startswith("freesound:") for clip in clips)


def test_clotho_from_a_json(roots):
    """Every clip is found by its title, and is known by its FreeSound id."""
    root = roots / "clotho"
    expected = clotho(roots).datasets["val"].clips
    (table,) = root.rglob("clotho_captions_validation.csv")
    entries = []
    for clip in expected:
        captions = {f"caption_{number}": text for number, text in enumerate(clip.captions, start=1)}
        number = clip.key.partition(":")[2]
        entries.append({"id": number, "wav": f"Clotho/waveforms/val/{clip.name}", **captions})
    entries[0]["id"] = entries[1]["id"] = "Not found"
    for path in root.rglob("*_validation.csv"):
        path.unlink()
    table.with_name("Clotho_val.json").write_text(json.dumps({"data": entries}))
    found = clotho(roots).datasets["val"].clips
    assert [clip.captions for clip in found] == [clip.captions for clip in expected]
    assert [clip.key for clip in found[2:]] == [clip.key for clip in expected[2:]]
    assert all(clip.key.startswith("file:") for clip in found[:2])

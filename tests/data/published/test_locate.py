"""Annotation files are found by name, or given."""

import shutil

import pytest

from ask_lightning.data import (
    AudioCapsData,
    ClothoData,
    WavCaps,
)
from tests.helpers.published import audiocaps


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

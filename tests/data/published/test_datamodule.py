"""The data modules on synthetic copies of the datasets: layouts, missing clips, counts."""

import shutil
import warnings

import pytest
import torch

from ask_lightning.data import (
    AudioCapsData,
    AudioFileError,
    ClothoData,
    WavCaps,
)
from tests.helpers.published import audiocaps, clotho, wavcaps


def test_audiocaps_batches(written):
    data = audiocaps(written)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["waveform"].shape == (4, 16000)
    assert batch["waveform"].dtype == torch.float32
    assert batch["num_samples"].tolist() == [16000] * 4
    assert batch["clip_id"].unique().numel() == 4
    ids = torch.cat([batch["clip_id"] for batch in data.val_dataloader()])
    assert ids.tolist() == [number for number in ids[::5].tolist() for _ in range(5)]
    assert ids.unique().numel() == 3
    assert sum(len(batch["caption"]) for batch in data.test_dataloader()) == 10


def test_clotho_batches_are_whole_clips(written):
    data = clotho(written)
    assert len(data.datasets["train"]) == 40
    batches = list(data.val_dataloader())
    lengths = torch.cat([batch["num_samples"] for batch in batches])
    assert lengths.unique().numel() > 1
    for batch in batches:
        assert batch["waveform"].shape[1] == batch["num_samples"].max()
        for waveform, length in zip(batch["waveform"], batch["num_samples"], strict=True):
            assert waveform[length:].abs().sum() == 0
    cropped = clotho(written, train_crop="random", seconds=0.5, eval_seconds=0.3, eval_crop="center")
    assert cropped.datasets["train"][0]["waveform"].shape == (16000,)
    assert cropped.datasets["val"][0]["waveform"].shape == (9600,)


def test_only_the_splits_of_a_stage_are_read(written):
    data = audiocaps(written)
    data.setup("test")
    assert list(data.reports) == ["test"]
    data.setup("fit")
    assert set(data.reports) == {"train", "val", "test"}
    assert data.report().splitlines()[2] == "| AudioCaps test | 2 / 10 | ? | 2 / 10 | 0 |"


def test_missing_clips_are_counted_and_training_goes_on(roots):
    for path in sorted((roots / "audiocaps" / "audio" / "train").iterdir())[:3]:
        path.unlink()
    data = audiocaps(roots)
    with pytest.warns(UserWarning, match=r"AudioCaps train: 3 clips have no audio \("):
        data.setup("fit")
    assert len(data.datasets["train"]) == 5
    report = data.reports["train"]
    assert (report.listed_clips, report.clips, len(report.missing)) == (8, 5, 3)
    assert dict(report.variants) == {"Y{youtube_id}": 5}
    assert len(next(iter(data.train_dataloader()))["caption"]) == 4
    with pytest.raises(AudioFileError, match=r"3 of 8 clips of AudioCaps train have no file there"):
        _ = audiocaps(roots, strict=True).datasets["train"]


def test_the_log_says_what_was_found(written, said):
    audiocaps(written).setup("validate")
    (line,) = said
    assert line == (
        "AudioCaps val: 3 clips with 15 captions listed; 3 clips with 15 captions in use, 0 without audio; "
        "files named Y{youtube_id}: 3"
    )


def test_all_missing_says_what_was_looked_for(roots):
    folder = roots / "audiocaps" / "audio" / "val"
    for path in list(folder.iterdir()):
        path.rename(path.with_name(f"clip-{path.name}"))
    with pytest.raises(AudioFileError) as caught:
        _ = audiocaps(roots).datasets["val"]
    message = str(caught.value)
    assert "3 of 3 clips of AudioCaps val have no file there" in message
    assert "It holds 13 audio files, such as audio/" in message
    assert "_30_40, " in message
    assert "Pass their folder as `audio_folder`" in message
    shutil.rmtree(roots / "clotho" / "clotho_audio_files" / "validation")
    with pytest.raises(
        AudioFileError, match=r"Looked for Field recording .*, 200000 with any ending of audio, but not"
    ):
        _ = clotho(roots).datasets["val"]
    shutil.rmtree(roots / "wavcaps" / "audio")
    with pytest.raises(
        AudioFileError, match=r"16 clips of WavCaps have no file there .*It holds 0 audio files"
    ):
        wavcaps(roots)


def test_the_folder_of_audio_may_be_elsewhere(roots, tmp_path):
    shutil.move(roots / "audiocaps" / "audio", tmp_path / "elsewhere")
    assert len(audiocaps(roots, audio_folder=str(tmp_path / "elsewhere")).datasets["val"]) == 15
    with pytest.raises(FileNotFoundError, match=r"no folder of audio files at .*none"):
        _ = audiocaps(roots, audio_folder="none").datasets["val"]


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


def test_the_json_files_of_wavcaps_for_other_datasets(roots):
    root = roots / "audiocaps"
    names = sorted(path.name for path in (root / "audio" / "val").iterdir())
    entries = ",".join(f'{{"id": "{name}", "caption_1": "a", "caption_2": "b"}}' for name in names)
    (root / "val.csv").unlink()
    (root / "val.json").write_text(f'{{"num_captions_per_audio": 2, "data": [{entries}]}}')
    assert len(audiocaps(roots).datasets["val"]) == 6


def test_counts_that_were_never_published_are_warned_about(written):
    with pytest.warns(
        UserWarning, match=r"8 clips with 8 captions are listed, but published are: version 1 49,838 clips"
    ):
        _ = audiocaps(written, check_counts=True).datasets["train"]
    with pytest.warns(
        UserWarning, match=r"WavCaps FreeSound: 4 clips with 4 captions are listed.* 262,300 clips"
    ):
        wavcaps(written, check_counts=True, collections=["FreeSound"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ = audiocaps(written).datasets["train"]
        wavcaps(written)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "zip"}, "`layout` has to be one of .*'auto', 'files', 'hdf5', 'parquet'.* but got 'zip'"),
        (
            {"train_crop": "left"},
            "`train_crop` has to be one of .*'random', 'center', 'full'.* but got 'left'",
        ),
        ({"eval_crop": "random"}, "`eval_crop` has to be one of .*'center', 'full'.* but got 'random'"),
        ({"eval_seconds": 0}, "`eval_seconds` has to be at least .*, but got 0"),
        (
            {"annotations": {"dev": "a"}},
            "`annotations` has to be one of .*'train', 'val', 'test'.* got 'dev'",
        ),
        ({"batch_size": 1}, "`batch_size` has to be an integer of at least 2, but got 1"),
    ],
)
def test_arguments_outside_their_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        AudioCapsData(tmp_path, **options)

"""The data modules, on synthetic copies of the datasets: layouts, counts, knowledge, and training on them."""

import json
import shutil
import warnings

import lightning as L
import pytest
import torch

import ask_lightning.data.published.counts as counts_module
import ask_lightning.data.published.knowledge as knowledge_module
from ask_lightning import ASKModule, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.data import (
    PUBLISHED,
    AudioCapsData,
    AudioFileError,
    AudioOptions,
    ClothoData,
    EnrichedCaptions,
    KnowledgeSource,
    SplitReport,
    WavCaps,
    leaked_ids,
    read_audiocaps,
    write_audiocaps,
    write_clotho,
    write_wavcaps,
)
from ask_lightning.data.published.counts import log_report
from ask_lightning.models import TinyRetriever

SMALL = {"num_train": 8, "num_val": 3, "num_test": 2, "seconds": 0.8}


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The three datasets, written once."""
    folder = tmp_path_factory.mktemp("datasets")
    write_audiocaps(folder / "audiocaps", **SMALL)
    write_clotho(folder / "clotho", **SMALL)
    write_wavcaps(folder / "wavcaps", num_clips=16, seconds=0.8)
    return folder


@pytest.fixture
def roots(written, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(written, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def said(monkeypatch):
    """The lines of the log."""
    lines = []
    for module in (counts_module, knowledge_module):
        monkeypatch.setattr(module, "rank_zero_info", lines.append)
    return lines


def audiocaps(folder, **options):
    return AudioCapsData(
        folder / "audiocaps", **{"seconds": 0.5, "batch_size": 4, "check_counts": False, **options}
    )


def clotho(folder, **options):
    return ClothoData(folder / "clotho", **{"batch_size": 4, "check_counts": False, **options})


def wavcaps(folder, **options):
    return WavCaps(folder / "wavcaps", AudioOptions(seconds=0.5), **{"check_counts": False, **options})


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


@pytest.mark.parametrize("enriched", [False, True])
def test_the_knowledge_has_no_missing_clips(roots, enriched):
    files = sorted((roots / "audiocaps" / "audio" / "train").iterdir())
    files[0].unlink()
    files[1].write_bytes(b"no audio")
    options = {}
    if enriched:
        captions = {
            clip.key: ["in other words"] for clip in read_audiocaps(roots / "audiocaps" / "train.csv")
        }
        (roots / "enriched.json").write_text(json.dumps(captions))
        options["enriched"] = EnrichedCaptions(roots / "enriched.json")
    with pytest.warns(UserWarning, match="1 clips have no audio|Left out 1 clips"):
        knowledge = audiocaps(roots, **options).knowledge_dataset()
    assert len(knowledge) == 6
    captions = {knowledge[row]["caption"] for row in range(len(knowledge))}
    assert (captions == {"in other words"}) == enriched


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
    ("split", "clips", "captions", "publication"),
    [
        ("train", 49_838, 49_838, "version 1"),
        ("train", 49_274, 49_274, "ML-ACT"),
        ("train", 60_000, 91_256, "version 2"),
        ("val", 495, 2_475, "version 1 and 2"),
        ("val", 494, 2_470, "ML-ACT"),
        ("test", 975, 4_875, "version 1 and 2"),
        ("test", 957, 4_785, "ML-ACT"),
        ("test", 957, 4_784, None),
    ],
)
def test_published_counts_are_recognised(split, clips, captions, publication, recwarn):
    report = SplitReport("AudioCaps", split, clips, captions, clips, captions)
    assert report.publication == publication
    log_report(report)
    assert len(recwarn.list) == (publication is None)
    assert ("published are" in str(recwarn.list[0].message)) if recwarn.list else True


def test_published_counts_agree_with_each_other():
    for (dataset, split), publications in PUBLISHED.items():
        for clips, captions in publications.values():
            several = 1 if dataset == "WavCaps" or (dataset, split) == ("AudioCaps", "train") else 5
            assert clips is None or captions == several * clips
    assert sum(PUBLISHED["WavCaps", name]["WavCaps"][1] for _, name in PUBLISHED if _ == "WavCaps") == 403_050


def test_the_knowledge_of_the_training_set_has_no_random_crops(written):
    data = audiocaps(written)
    source = data.knowledge_dataset()
    assert source is data.knowledge_dataset()
    assert [item["clip_id"] for item in source] == [item["clip_id"] for item in data.datasets["train"]]
    before = source[0]["waveform"]
    source.set_epoch(5)
    data.datasets["train"].set_epoch(5)
    assert torch.equal(source[0]["waveform"], before)
    assert not torch.equal(data.datasets["train"][0]["waveform"], before)


def test_wavcaps_as_knowledge_without_evaluation_clips(written, said):
    for data, key in (
        (audiocaps(written, knowledge=KnowledgeSource(written / "wavcaps")), "youtube:"),
        (clotho(written, knowledge=KnowledgeSource(written / "wavcaps")), "freesound:200000"),
    ):
        source = data.knowledge_dataset()
        assert isinstance(source, WavCaps)
        assert len(source) == 15
        left_out = "Left out of the knowledge: 1 of 16 clips that validation or test sets hold"
        assert said[-1].startswith(f"{left_out} ({key}")
        evaluation = {clip.key for split in ("val", "test") for clip in data.datasets[split].clips}
        assert not evaluation & {clip.key for clip in source.clips}


def test_knowledge_that_is_all_evaluation_clips(roots):
    shutil.copy(roots / "audiocaps" / "train.csv", roots / "audiocaps" / "val.csv")
    with pytest.raises(
        ValueError, match=r"All 8 clips of the knowledge are validation or test clips. Pass anot"
    ):
        audiocaps(roots).knowledge_dataset()


def test_evaluation_clips_in_the_knowledge_are_warned_about(written):
    data = audiocaps(written, knowledge=KnowledgeSource(written / "wavcaps", exclude_evaluation=False))
    with pytest.warns(
        UserWarning, match=r"of 16 clips 1 by id \(youtube:.*`exclude_evaluation=True` of a data mod"
    ):
        assert len(data.knowledge_dataset()) == 16


def test_captions_of_evaluation_clips_in_the_knowledge_are_warned_about(roots):
    table = roots / "audiocaps" / "train.csv"
    first = read_audiocaps(roots / "audiocaps" / "test.csv")[0].captions[0]
    rows = table.read_text().splitlines()
    rows[1] = ",".join([*rows[1].split(",")[:3], f'"{first.upper()}!"'])
    table.write_text("\n".join(rows))
    with pytest.warns(UserWarning, match=r"1 of 8 clips of the knowledge have the words of .*stay in it"):
        assert len(audiocaps(roots).knowledge_dataset()) == 8


def test_evaluation_clips_of_another_dataset_can_be_held_out(written):
    data = audiocaps(written, knowledge=KnowledgeSource(written / "wavcaps"))
    data.hold_out(clotho(written).evaluation_clips())
    kept = {clip.key for clip in data.knowledge_dataset().clips}
    assert len(kept) == 14
    assert not kept & {clip.key for clip in clotho(written).evaluation_clips()}
    with pytest.raises(RuntimeError, match="`hold_out` comes too late: `knowledge_dataset` has been called"):
        data.hold_out([])


def test_ids_to_exclude_can_be_written_down_and_read(written, tmp_path):
    evaluation = [clotho(written).datasets[split] for split in ("val", "test")]
    ids = leaked_ids(wavcaps(written), *evaluation)
    assert ids == ["freesound:200000"]
    (tmp_path / "exclude.txt").write_text("\n".join(ids))
    for exclude in (ids, str(tmp_path / "exclude.txt")):
        source = wavcaps(written, exclude=exclude)
        assert len(source) == 15
        assert leaked_ids(source, *evaluation) == []


def test_lists_for_training_and_for_knowledge_are_two(written):
    keys = [clip.key for clip in audiocaps(written).datasets["train"].clips]
    data = audiocaps(written, exclude=keys[:2], knowledge=KnowledgeSource(exclude=keys[:3]))
    assert len(data.datasets["train"]) == 6
    assert len(data.knowledge_dataset()) == 5


def test_one_recording_has_one_clip_id_in_batches_and_knowledge(written):
    source = wavcaps(written)
    evaluation = {item["clip_id"] for item in audiocaps(written).datasets["val"]}
    assert len(evaluation & {item["clip_id"] for item in source}) == 1
    evaluation = {item["clip_id"] for item in clotho(written).datasets["val"]}
    assert len(evaluation & {item["clip_id"] for item in source}) == 1


@pytest.mark.parametrize(
    ("place", "mode", "train", "knowledge"),
    [("knowledge", "replace", 8, 9), ("train", "add", 10, 8), ("both", "add", 10, 10)],
)
def test_enriched_captions_go_where_they_should(written, tmp_path, place, mode, train, knowledge):
    clips = audiocaps(written).datasets["train"].clips
    path = tmp_path / "enriched.json"
    path.write_text(f'{{"Y{clips[0].name}.wav": ["one new caption", "another"]}}')
    data = audiocaps(written, enriched=EnrichedCaptions(path, mode, place))
    with pytest.warns(UserWarning, match="captions for 1 of 8 clips of AudioCaps train") as caught:
        data.knowledge_dataset()
    assert len(caught) == 1
    assert (len(data.datasets["train"]), len(data.knowledge_dataset())) == (train, knowledge)
    texts = [item["caption"] for item in data.knowledge_dataset()]
    assert ("another" in texts) == (place != "train")


def test_collections_of_wavcaps(written):
    assert {clip.collection for clip in wavcaps(written, collections=["SoundBible", "FreeSound"]).clips} == {
        "SoundBible",
        "FreeSound",
    }
    with pytest.raises(
        ValueError, match=r"`collections` has to hold some of AudioSet_SL, .* but got 'FreeSounds'"
    ):
        wavcaps(written, collections=["FreeSounds"])


def test_a_collection_that_is_not_there(roots):
    (roots / "wavcaps" / "json_files" / "FreeSound" / "fsd_final.json").unlink()
    assert len(wavcaps(roots)) == 12
    with pytest.raises(
        FileNotFoundError, match=r"there is no fsd_final.json of the collection FreeSound below"
    ):
        wavcaps(roots, collections=["FreeSound"])


def test_numbers_of_two_collections_do_not_mix(roots):
    audio = roots / "wavcaps" / "audio"
    (audio / "SoundBible" / "1.flac").rename(audio / "FreeSound" / "1.flac")
    with pytest.warns(UserWarning, match=r"WavCaps SoundBible: 1 clips have no audio \(1\)"):
        assert len(wavcaps(roots)) == 15


class Trained(TinyRetriever):
    def __init__(self):
        super().__init__(width=8, sample_rate=32000)
        self.seen = []

    def encode_audio(self, batch):
        self.seen.append(batch["clip_id"].tolist())
        return super().encode_audio(batch)


@pytest.mark.parametrize("make", [audiocaps, clotho])
@pytest.mark.parametrize("knowledge", ["train", "wavcaps"])
def test_training_with_ask(written, make, knowledge):
    data = make(written, knowledge=KnowledgeSource(written / "wavcaps" if knowledge == "wavcaps" else None))
    loss = ReliabilityOTLoss(num_neighbors=3)
    model = Trained()
    wrapped = ASKModule(model, loss, ids="clip_id")
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=2,
        num_sanity_val_steps=0,
        callbacks=[KnowledgeRefreshCallback(source=data.knowledge_dataset, num_prototypes=4)],
    )
    trainer.fit(wrapped, datamodule=data)
    assert loss.knowledge.fine.audio.shape[0] == len(data.knowledge_dataset())
    known = set(loss.knowledge.ids.tolist())
    assert known == {item["clip_id"] for item in data.knowledge_dataset()}
    if knowledge == "train":
        assert {number for batch in model.seen for number in batch} >= known


def test_writing_is_fast_and_the_same_each_time(written, tmp_path):
    again = write_audiocaps(tmp_path, **SMALL)
    for path in again.rglob("*.*"):
        assert path.read_bytes() == (written / "audiocaps" / path.relative_to(again)).read_bytes()
    other = write_audiocaps(tmp_path / "other", **SMALL, seed=1)
    assert (other / "val.csv").read_text() != (again / "val.csv").read_text()
    with pytest.raises(
        ValueError, match=r"`num_clips` has to be at least 4 and 4 × `overlap`, but got 3 and 1"
    ):
        write_wavcaps(tmp_path, num_clips=3)


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

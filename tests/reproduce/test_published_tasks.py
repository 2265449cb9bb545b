"""AudioCaps and Clotho as tasks: the paper's schedule, knowledge without evaluation clips, small runs."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from ask_lightning.models import CEDSonar, ResNet38BERT, TinyRetriever
from ask_lightning.reproduce.artifacts.entries import ASK, NT_XENT, ask_with_sources, by_tokens
from ask_lightning.reproduce.study import Study
from ask_lightning.reproduce.tasks import audiocaps_task, clotho_task
from ask_lightning.reproduce.training import recalls_elsewhere

BACKBONES = {"resnet38_bert": ResNet38BERT, "ced_sonar": CEDSonar, "tiny": TinyRetriever}


@pytest.fixture(scope="module")
def datasets(demo):
    return Path(demo.removeprefix("--demo="))


def small_audiocaps(datasets, **options):
    small = {
        "enriched": datasets / "AudioCaps" / "enriched.csv",
        "wavcaps": datasets / "WavCaps",
        "transfer_root": datasets / "Clotho",
        "shrunken": True,
        "max_epochs": 1,
        "accelerator": "cpu",
    }
    return audiocaps_task(datasets / "AudioCaps", **small | options)


def small_clotho(datasets, **options):
    small = {"shrunken": True, "max_epochs": 1, "accelerator": "cpu"}
    return clotho_task(datasets / "Clotho", **small | options)


def keys(clips):
    return {clip.key for clip in clips}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_schedule_is_the_papers(datasets, backbone):
    audiocaps = audiocaps_task(datasets / "AudioCaps", backbone=backbone)
    clotho = clotho_task(datasets / "Clotho", backbone=backbone)
    assert (audiocaps.name, clotho.name) == ("audiocaps", "clotho")
    assert (audiocaps.description["batch_size"], clotho.description["batch_size"]) == (32, 24)
    for task in (audiocaps, clotho):
        assert task.description["backbone"] == backbone
        assert task.accelerator == "auto"
        assert task.max_epochs == {"resnet38_bert": 50}.get(backbone, 10)
        assert task.learning_rate == {"tiny": 2e-3}.get(backbone, 5e-5)
        assert task.refresh["T"] == {"tiny": 3}.get(backbone, 15)
        assert task.refresh["num_prototypes"] == 512
        assert task.trainer_options == ({"gradient_clip_val": 2.0} if backbone == "resnet38_bert" else {})
        assert not task.knowledge_sources
        assert not task.transfer
        options = task.make_model.__self__.kind.keywords
        assert task.make_model.__self__.kind.func is BACKBONES[backbone]
        assert options.get("decay_epochs") == {"resnet38_bert": 20, "ced_sonar": 4}.get(backbone)
    if backbone == "resnet38_bert":
        assert options["audio_weights"] == "weights/ResNet38_mAP=0.434.pth"
        given = audiocaps_task(datasets / "AudioCaps", audio_weights="mine.pth", text_weights="mine")
        assert given.make_model.__self__.kind.keywords["audio_weights"] == "mine.pth"
        assert given.make_model.__self__.kind.keywords["text_weights"] == "mine"


@pytest.mark.parametrize(
    "backbone", ["resnet38_bert", "tiny", pytest.param("ced_sonar", marks=pytest.mark.slow)]
)
def test_losses_knowledge_tokens_and_transfer(datasets, backbone, tmp_path):
    task = small_audiocaps(datasets, backbone=backbone, pretraining_folder=tmp_path, T=1)
    study = Study(task, tmp_path / "runs", seeds=[0], num_candidates=1, log=lambda line: None)
    entries = [
        NT_XENT,
        ASK,
        *ask_with_sources(task).values(),
        by_tokens("GPA + ASK", "prototypes", plain=False),
        by_tokens("FLAM", "frames", plain=True),
    ]
    trained = study.train(entries)
    assert list(ask_with_sources(task)) == ["WavCaps", "training clips, other captions"]
    assert len(trained) == 6
    validation = [dict(one.runs[0].metrics.validation) for one in trained.values()]
    assert all(0 <= recall <= 1 for recalls in validation for recall in recalls.values())
    (run,) = trained["ASK"].runs
    assert list(task.transfer) == ["Clotho"]
    data = task.transfer["Clotho"](0)
    recalls = recalls_elsewhere(lambda: trained["ASK"].method.build(run.settings), data, folder=run.folder)
    assert recalls != pytest.approx(dict(run.metrics.test))


def test_models_are_shrunken_and_begin_alike(datasets, tmp_path):
    for backbone, kind in BACKBONES.items():
        task = small_audiocaps(datasets, backbone=backbone, pretraining_epochs=0)
        model = task.make_model(0.5)
        assert type(model) is kind
        assert model.learning_rate == 0.5
        assert sum(weights.numel() for weights in model.parameters()) < 1_000_000
    task = small_audiocaps(datasets, backbone="tiny", pretraining_epochs=1, pretraining_folder=tmp_path)
    lines = []
    task.prepare(lines.append)
    assert len(lines) == 1
    one, other = task.make_model(1e-3).state_dict(), task.make_model(1e-3).state_dict()
    assert all(torch.equal(values, other[name]) for name, values in one.items())


def test_evaluation_clips_of_both_datasets_are_in_no_knowledge(datasets):
    task = small_audiocaps(datasets)
    parts = task.make_data(0).datasets
    elsewhere = task.transfer["Clotho"](0).datasets["test"].clips
    assert len(elsewhere) == 6
    evaluated = keys(parts["val"].clips) | keys(parts["test"].clips) | keys(elsewhere)
    trained = {clip.key: clip for clip in parts["train"].clips}
    assert evaluated.isdisjoint(trained)
    wavcaps, captions = (make() for make in task.knowledge_sources.values())
    assert evaluated.isdisjoint(keys(wavcaps.clips))
    assert evaluated.isdisjoint(keys(captions.clips))
    # Of 24 clips one is a validation clip of AudioCaps, another one of Clotho.
    assert len(wavcaps.clips) == 22
    (alone,) = [
        make()
        for make in small_audiocaps(datasets, transfer_root=None, enriched=None).knowledge_sources.values()
    ]
    assert len(alone.clips) == 23
    assert keys(captions.clips) == set(trained)
    assert all(clip.captions != trained[clip.key].captions for clip in captions.clips)
    assert all(clip.captions[0].startswith("a recording in which") for clip in captions.clips)


def test_training_clips_that_are_tested_are_no_knowledge(datasets, tmp_path):
    root = shutil.copytree(datasets / "Clotho", tmp_path / "Clotho")
    metadata = root / "clotho_csv_files" / "clotho_metadata_development.csv"
    metadata.write_text(metadata.read_text().replace("100000", "300000"))  # the first evaluation clip
    task = clotho_task(root, enriched=root / "enriched.csv", shrunken=True)
    with pytest.warns(UserWarning, match="1 of 6 training clips are validation or test clips"):
        parts = task.make_data(0).datasets
    (make,) = task.knowledge_sources.values()
    assert len(parts["train"].clips) == 6
    assert keys(make().clips) == keys(parts["train"].clips) - keys(parts["test"].clips)
    assert len(make().clips) == 5


def test_seeds_have_other_batches_and_other_crops(datasets):
    task = small_audiocaps(datasets, seconds=0.5)
    one, again, other = (task.make_data(seed) for seed in (0, 0, 1))
    batch, same, different = (next(iter(data.train_dataloader())) for data in (one, again, other))
    assert torch.equal(batch["waveform"], same["waveform"])
    assert batch["caption"] == same["caption"] != different["caption"]
    crops = [data.datasets["train"][3]["waveform"] for data in (one, other)]
    assert len(crops[0]) == 16000
    assert not torch.equal(*crops)
    assert one.datasets["val"] is other.datasets["val"]


def test_worker_processes_get_a_task_by_pickling(datasets, tmp_path):
    task = pickle.loads(pickle.dumps(small_audiocaps(datasets, pretraining_folder=tmp_path)))
    assert task.sizes() == "24 train, 30 val, 30 test"
    assert [len(make().clips) for make in task.knowledge_sources.values()] == [22, 24]
    assert task.make_token_model("frames", 1e-3).needs_tokens


@pytest.mark.slow
def test_two_processes_train_the_runs_of_one(datasets, tmp_path):
    def validation(jobs):
        task = small_clotho(datasets, backbone="tiny", pretraining_folder=tmp_path, pretraining_epochs=1)
        study = Study(task, tmp_path / str(jobs), seeds=[0, 1], num_candidates=1, jobs=jobs, log=str)
        return [dict(run.metrics.validation) for run in study.train([NT_XENT])["NT-Xent"].runs]

    assert validation(2) == validation(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enriched": Path("nowhere.csv")}, r"`enriched` has to be .* but got 'nowhere.csv'"),
        ({"wavcaps": Path("nowhere")}, r"`wavcaps` has to be"),
        ({"transfer_root": Path("nowhere")}, r"`transfer_root` has to be"),
        ({"backbone": "clap"}, r"`backbone` has to be one of .* but got 'clap'"),
        ({"audio_weights": "some.pth"}, r"`audio_weights` has to be left out"),
        (
            {"shrunken": False, "backbone": "tiny", "text_weights": "bert"},
            r"`text_weights` has to be left out",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_read(datasets, options, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        small_audiocaps(datasets, **options)


def test_missing_weights_are_told_before_the_first_run(datasets):
    task = audiocaps_task(datasets / "AudioCaps", audio_weights="nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        task.prepare(print)


def test_all_three_parts_are_needed(datasets, tmp_path):
    root = shutil.copytree(datasets / "AudioCaps", tmp_path / "AudioCaps")
    (root / "test.csv").unlink()
    with pytest.raises(FileNotFoundError, match="there are no annotations of test below it"):
        audiocaps_task(root, shrunken=True).make_data(0).setup("fit")
    task = small_clotho(datasets, transfer_root=root)
    with pytest.raises(FileNotFoundError, match="no annotations of a test part"):
        task.transfer["AudioCaps"](0).setup("test")

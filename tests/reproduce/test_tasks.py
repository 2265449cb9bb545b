"""Tasks: parts, other knowledge, other domains, and weights that all processes share."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from ask_lightning.data import EVENT_PROBABILITIES, Soundscapes
from ask_lightning.reproduce import compare_losses
from ask_lightning.reproduce.artifacts.entries import ask_with_sources
from ask_lightning.reproduce.study import Study
from ask_lightning.reproduce.tasks import (
    TASKS,
    captions_task,
    folder_task,
    quick_options,
    soundscapes_task,
)
from ask_lightning.reproduce.tasks import folder as folder_module

SMALL = {
    "scenes": 16,
    "test_scenes": 8,
    "pretraining_scenes": 16,
    "knowledge_scenes": 12,
    "pretraining_epochs": 1,
    "batch_size": 8,
    "max_epochs": 1,
    "T": 1,
    "num_prototypes": 4,
}


@pytest.fixture
def soundscapes(tmp_path):
    return soundscapes_task(**SMALL, pretraining_folder=tmp_path / "weights")


def equal(one, other):
    return all(torch.equal(values, other[name]) for name, values in one.items())


def test_weights_are_made_once_and_leave_the_random_streams_alone(soundscapes, tmp_path):
    lines = []
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    soundscapes.prepare(lines.append)
    assert torch.equal(torch.rand(2), expected)
    assert len(lines) == 1
    assert lines[0].startswith("Pretrained with NT-Xent for 1 epochs (")
    (file,) = (tmp_path / "weights").glob("*.pt")
    written = file.stat().st_mtime_ns
    # A worker process has the task by pickling.
    model = pickle.loads(pickle.dumps(soundscapes)).make_model(0.5)
    soundscapes.prepare(lines.append)
    assert (len(lines), file.stat().st_mtime_ns) == (1, written)
    assert model.learning_rate == 0.5
    assert equal(model.state_dict(), torch.load(file, weights_only=True))
    other = soundscapes_task(**SMALL | {"pretraining_seed": 1}, pretraining_folder=tmp_path / "weights")
    assert not equal(other.make_model(0.5).state_dict(), model.state_dict())
    assert len(list((tmp_path / "weights").glob("*.pt"))) == 2


@pytest.mark.parametrize("kind", ["prototypes", "frames"])
def test_token_models_have_the_pretrained_encoders(soundscapes, kind):
    plain = soundscapes.make_model(1e-3)
    model = soundscapes.make_token_model(kind, 1e-3)
    assert model.interaction is not None
    assert equal(plain.audio_encoder.state_dict(), model.audio_encoder.state_dict())
    assert equal(plain.text_encoder.state_dict(), model.text_encoder.state_dict())


def test_other_knowledge_is_no_training_pair(soundscapes):
    train = [soundscapes.make_data(0).datasets["train"][row] for row in range(16)]
    scenes, captions = (
        [source[row] for row in range(len(source))]
        for source in (make() for make in soundscapes.knowledge_sources.values())
    )
    assert (len(scenes), len(captions)) == (12, 48)
    assert not {item["clip_id"] for item in scenes} & {item["clip_id"] for item in train}
    assert not any(torch.equal(item["log_mel"], own["log_mel"]) for item in scenes for own in train)
    for item in captions:
        own = train[item["clip_id"]]
        assert torch.equal(item["log_mel"], own["log_mel"])
        assert item["caption"] != own["caption"]


def test_the_other_domain_has_other_scenes():
    soundscapes = soundscapes_task(**SMALL | {"test_scenes": 80})
    data = soundscapes.transfer["noisy soundscapes"](0)
    noisy, usual = data.datasets["test"], soundscapes.make_data(0).datasets["test"]
    assert list(data.datasets) == ["test"]
    assert not set(noisy.scenes) & set(usual.scenes)
    loudness = [np.mean([scene.ambience for scene in part.scenes]) for part in (noisy, usual)]
    assert 1.5 < loudness[0] / loudness[1] < 2.5
    rarity = [
        np.mean([EVENT_PROBABILITIES[name] for names in part.events for name in names])
        for part in (noisy, usual)
    ]
    assert rarity[0] < 0.5 * rarity[1]


def test_losses_are_compared_and_reported(soundscapes, tmp_path):
    lines = []
    options = {"num_candidates": 1, "seeds": [0, 1], "log": lines.append}
    report = compare_losses(soundscapes, ["NT-Xent", "ASK"], tmp_path / "out", **options)
    assert "minus NT-Xent" in report
    assert "minus Label smoothing" not in report
    assert lines[0].startswith("Pretrained")
    assert report in (tmp_path / "out" / "comparison.md").read_text()
    del lines[:]
    assert compare_losses(soundscapes, ["NT-Xent", "ASK"], tmp_path / "out", **options) == report
    assert lines == []


def test_a_loss_that_is_unknown(soundscapes, tmp_path):
    with pytest.raises(ValueError, match=r"`names` has to be one of .* but got 'NTXent'"):
        compare_losses(soundscapes, ["NTXent"], tmp_path)


@pytest.fixture
def folder(tmp_path):
    clips = Soundscapes(20, seconds=0.5, captions_per_clip=2)
    rows = ["filename,caption,other"]
    for number, captions in enumerate(clips.captions):
        soundfile.write(tmp_path / f"{number}.wav", clips[2 * number]["waveform"].numpy(), 16000)
        rows.append(f"{number}.wav,{','.join(text.replace(',', '') for text in captions)}")
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    return folder_task(
        tmp_path,
        tmp_path / "clips.csv",
        seconds=0.5,
        other_caption_columns=["other"],
        knowledge_annotations=tmp_path / "clips.csv",
        transfer_annotations=tmp_path / "clips.csv",
        pretraining_epochs=0,
        batch_size=4,
        max_epochs=1,
        T=1,
        num_prototypes=4,
    )


def test_a_folder_has_other_knowledge_without_evaluation_clips(folder):
    assert folder.sizes() == "14 train, 3 val, 3 test"
    parts = folder.make_data(0).datasets
    recordings, captions = (make() for make in folder.knowledge_sources.values())
    trained = {clip.key: clip for clip in parts["train"].clips}
    assert {clip.key for clip in recordings.clips} == set(trained)
    assert {clip.key for clip in captions.clips} == set(trained)
    assert all(clip.captions != trained[clip.key].captions for clip in captions.clips)
    assert len(folder.transfer["other domain"](0).datasets["test"]) == 20


@pytest.mark.parametrize("named", [{}, {"clip_id_column": "clip_id"}])
def test_takes_of_one_recording_are_in_one_part_of_a_folder(folder, tmp_path, named):
    rows = ["filename,caption,clip_id"]
    rows += [f"{number}.wav,sound {number},{number // 2}" for number in range(20)]
    (tmp_path / "takes.csv").write_text("\n".join(rows))
    task = folder_task(tmp_path, tmp_path / "takes.csv", seconds=0.5, pretraining_epochs=0, **named)
    parts = task.make_data(0).datasets.values()
    taken = [
        {int(caption.split()[1]) // 2 for clip in part.clips for caption in clip.captions} for part in parts
    ]
    assert sum(map(len, taken)) == len(set().union(*taken)) == 10


@pytest.mark.parametrize("change", ["a caption", "a sound"])
def test_other_data_under_the_same_path_share_no_runs_and_no_pretrained_weights(folder, tmp_path, change):
    def state():
        folder_module._parts.cache_clear()  # as in another process
        return folder.protocol().description, replace(folder.make_model.__self__).path

    before = state()
    assert state() == before
    if change == "a caption":
        table = tmp_path / "clips.csv"
        table.write_text(table.read_text().replace("\n3.wav,", "\n3.wav,other words or "))
    else:
        for number in range(20):
            soundfile.write(tmp_path / f"{number}.wav", np.zeros(9000), 16000)
    description, path = state()
    assert {name for name in description if description[name] != before[0][name]} == {"data"}
    assert path != before[1]


def test_other_knowledge_under_the_same_path_is_another_method(tmp_path, folder):
    others = tmp_path / "others.csv"
    others.write_text("filename,caption\n0.wav,first\n1.wav,second\n2.wav,third")
    columns = {"seconds": 0.5, "knowledge_annotations": others, "pretraining_epochs": 0, "batch_size": 4}

    def described():
        folder_module._other_recordings.cache_clear()  # as in another process
        task = folder_task(tmp_path, tmp_path / "clips.csv", **columns)
        (entry,) = ask_with_sources(task).values()
        return Study(task, tmp_path / "runs")._method(entry).description["knowledge"]

    before = described()
    assert described() == before
    others.write_text(others.read_text().replace("second", "two").replace("first", "one"))
    assert described() != before


@pytest.fixture
def captions(tmp_path):
    words = ["rain", "wind", "dogs", "cars"]
    rows = ["clip_id,caption_2,caption_3,caption_4,caption_5"]
    rows += [f"{clip},{','.join(f'{word.title()} {clip}!' for word in words)}" for clip in range(30)]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    np.save(tmp_path / "caption_1_embeddings.npy", np.eye(30, dtype="float32"))
    return tmp_path


def test_captions_have_their_texts_and_those_that_training_leaves_out(captions):
    task = captions_task(captions, captions_per_clip=1)
    train = task.make_data(0).datasets["train"]
    (others,) = (make() for make in pickle.loads(pickle.dumps(task)).knowledge_sources.values())
    assert len(others) == 3 * len(train)
    for row in range(len(train)):
        clip = int(train[row]["clip_id"])
        assert train[row]["caption"] == f"Rain {clip}!"
        left_out = [others[3 * row + place] for place in range(3)]
        assert [item["caption"] for item in left_out] == [
            f"{word} {clip}!" for word in ("Wind", "Dogs", "Cars")
        ]
        assert all(torch.equal(item["audio"], train[row]["audio"]) for item in left_out)
        assert {int(item["clip_id"]) for item in left_out} == {clip}
    batch = next(iter(task.make_data(0).test_dataloader()))
    assert batch["caption"][:2] == [f"{word} {int(batch['clip_id'][0])}!" for word in ("Rain", "Wind")]
    model = task.make_model(1e-3).eval()
    unread = {name: values for name, values in batch.items() if name != "caption"}
    assert torch.equal(model.encode_text(batch), model.encode_text(unread))
    assert not captions_task(captions).knowledge_sources


@pytest.mark.parametrize("count", [0, 5])
def test_clips_have_one_to_four_captions(count):
    with pytest.raises(ValueError, match=f"`captions_per_clip` has to be .* but got {count}"):
        captions_task("nowhere", captions_per_clip=count)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"scenes": 0}, "`scenes` has to be an integer of at least 1, but got 0"),
        ({"batch_size": 1}, "`batch_size` has to be an integer of at least 2, but got 1"),
        ({"pretraining_epochs": -1}, "`pretraining_epochs` has to be an integer of at least 0, but got -1"),
    ],
)
def test_arguments_outside_their_range(option, message):
    with pytest.raises(ValueError, match=message):
        soundscapes_task(**option)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_quick_size(name):
    parser = pytest.importorskip("jsonargparse").ArgumentParser()
    arguments = parser.add_function_arguments(TASKS[name], fail_untyped=True)
    assert set(quick_options(name)) <= set(arguments)
    assert all(action.help for action in parser._actions)

"""Synthetic soundscapes: every experiment of the paper in small, without a download."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from ask_lightning.data import EVENT_PROBABILITIES, SoundscapeData, Soundscapes
from ask_lightning.models import TinyRetriever
from ask_lightning.reproduce.tasks.loaded_data import LoadedData, Parts
from ask_lightning.reproduce.tasks.pretrained_model import PretrainedModel
from ask_lightning.reproduce.tasks.task import Task
from ask_lightning.utilities.arguments import check_count

# Seeds of the scenes, which have none in common.
_TASK, _PRETRAINING, _KNOWLEDGE, _TRANSFER = range(4)
# Of a clip of the other domain, and of a training clip beside the caption that it is trained with.
_NUM_CAPTIONS = 3
# Loudness of the noise of the other domain in units of that of the task.
_NOISE = 2.0


def soundscapes_task(
    *,
    scenes: int = 400,
    test_scenes: int = 200,
    pretraining_scenes: int = 1200,
    knowledge_scenes: int = 1200,
    pretraining_epochs: int = 6,
    pretraining_seed: int = 0,
    pretraining_folder: Path = Path("runs/pretrained"),
    learning_rate: float = 2e-3,
    batch_size: int = 32,
    max_epochs: int = 10,
    T: int = 3,
    num_prototypes: int = 64,
    accelerator: str = "cpu",
) -> Task:
    """Retrieval of synthetic soundscapes with a small model, for every experiment of the paper in small.

    All losses start from the same weights, which NT-Xent makes on other scenes: the paper fine-tunes
    pretrained encoders, and ASK's neighbours mean nothing to random ones.

    The other knowledge is in the manner of the paper's Table 1. `"other scenes"` are pairs that no other part
    has, as WavCaps is a corpus from outside. `"training scenes, other captions"` are the training clips with
    three captions each that the model does not train with, as the paper has its training set annotated anew.
    The other domain, `"noisy soundscapes"`, has noise that is twice as loud, and what sounds often in
    training sounds rarely there.

    A run takes about a second on a CPU core with `scenes=48, test_scenes=24, pretraining_scenes=48,
    knowledge_scenes=48, pretraining_epochs=2, batch_size=16, max_epochs=2, T=1, num_prototypes=8`.

    Args:
        scenes: Number of training scenes.
        test_scenes: Number of scenes to validate, as many to test, and as many of the other domain.
        pretraining_scenes: Number of other scenes to pretrain on.
        knowledge_scenes: Number of other scenes that serve as knowledge.
        pretraining_epochs: Number of epochs of NT-Xent before; with 0 the first weights are random.
        pretraining_seed: Seed of the pretraining.
        pretraining_folder: Folder where the pretrained weights are kept.
        learning_rate: Highest learning rate, also of the pretraining.
        batch_size: Number of pairs in a batch, at least 2.
        max_epochs: Number of epochs of each run.
        T: Number of epochs from one refresh of the knowledge to the next.
        num_prototypes: Number of coarse prototypes.
        accelerator: Accelerator of the trainer.

    Returns:
        The task. Scenes are rendered, and weights pretrained, when they are first used.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> task = soundscapes_task(scenes=8, test_scenes=2)
        >>> task.sizes()
        '8 train, 6 val, 6 test'
        >>> list(task.knowledge_sources), list(task.transfer)
        (['other scenes', 'training scenes, other captions'], ['noisy soundscapes'])
    """
    for name, count in (
        ("scenes", scenes),
        ("test_scenes", test_scenes),
        ("pretraining_scenes", pretraining_scenes),
        ("knowledge_scenes", knowledge_scenes),
    ):
        check_count(name, count)
    check_count("batch_size", batch_size, 2)
    model = PretrainedModel(
        TinyRetriever,
        partial(LoadedData, partial(_pretraining_part, pretraining_scenes), batch_size=batch_size),
        learning_rate=learning_rate,
        epochs=pretraining_epochs,
        seed=pretraining_seed,
        folder=pretraining_folder,
        accelerator=accelerator,
        options={"task": "soundscapes", "scenes": pretraining_scenes, "batch_size": batch_size},
    )
    return Task(
        name="soundscapes",
        make_data=partial(LoadedData, partial(_parts, scenes, test_scenes), batch_size=batch_size),
        make_model=model.make_model,
        learning_rate=learning_rate,
        max_epochs=max_epochs,
        refresh={"T": T, "num_prototypes": num_prototypes},
        description={
            "scenes": scenes,
            "test_scenes": test_scenes,
            "pretraining_scenes": pretraining_scenes,
            "knowledge_scenes": knowledge_scenes,
            "pretraining_epochs": pretraining_epochs,
            "pretraining_seed": pretraining_seed,
            "batch_size": batch_size,
        },
        make_token_model=model.make_token_model,
        knowledge_sources={
            "other scenes": partial(_other_scenes, scenes, knowledge_scenes),
            "training scenes, other captions": partial(_other_captions, scenes),
        },
        transfer={
            "noisy soundscapes": partial(
                LoadedData, partial(_noisy_part, test_scenes), batch_size=batch_size
            ),
        },
        accelerator=accelerator,
        prepare=model.prepare,
    )


class _LaterClips(Dataset[dict[str, Any]]):
    """Clips whose ids follow those of the training clips, which count from 0 as well."""

    def __init__(self, clips: Soundscapes, first_id: int) -> None:
        self.clips, self.first_id = clips, first_id

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.clips[index]
        return item | {"clip_id": self.first_id + item["clip_id"]}


@cache
def _parts(num_train: int, num_test: int) -> Parts:
    return SoundscapeData(num_train, num_test, num_test, scenes_seed=_TASK, features="log_mel").datasets


@cache
def _pretraining_part(num_scenes: int) -> Parts:
    return {"train": Soundscapes(num_scenes, seed=_PRETRAINING, features="log_mel")}


@cache
def _other_scenes(num_train: int, num_scenes: int) -> Dataset[dict[str, Any]]:
    return _LaterClips(Soundscapes(num_scenes, seed=_KNOWLEDGE, features="log_mel"), first_id=num_train)


@cache
def _other_captions(num_train: int) -> Dataset[dict[str, Any]]:
    """The training clips without their first captions, which are those that the model trains with."""
    count = 1 + _NUM_CAPTIONS
    clips = Soundscapes(num_train, seed=_TASK, captions_per_clip=count, features="log_mel")
    return Subset(clips, [index for index in range(len(clips)) if index % count])


@cache
def _noisy_part(num_scenes: int) -> Parts:
    rarest_first = sorted(EVENT_PROBABILITIES, key=EVENT_PROBABILITIES.__getitem__)
    largest_first = sorted(EVENT_PROBABILITIES.values(), reverse=True)
    scenes = Soundscapes(
        num_scenes,
        split="test",
        seed=_TRANSFER,
        captions_per_clip=_NUM_CAPTIONS,
        features="log_mel",
        event_probabilities=dict(zip(rarest_first, largest_first, strict=True)),
        noise=_NOISE,
    )
    return {"test": scenes}

"""Retrieval tasks that losses are compared on, one in each file."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ask_lightning.reproduce.tasks.captions import captions_task
from ask_lightning.reproduce.tasks.embeddings import embeddings_task
from ask_lightning.reproduce.tasks.folder import folder_task
from ask_lightning.reproduce.tasks.published import audiocaps_task, clotho_task, published_task
from ask_lightning.reproduce.tasks.soundscapes import soundscapes_task
from ask_lightning.reproduce.tasks.task import Task

__all__ = [
    "TASKS",
    "Task",
    "audiocaps_task",
    "captions_task",
    "clotho_task",
    "embeddings_task",
    "folder_task",
    "published_task",
    "quick_options",
    "soundscapes_task",
]

TASKS: Mapping[str, Callable[..., Task]] = MappingProxyType(
    {
        "audiocaps": audiocaps_task,
        "captions": captions_task,
        "clotho": clotho_task,
        "embeddings": embeddings_task,
        "folder": folder_task,
        "soundscapes": soundscapes_task,
    }
)
"""Functions that make a task, by the name of the data on the command line."""

_QUICK: Mapping[str, Mapping[str, Any]] = {
    "audiocaps": {"shrunken": True},
    "captions": {"captions_per_clip": 1, "max_epochs": 2, "T": 1},
    "clotho": {"shrunken": True},
    "embeddings": {"max_epochs": 2, "T": 1},
    "folder": {"pretraining_epochs": 1, "max_epochs": 2, "T": 1, "num_prototypes": 8},
    "soundscapes": {
        "scenes": 48,
        "test_scenes": 24,
        "pretraining_scenes": 48,
        "knowledge_scenes": 48,
        "pretraining_epochs": 2,
        "batch_size": 16,
        "max_epochs": 2,
        "T": 1,
        "num_prototypes": 8,
    },
}


def quick_options(name: str) -> dict[str, Any]:
    """Arguments of a task's function that make it as small as it gets, to see whether everything runs.

    Args:
        name: One of `TASKS`.
    """
    return dict(_QUICK[name])

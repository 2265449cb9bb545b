"""A folder of recordings with a table of captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Dataset

from ask_lightning.data import AudioFolder, ClipDataset, FolderData, read_captions
from ask_lightning.models import TinyRetriever
from ask_lightning.reproduce.tasks.loaded_data import LoadedData, Parts
from ask_lightning.reproduce.tasks.pretrained_model import PretrainedModel
from ask_lightning.reproduce.tasks.task import Task
from ask_lightning.utilities.arguments import check_count

_FRACTIONS = (0.7, 0.15, 0.15)


def folder_task(
    root: Path,
    annotations: Path,
    *,
    filename_column: str = "auto",
    caption_columns: Sequence[str] = ("caption",),
    clip_id_column: str | None = "auto",
    delimiter: str = "auto",
    seconds: float = 5.0,
    other_caption_columns: Sequence[str] = (),
    knowledge_annotations: Path | None = None,
    transfer_annotations: Path | None = None,
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
    """Retrieval of one's own recordings with a small model.

    70 % of the clips are for training, 15 % for validation, 15 % for the test. All losses start from the same
    weights, which NT-Xent makes on the training part.

    Args:
        root: Folder of the audio files.
        annotations: CSV with a row for each audio–caption pair.
        filename_column: Column of file names, which are relative to `root` or absolute. `"auto"`: it has one
            of the usual names, such as `file` or `filename`.
        caption_columns: Columns of captions.
        clip_id_column: Column of clip ids, which the division keeps together. `"auto"`: it has one of the
            usual names, such as `clip_id`, or there is none. None: each file is a clip of its own.
        delimiter: Character between the fields of a table. `"auto"`: as its header tells.
        seconds: Length that clips are cropped or filled up to.
        other_caption_columns: Columns of captions that the model does not train with. With them the training
            clips under these captions are other knowledge, `"training clips, other captions"`.
        knowledge_annotations: CSV of other recordings below `root` that are other knowledge, `"other
            recordings"`, with the columns of `annotations`. None: there is none.
        transfer_annotations: CSV of recordings of another domain below `root` to test on, `"other domain"`,
            with the columns of `annotations`. None: there is none.
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
        The task. Recordings are read, and weights pretrained, when they are first used.

    Raises:
        ValueError: An argument is outside its range. Mistakes in a table are found when it is read.
    """
    check_count("batch_size", batch_size, 2)
    columns = _Columns(filename_column, tuple(caption_columns), clip_id_column, delimiter)
    recordings = _Recordings(root, annotations, columns, seconds)
    table = {
        "root": str(root),
        "annotations": str(annotations),
        **asdict(columns),
        "seconds": seconds,
        "batch_size": batch_size,
    }
    make_data = partial(LoadedData, partial(_parts, recordings), batch_size=batch_size)
    model = PretrainedModel(
        TinyRetriever,
        make_data,
        learning_rate=learning_rate,
        epochs=pretraining_epochs,
        seed=pretraining_seed,
        folder=pretraining_folder,
        accelerator=accelerator,
        options={"task": "folder", **table},
    )
    knowledge: dict[str, Callable[[], Dataset[Any]]] = {}
    if knowledge_annotations is not None:
        others = replace(recordings, annotations=knowledge_annotations)
        knowledge["other recordings"] = partial(_other_recordings, recordings, others)
    if other_caption_columns:
        others = replace(recordings, columns=replace(columns, captions=tuple(other_caption_columns)))
        knowledge["training clips, other captions"] = partial(_other_captions, recordings, others)
    transfer: dict[str, Callable[[int], LoadedData]] = {}
    if transfer_annotations is not None:
        others = replace(recordings, annotations=transfer_annotations)
        transfer["other domain"] = partial(LoadedData, partial(_test_part, others), batch_size=batch_size)
    return Task(
        name="folder",
        make_data=make_data,
        make_model=model.make_model,
        learning_rate=learning_rate,
        max_epochs=max_epochs,
        refresh={"T": T, "num_prototypes": num_prototypes},
        description={
            **table,
            "pretraining_epochs": pretraining_epochs,
            "pretraining_seed": pretraining_seed,
        },
        make_token_model=model.make_token_model,
        knowledge_sources=knowledge,
        transfer=transfer,
        accelerator=accelerator,
        prepare=model.prepare,
    )


@dataclass(frozen=True)
class _Columns:
    """The columns of a table, and what separates them."""

    filename: str
    captions: tuple[str, ...]
    clip_id: str | None
    delimiter: str

    def arguments(self) -> dict[str, Any]:
        """The arguments by which data modules take them."""
        return {
            "filename_column": self.filename,
            "caption_columns": self.captions,
            "clip_id_column": self.clip_id,
            "delimiter": self.delimiter,
        }


@dataclass(frozen=True)
class _Recordings:
    """A folder of recordings, the table of their captions, and the length of their crops."""

    root: Path
    annotations: Path
    columns: _Columns
    seconds: float

    def read(self) -> AudioFolder:
        """All recordings of the table, with crops from the middle."""
        return AudioFolder(
            self.root,
            self.annotations,
            seconds=self.seconds,
            features="log_mel",
            cache="memory",
            **self.columns.arguments(),
        )


@cache
def _parts(recordings: _Recordings) -> Mapping[str, ClipDataset]:
    data = FolderData(
        recordings.root,
        recordings.annotations,
        seconds=recordings.seconds,
        features="log_mel",
        fractions=_FRACTIONS,
        cache="memory",
        **recordings.columns.arguments(),
    )
    return cast(Mapping[str, ClipDataset], data.datasets)


@cache
def _test_part(recordings: _Recordings) -> Parts:
    return {"test": recordings.read()}


@cache
def _other_recordings(recordings: _Recordings, others: _Recordings) -> ClipDataset:
    """The recordings of another table, without those of the validation and test parts."""
    parts = _parts(recordings)
    held_out = {clip.recording for split in ("val", "test") for clip in parts[split].clips}
    held_out |= {clip.key for split in ("val", "test") for clip in parts[split].clips}
    source = others.read()
    return source.variant(
        clips=[clip for clip in source.clips if held_out.isdisjoint((clip.key, clip.recording))]
    )


@cache
def _other_captions(recordings: _Recordings, others: _Recordings) -> ClipDataset:
    """The training clips with the captions of other columns."""
    train = _parts(recordings)["train"].without_random_crops()
    clips = read_captions(others.annotations, root=others.root, **others.columns.arguments())
    return train.variant(clips=clips)

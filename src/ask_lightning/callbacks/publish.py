"""Tables, pictures and sounds of a run: as files in its folder, and in loggers that can show them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from warnings import warn

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.optional_imports import import_optional
from ask_lightning.utilities.text_tables import Cell, csv_table, markdown_table

Sound = tuple[npt.NDArray[np.float32], int]
"""Samples `(T,)` and their sample rate in Hz."""


def output_folder(trainer: pl.Trainer) -> Path:
    """The folder to which a run writes. Has to be called on every rank, since ranks agree on the folder.

    Args:
        trainer: The trainer of the run.

    Returns:
        The folder of the first logger, or the trainer's root folder if there is no logger.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def publish_table(
    trainer: pl.Trainer,
    folder: Path,
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    sounds: Sequence[Sound | None] | None = None,
) -> None:
    """Write `{name}.csv`, and show the table in Weights & Biases and TensorBoard.

    Args:
        trainer: The trainer of the run, of which only the first rank writes.
        folder: Folder to write to.
        name: Name of the table.
        columns: Headings of the columns.
        rows: Rows of as many cells.
        sounds: Sound of each row, which Weights & Biases shows as one more column.
    """
    if not trainer.is_global_zero:
        return
    write_file(folder / f"{name}.csv", csv_table(columns, rows).encode())
    for logger in _loggers_of_type(trainer, WandbLogger):
        assert isinstance(logger, WandbLogger)
        headings, cells = list(columns), [list(row) for row in rows]
        if sounds is not None:
            headings = [*headings, "audio"]
            cells = [[*row, _wandb_audio(sound)] for row, sound in zip(cells, sounds, strict=True)]
        logger.log_table(key=name, columns=headings, data=cells)
    for logger in _loggers_of_type(trainer, TensorBoardLogger):
        logger.experiment.add_text(name, markdown_table(columns, rows), trainer.global_step)


def publish_picture(trainer: pl.Trainer, folder: Path, name: str, figure: Any) -> None:
    """Write `{name}.png`, and show the picture in Weights & Biases and TensorBoard.

    Args:
        trainer: The trainer of the run, of which only the first rank writes.
        folder: Folder to write to.
        name: Name of the picture.
        figure: A matplotlib figure.
    """
    if not trainer.is_global_zero:
        return
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    write_file(folder / f"{name}.png", content.getvalue())
    pixels = _read_pixels(content)  # (H, W, 3)
    for logger in _loggers_of_type(trainer, WandbLogger):
        assert isinstance(logger, WandbLogger)
        logger.log_image(key=name, images=[pixels])
    for logger in _loggers_of_type(trainer, TensorBoardLogger):
        logger.experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")


def publish_sounds(trainer: pl.Trainer, folder: Path, name: str, sounds: Sequence[Sound]) -> None:
    """Write `{name}-{number}.wav`, and make them playable in Weights & Biases and TensorBoard.

    Args:
        trainer: The trainer of the run, of which only the first rank writes.
        folder: Folder to write to.
        name: Name of the files, to which their number is appended.
        sounds: The sounds.
    """
    if not trainer.is_global_zero:
        return
    for number, (samples, rate) in enumerate(sounds):
        content = io.BytesIO()
        import_optional("soundfile").write(content, samples, rate, format="WAV")
        write_file(folder / f"{name}-{number}.wav", content.getvalue())
        for logger in _loggers_of_type(trainer, TensorBoardLogger):
            logger.experiment.add_audio(f"{name}-{number}", samples[None], trainer.global_step, rate)
    for logger in _loggers_of_type(trainer, WandbLogger):
        assert isinstance(logger, WandbLogger)
        rates = [rate for _, rate in sounds]
        logger.log_audio(key=name, audios=[samples for samples, _ in sounds], sample_rate=rates)


def write_file(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all. If that fails, a warning says so and training goes on.

    Args:
        path: Path of the file; its folder is created if it does not exist.
        content: Content of the file.
    """
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        warn(f"{path} could not be written ({error}). Training goes on without it.", stacklevel=3)


def _loggers_of_type(trainer: pl.Trainer, kind: type[Logger]) -> Iterable[Any]:
    """The trainer's loggers of a class."""
    return [logger for logger in trainer.loggers if isinstance(logger, kind)]


def _wandb_audio(sound: Sound | None) -> Any:
    """A sound that Weights & Biases can play."""
    return None if sound is None else import_optional("wandb").Audio(sound[0], sample_rate=sound[1])


def _read_pixels(content: io.BytesIO) -> npt.NDArray[np.uint8]:
    """The pixels `(H, W, 3)` of a PNG file."""
    imread = import_optional("matplotlib.image").imread
    content.seek(0)
    return np.asarray(255 * imread(content, format="png")[..., :3], dtype=np.uint8)

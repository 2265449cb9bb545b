"""The synthetic datasets of `--demo`, which are written once and then reused."""

import csv
import getpass
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from pathlib import Path

from ask_lightning.cli.errors import UsageError

_SECONDS = 0.7
# The file in each dataset that says which code wrote it and how many files it has.
_MARKER = ".ask-lightning-demo"
_WRITING_CODE = (
    "cli/demo_data.py",
    "data/synthetic/published_layouts.py",
    "data/synthetic/recordings_folder.py",
    "data/synthetic/soundscapes.py",
    "data/synthetic/synthesis.py",
)


def default_demo_folder() -> Path:
    """The folder of the synthetic datasets: this user's own, among the temporary files."""
    return Path(tempfile.gettempdir()) / f"ask-lightning-demo-{getpass.getuser()}"


def write_demo_data(folder: Path) -> Path:
    """Write small synthetic copies of the datasets, with re-annotated captions.

    Datasets that exist are kept, unless another version of this code wrote them or files are missing.

    Args:
        folder: The folder to write to; created if it does not exist.

    Returns:
        The folder, with `AudioCaps`, `Clotho`, `WavCaps` and `Recordings` in it.

    Raises:
        UsageError: The folder cannot be written to, or holds datasets that this function did not write.
    """
    from ask_lightning.data import write_recordings, write_wavcaps

    writers: dict[str, Callable[[Path], object]] = {
        "AudioCaps": _write_audiocaps,
        "Clotho": _write_clotho,
        "WavCaps": partial(write_wavcaps, num_clips=24, seconds=_SECONDS),
        "Recordings": partial(write_recordings, num_clips=40, seconds=_SECONDS),
    }
    for name in writers:
        if (folder / name).exists() and not (folder / name / _MARKER).is_file():
            raise UsageError(f"{folder / name} is no data of --demo. Pass another folder as --demo=FOLDER.")
    try:
        for name, write in writers.items():
            _write_if_outdated(folder / name, write)
    except OSError as error:
        raise UsageError(f"The data of --demo cannot be written: {error}. Pass --demo=FOLDER.") from error
    return folder


def _write_if_outdated(dataset: Path, write: Callable[[Path], object]) -> None:
    """Write a dataset as a whole or not at all, even if several processes write it at the same time."""
    if dataset.exists():
        if (dataset / _MARKER).read_text() == _marker_text(dataset):
            return
        shutil.rmtree(dataset)
    temporary = dataset.with_name(f".{dataset.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        (temporary / _MARKER).write_text(_marker_text(temporary))
        temporary.rename(dataset)
    except OSError:
        if not (dataset / _MARKER).is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _marker_text(dataset: Path) -> str:
    """The text of the marker: a checksum of the code that writes datasets, and the number of files."""
    package = Path(__file__).parents[1]
    code = blake2b(
        b"".join((package / name).read_bytes() for name in _WRITING_CODE), digest_size=8
    ).hexdigest()
    return f"{code} {sum(path.is_file() and path.name != _MARKER for path in dataset.rglob('*'))}"


def _write_audiocaps(dataset: Path) -> None:
    from ask_lightning.data import write_audiocaps

    write_audiocaps(dataset, num_train=24, seconds=_SECONDS)
    _write_enriched(dataset / "train.csv", dataset / "enriched.csv", "youtube_id", ["caption"])


def _write_clotho(dataset: Path) -> None:
    from ask_lightning.data import write_clotho

    write_clotho(dataset, num_train=6, seconds=_SECONDS)
    captions = [f"caption_{number}" for number in range(1, 6)]
    table = dataset / "clotho_csv_files" / "clotho_captions_development.csv"
    _write_enriched(table, dataset / "enriched.csv", "file_name", captions)


def _write_enriched(table: Path, output: Path, clip_column: str, caption_columns: list[str]) -> None:
    """Write the captions of a table in other words, like the paper's re-annotated training set."""
    with (
        table.open(newline="", encoding="utf-8") as given,
        output.open("w", newline="", encoding="utf-8") as made,
    ):
        writer = csv.writer(made)
        writer.writerow((clip_column, *caption_columns))
        for row in csv.DictReader(given):
            writer.writerow(
                (
                    row[clip_column],
                    *(f"a recording in which one hears {row[name]}" for name in caption_columns),
                )
            )

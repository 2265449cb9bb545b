"""The synthetic datasets of `--demo`, written once and found again."""

import csv
import getpass
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ask_lightning.cli.errors import UsageError
from ask_lightning.data import write_audiocaps, write_clotho, write_wavcaps

# To be raised when what is written changes, so that what an older version wrote is not taken for it.
_VERSION = 1
_SECONDS = 0.7


def default_demo_folder() -> Path:
    """A folder for temporary files that is this user's own."""
    return Path(tempfile.gettempdir()) / f"ask-lightning-demo-{getpass.getuser()}-{_VERSION}"


def write_demo(folder: Path) -> Path:
    """Write small synthetic copies of the datasets, with re-annotated captions; those that are there stay.

    Args:
        folder: Where to; made if missing.

    Returns:
        The folder, with `AudioCaps`, `Clotho` and `WavCaps` in it.

    Raises:
        UsageError: It cannot be written to.
    """
    try:
        _once(folder / "AudioCaps", _audiocaps)
        _once(folder / "Clotho", _clotho)
        _once(folder / "WavCaps", lambda place: write_wavcaps(place, num_clips=24, seconds=_SECONDS))
    except OSError as error:
        raise UsageError(f"The data of --demo cannot be written: {error}. Pass --demo=FOLDER.") from error
    return folder


def _once(place: Path, write: Callable[[Path], object]) -> None:
    """Whole or not at all, also if several processes write at the same time."""
    if place.is_dir():
        return
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.rename(place)
    except OSError:
        if not place.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _audiocaps(place: Path) -> None:
    write_audiocaps(place, num_train=24, seconds=_SECONDS)
    _enrich(place / "train.csv", place / "enriched.csv", "youtube_id", ["caption"])


def _clotho(place: Path) -> None:
    write_clotho(place, num_train=6, seconds=_SECONDS)
    captions = [f"caption_{number}" for number in range(1, 6)]
    table = place / "clotho_csv_files" / "clotho_captions_development.csv"
    _enrich(table, place / "enriched.csv", "file_name", captions)


def _enrich(table: Path, output: Path, clip: str, captions: list[str]) -> None:
    """Captions in other words, as the paper's re-annotated training set has them."""
    with table.open(newline="", encoding="utf-8") as given, output.open("w", newline="") as made:
        writer = csv.writer(made)
        writer.writerow((clip, *captions))
        for row in csv.DictReader(given):
            writer.writerow(
                (row[clip], *(f"a recording in which one hears {row[name]}" for name in captions))
            )

"""The synthetic datasets of `--demo`, written once and found again."""

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
from ask_lightning.data import write_audiocaps, write_clotho, write_wavcaps

_SECONDS = 0.7
# In each dataset: what wrote it, and how many files.
_MARKER = ".ask-lightning-demo"
_WRITERS = (
    "cli/demo.py",
    "data/synthetic/published_layouts.py",
    "data/synthetic/soundscapes.py",
    "data/synthetic/synthesis.py",
)


def default_demo_folder() -> Path:
    """A folder for temporary files that is this user's own."""
    return Path(tempfile.gettempdir()) / f"ask-lightning-demo-{getpass.getuser()}"


def write_demo(folder: Path) -> Path:
    """Write small synthetic copies of the datasets, with re-annotated captions.

    Those that are there stay, unless another version of this code wrote them or files are gone since.

    Args:
        folder: Where to; made if missing.

    Returns:
        The folder, with `AudioCaps`, `Clotho` and `WavCaps` in it.

    Raises:
        UsageError: It cannot be written to, or holds datasets that are no demo.
    """
    writers: dict[str, Callable[[Path], object]] = {
        "AudioCaps": _audiocaps,
        "Clotho": _clotho,
        "WavCaps": partial(write_wavcaps, num_clips=24, seconds=_SECONDS),
    }
    for name in writers:
        if (folder / name).exists() and not (folder / name / _MARKER).is_file():
            raise UsageError(f"{folder / name} is no data of --demo. Pass another folder as --demo=FOLDER.")
    try:
        for name, write in writers.items():
            _once(folder / name, write)
    except OSError as error:
        raise UsageError(f"The data of --demo cannot be written: {error}. Pass --demo=FOLDER.") from error
    return folder


def _once(place: Path, write: Callable[[Path], object]) -> None:
    """Whole or not at all, also if several processes write at the same time."""
    if place.exists():
        if (place / _MARKER).read_text() == _contents(place):
            return
        shutil.rmtree(place)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        (temporary / _MARKER).write_text(_contents(temporary))
        temporary.rename(place)
    except OSError:
        if not (place / _MARKER).is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _contents(place: Path) -> str:
    """What the marker says: by which code it was written, and how many files there are besides."""
    package = Path(__file__).parents[1]
    code = blake2b(b"".join((package / name).read_bytes() for name in _WRITERS), digest_size=8).hexdigest()
    return f"{code} {sum(path.is_file() and path.name != _MARKER for path in place.rglob('*'))}"


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

"""Finds the file that a name was meant for, where the two are spelled differently."""

import os
import re
import unicodedata
from functools import lru_cache
from pathlib import Path


def near_file(path: Path) -> Path | None:
    """The file whose path differs in capitals, Unicode form or separators alone.

    Systems disagree about these: a name that was typed on one may not be found on another.

    Args:
        path: Path of a file that does not exist.

    Returns:
        A path that exists; None if there is none.

    Examples:
        >>> folder = getfixture("tmp_path")
        >>> (folder / "Rain_1.wav").touch()
        >>> near_file(folder / "rain 1.WAV").name
        'Rain_1.wav'
    """
    parts = [part for given in path.parts for part in (given.split("\\") if "\\" in given else [given])]
    found = Path()
    for part in parts:
        if (found / part).exists():
            found = found / part
            continue
        name = _names_in(found, _time_of_change(found)).get(_plain_name(part))
        if name is None:
            return None
        found = found / name
    return found if found.is_file() else None


@lru_cache(maxsize=64)
def _names_in(folder: Path, changed: int) -> dict[str, str]:
    """The names in a folder by their plain form, as long as the folder does not change."""
    try:
        names = sorted(os.listdir(folder), reverse=True)
    except OSError:
        return {}
    return {_plain_name(name): name for name in names}


def _time_of_change(folder: Path) -> int:
    return folder.stat().st_mtime_ns


def _plain_name(name: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return re.sub(r"[\s_-]+", " ", folded)

"""Finds the annotations of a split in a folder, and the layout of its audio."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

from ask_lightning.data.splits import Split

Layout = Literal["auto", "files", "hdf5", "parquet"]

SPLIT_WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training", "development", "dev"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing", "evaluation", "eval"),
}
"""Names of the splits in published and packed datasets."""

# A packed file has the audio as well, so it is taken before a table that needs a folder beside it.
_SUFFIXES: dict[str, tuple[str, ...]] = {
    "hdf5": (".h5", ".hdf5"),
    "parquet": (".parquet",),
    "files": (".csv", ".json"),
}
_DEPTH = 3
_OTHER = frozenset({"metadata", "blacklist", "exclude", "excluded", "tags"})


def find_split(root: Path, split: Split, layout: Layout = "auto") -> tuple[str, list[Path]]:
    """Find the annotations of a split by the names of files.

    Args:
        root: Folder of the dataset, read to a depth of 3.
        split: `"train"`, `"val"` or `"test"`.
        layout: `"files"` for a CSV or JSON beside audio files, `"hdf5"`, `"parquet"`, or `"auto"` for the
            first of HDF5, parquet and files that is there.

    Returns:
        The layout and its files: none, one, or, of a parquet dataset, all parts in order.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: Several files could be meant.

    Examples:
        >>> root = getfixture("tmp_path")
        >>> for name in ("clotho_captions_development.csv", "clotho_metadata_development.csv"):
        ...     (root / name).touch()
        >>> [path.name for path in find_split(root, "train")[1]]
        ['clotho_captions_development.csv']
    """
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder of a dataset at {root}.")
    files = _annotation_files(root)
    for kind in _SUFFIXES if layout == "auto" else (layout,):
        found = [
            path for path in files if path.suffix.lower() in _SUFFIXES[kind] and _belongs_to(path, split)
        ]
        if kind == "parquet":
            found = [path for path in found if path.parent == found[0].parent]
        else:
            found = _prefer_plain_tables(found, split)
            if len(found) > 1:
                names = ", ".join(str(path.relative_to(root)) for path in found)
                raise ValueError(
                    f"{root}: several files could be the {split} split: {names}. Pass one as "
                    f"`annotations={{{split!r}: ...}}`."
                )
        if found:
            return kind, found
    return layout, []


def resolve_given_split(root: Path, given: str) -> tuple[str, list[Path]]:
    """The layout and the files of a split whose path was given.

    Args:
        root: Folder of the dataset.
        given: Path of a file, relative to the root or absolute. Of parquet files also a folder, or a pattern
            such as `data/train-*.parquet`.

    Returns:
        The layout and its files.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The ending of the file belongs to no layout.

    Examples:
        >>> root = getfixture("tmp_path")
        >>> (root / "val.csv").touch()
        >>> resolve_given_split(root, "val.csv")[0]
        'files'
    """
    path = root / given
    if path.is_dir():
        paths = sorted(path.glob("*.parquet"))
    elif path.exists():
        paths = [path]
    else:
        paths = sorted(path.parent.glob(path.name)) if "*" in path.name else []
    if not paths:
        raise FileNotFoundError(
            f"There is nothing at {path}. Pass the path of a file, or leave it out to search."
        )
    for kind, suffixes in _SUFFIXES.items():
        if paths[0].suffix.lower() in suffixes:
            return kind, paths
    known = ", ".join(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
    raise ValueError(f"{paths[0]}: the ending has to be one of {known}.")


def find_metadata_table(table: Path, words: Sequence[str]) -> Path | None:
    """The table of metadata that lies beside a table of captions.

    It is the one that has the same name but for `metadata` in place of `captions`, else the only one of the
    split. If there are several, a warning says so.

    Args:
        table: Path of the table of captions.
        words: Names that the split may have.

    Returns:
        The path of the table; None if there is none, or none that is surely meant.

    Examples:
        >>> root = getfixture("tmp_path")
        >>> (root / "clotho_metadata_validation.csv").touch()
        >>> find_metadata_table(root / "clotho_captions_validation.csv", SPLIT_WORDS["val"]).name
        'clotho_metadata_validation.csv'
    """
    tables = sorted(table.parent.glob("*.csv"))
    twin = re.sub("captions?", "metadata", table.stem.lower())
    for path in tables:
        if path.stem.lower() == twin != table.stem.lower():
            return path
    found = [
        path
        for path in tables
        if "metadata" in _words_of_name(path.stem) and _words_of_name(path.stem) & set(words)
    ]
    if len(found) > 1:
        rank_zero_warn(
            f"{table}: several tables could be its metadata ({', '.join(path.name for path in found)}), so "
            f"none is used and clips have no FreeSound ids. Keep one, or name it {twin}.csv."
        )
    return found[0] if len(found) == 1 else None


def _annotation_files(root: Path) -> list[Path]:
    """All files below a folder that may hold annotations, to a depth of three folders."""
    suffixes = {suffix for group in _SUFFIXES.values() for suffix in group}
    found: list[Path] = []
    for place, folders, names in os.walk(root, followlinks=True):
        if len(Path(place).relative_to(root).parts) >= _DEPTH:
            folders.clear()
        found += [Path(place, name) for name in names if os.path.splitext(name)[1].lower() in suffixes]
    return sorted(found)


def _belongs_to(path: Path, split: Split) -> bool:
    words = _words_of_name(path.stem)
    others = {word for name, group in SPLIT_WORDS.items() if name != split for word in group}
    return bool(words & set(SPLIT_WORDS[split])) and not words & (others | _OTHER)


def _prefer_plain_tables(paths: list[Path], split: Split) -> list[Path]:
    """Files other than JSON if there are any, and of these the one that is named like the split alone."""
    tables = [path for path in paths if path.suffix.lower() != ".json"] or paths
    plain = [path for path in tables if path.stem.lower() in SPLIT_WORDS[split]]
    return plain or tables


def _words_of_name(name: str) -> frozenset[str]:
    return frozenset(re.split(r"[^a-z]+", name.lower()))

"""One's own recordings, wherever they are: a folder with a table, a folder alone, parquet files, the hub."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ask_lightning.data.audio.media import MEDIA_SUFFIXES
from ask_lightning.data.audio.stores import AudioStore, FileStore
from ask_lightning.data.captions import file_identity, plain_path, read_captions, read_split_names
from ask_lightning.data.clips import Clip, ClipCollector, abbreviate, given_text
from ask_lightning.data.columns import (
    AUTO,
    Columns,
    find_columns,
    find_delimiter,
    split_named,
    splits_of,
)
from ask_lightning.data.keys import AUDIO_SUFFIXES, normalize_title
from ask_lightning.data.published.parquet import ColumnStore, cast_audio, load_hub, texts_of_cell
from ask_lightning.data.splits import SPLITS, Split
from ask_lightning.data.tables import check_columns, numbered_rows, read_text
from ask_lightning.utilities.optional_imports import import_optional

_TABLES = (".csv", ".tsv", ".parquet")
_AUDIO = "audio"


@dataclass(frozen=True)
class TableFormat:
    """How a table of recordings is written.

    Attributes:
        filename_column: Name of the column of audio files, or of audio itself; `"auto"`: found by its usual
            names.
        caption_columns: Name of the column of captions, or names of several columns, or `"auto"`.
        clip_id_column: Name of the column of clip ids, `"auto"`, or None: each file is a clip.
        split_column: Name of the column of splits, `"auto"`, or None.
        delimiter: Character between the fields of a CSV, or `"auto"`.
        encoding: Encoding of a CSV.
        collection: Name that keeps the clip ids apart from those of another collection.
    """

    filename_column: str = AUTO
    caption_columns: str | Sequence[str] = AUTO
    clip_id_column: str | None = AUTO
    split_column: str | None = AUTO
    delimiter: str = AUTO
    encoding: str = "utf-8"
    collection: str = ""


@dataclass(frozen=True)
class Recordings:
    """Clips and their audio.

    Attributes:
        source: Path of the table, or name of the dataset, for messages.
        clips: The clips with their captions.
        store: Store that opens the audio of each clip.
        splits: Split of each clip by its key. Empty: the source does not divide them.
        columns: Columns that were read. None: there is no table.
        delimiter: Character between the fields of a CSV. Empty: there is no CSV.
    """

    source: str
    clips: list[Clip]
    store: AudioStore
    splits: dict[str, Split] = field(default_factory=dict)
    columns: Columns | None = None
    delimiter: str = ""


def read_recordings(
    root: str | Path | None, annotations: str | Path | None, hub: str | None, form: TableFormat
) -> Recordings:
    """Find the clips of a folder or of a dataset.

    Args:
        root: Folder of the audio files, which may be None with `hub`.
        annotations: Path of a CSV or of a parquet file, from the current folder or from `root`. None: the
            only table in `root`; without any, the captions are the names of the files.
        hub: Name of a dataset of the Hugging Face hub, or a folder that `save_to_disk` wrote, to read
            instead.
        form: How the table is written.

    Returns:
        The clips.

    Raises:
        FileNotFoundError: There is no such folder or table.
        ValueError: There is nothing to read, several tables, or a mistake in the table.
    """
    if hub is not None:
        if root is not None or annotations is not None:
            raise ValueError("Argument `hub` has to stand alone, but got `root` or `annotations` too.")
        return _read_hub(hub, form)
    if root is None:
        raise ValueError(
            "Argument `root` has to be the folder of your recordings, or `hub` the name of a dataset, but "
            "got neither. On the command line they are `--data.root FOLDER` and `--data.hub NAME`."
        )
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of audio files at {folder}. Correct `root`.")
    table = _find_table(folder, annotations)
    if table is None:
        return _read_names(folder, form.collection)
    if table.suffix.lower() == ".parquet":
        return _read_parquet(folder, table, form)
    return _read_csv(folder, table, form)


def _find_table(folder: Path, annotations: str | Path | None) -> Path | None:
    """The path of the table, or None where there is none."""
    if annotations is not None:
        given = Path(annotations)
        return given if given.is_file() or not (folder / given).is_file() else folder / given
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in _TABLES)
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise ValueError(
            f"{folder} has {len(tables)} tables: {names}. Name that of the captions as `annotations`."
        )
    return tables[0] if tables else None


def _read_csv(folder: Path, table: Path, form: TableFormat) -> Recordings:
    text = read_text(table, form.encoding)
    delimiter = find_delimiter(text) if form.delimiter == AUTO else form.delimiter
    header = next(numbered_rows(table, text, delimiter), (0, []))[1] if len(delimiter) == 1 else []
    columns = Columns(AUTO, (AUTO,), AUTO)
    if header:  # otherwise `read_captions` says what is wrong
        columns = find_columns(
            table,
            header,
            filename=form.filename_column,
            captions=form.caption_columns,
            clip_id=form.clip_id_column,
            split=form.split_column,
        )
    clips = read_captions(
        table,
        filename_column=columns.filename,
        caption_columns=columns.captions if header else form.caption_columns,
        clip_id_column=columns.clip_id,
        delimiter=delimiter,
        encoding=form.encoding,
        collection=form.collection,
        root=folder,
    )
    splits: dict[str, Split] = {}
    if columns.split is not None:
        check_columns(table, header, [columns.split], delimiter, "Correct `split_column`.")
        named = read_split_names(
            table, columns.filename, columns.split, delimiter=delimiter, encoding=form.encoding, root=folder
        )
        of_files = splits_of(table, {clip.path: named[clip.path] for clip in clips}, columns.split)
        splits = {clip.key: of_files[clip.path] for clip in clips}
    _tell_columns(str(table), columns)
    store = FileStore(folder, {clip.key: clip.path for clip in clips})
    return Recordings(str(table), clips, store, splits, columns, delimiter)


def _read_names(folder: Path, collection: str) -> Recordings:
    """A folder without a table: the names of files are their captions."""
    suffixes = AUDIO_SUFFIXES | MEDIA_SUFFIXES
    files = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise ValueError(f"{folder} holds no audio files and no table. Correct `root`.")
    prefix = f"{collection}/" if collection else ""
    found: dict[object, Clip] = {}
    for file in files:
        path = file.as_posix()
        caption = normalize_title(file.stem) or file.stem
        identity = file_identity(path, folder)
        clip = found.setdefault(identity, Clip(f"file:{prefix}{path}", (), name=path, path=path))
        if caption not in clip.captions:  # links are other names of the file
            found[identity] = replace(clip, captions=(*clip.captions, caption))
    clips = list(found.values())
    rank_zero_warn(
        f"There is no table in {folder}, so the names of its {len(clips)} audio files are their captions, "
        f"such as {clips[0].captions[0]!r}. To search sounds this is enough. Name a CSV with descriptions as "
        "`annotations` to train on them."
    )
    store = FileStore(folder, {clip.key: clip.path for clip in clips})
    return Recordings(str(folder), clips, store)


def _read_parquet(folder: Path, table: Path, form: TableFormat) -> Recordings:
    datasets = import_optional("datasets")
    try:
        import_optional("pyarrow.parquet").read_schema(table)
    except (OSError, ValueError) as error:
        raise ValueError(f"{table}: not a parquet file, or one that was cut short ({error}).") from error
    return _read_parts(str(table), {"train": datasets.Dataset.from_parquet(str(table))}, folder, form)


def _read_hub(name: str, form: TableFormat) -> Recordings:
    return _read_parts(name, load_hub(name), None, form)


def _read_parts(where: str, parts: Mapping[str, Any], folder: Path | None, form: TableFormat) -> Recordings:
    """The clips of the splits of a table that the `datasets` library has loaded.

    Rows with the same audio are one clip. Names may repeat: then the number of the row is added. Paths of
    audio are relative to the folder; None: to the current one, and names are as the table has them.
    """
    datasets = import_optional("datasets")
    tables = list(parts.values())
    columns = _columns_of(where, tables[0], form)
    wanted = list(dict.fromkeys([columns.filename, *columns.captions, columns.clip_id, columns.split]))
    kept = [name for name in wanted if name is not None]
    for table in tables:
        check_columns(Path(where), table.column_names, kept, ",", "Each split needs the same columns.")
    whole = datasets.concatenate_datasets([table.select_columns(kept) for table in tables])
    if columns.filename != _AUDIO:
        whole = whole.rename_column(columns.filename, _AUDIO)
    whole = cast_audio(whole, _AUDIO)
    classes = {name: kind for name, kind in whole.features.items() if isinstance(kind, datasets.ClassLabel)}
    part_of_row = [name for name, table in parts.items() for _ in range(len(table))]

    collector = ClipCollector(where)
    keys: dict[tuple[str, object], str] = {}  # by split and identity
    owners: dict[str, tuple[str, object]] = {}
    first_names: dict[str, str] = {}  # by key
    said: dict[str, set[str]] = {}
    clip_ids: dict[str, str] = {}
    splits: dict[str, str] = {}
    prefix = f"{form.collection}/" if form.collection else ""
    for number, row in enumerate(whole):
        # A class is stored as the number of its name.
        row |= {name: kind.int2str(row[name]) for name, kind in classes.items() if row[name] is not None}
        part = part_of_row[number] if columns.split is None else str(row[columns.split])
        name, identity = _identify(row[_AUDIO], number, folder)
        key = keys.setdefault((part, identity), f"file:{prefix}{name}")
        if owners.setdefault(key, (part, identity)) != (part, identity):
            name = f"{name}#{number}"
            key = keys[part, identity] = f"file:{prefix}{name}"
            owners[key] = (part, identity)
        name = first_names.setdefault(key, name)
        splits[key] = part
        texts = [
            text
            for column in columns.captions
            for text in texts_of_cell(row[column], f"{where}, row {number}: column {column!r}")
        ]
        new = [text for text in dict.fromkeys(texts) if text not in said.setdefault(key, set())]
        said[key].update(new)
        clip_id = ""
        if columns.clip_id is not None:
            clip_id = given_text(str(row[columns.clip_id]))
            if not clip_id:
                fault = f"says {row[columns.clip_id]!r}" if row[columns.clip_id] else "is empty"
                raise ValueError(
                    f"{where}, row {number}: column {columns.clip_id!r} {fault}. Fill it or remove the row."
                )
            earlier = clip_ids.setdefault(key, clip_id)
            if earlier != clip_id:
                raise ValueError(
                    f"{where}, row {number}: the audio {name!r} has the clip id {clip_id!r}, but had "
                    f"{earlier!r} above. Give all rows of the same audio the same clip id; if "
                    f"{columns.clip_id!r} holds none, pass `clip_id_column=None`."
                )
        group = clip_id and prefix + clip_id
        collector.add(f"row {number}", key, new, name=name, repeated=False, group=group, row=number)
    clips = collector.clips()
    _warn_of_common(where, keys)
    divided: dict[str, Split] = {}
    if columns.split is not None or len(parts) > 1:
        named = {clip.key: splits[clip.key] for clip in clips}
        divided = splits_of(where, named, columns.split or "split")
    _tell_columns(where, columns)
    return Recordings(where, clips, ColumnStore(whole, where, folder or Path()), divided, columns)


def _columns_of(where: str, table: Any, form: TableFormat) -> Columns:
    """The columns of a table, that of the audio by its type where that is known."""
    audio_type = import_optional("datasets").Audio
    of_audio = [name for name, kind in table.features.items() if isinstance(kind, audio_type)]
    filename = form.filename_column
    if filename == AUTO and len(of_audio) == 1:
        filename = of_audio[0]
    return find_columns(
        where,
        table.column_names,
        filename=filename,
        captions=form.caption_columns,
        clip_id=form.clip_id_column,
        split=form.split_column,
    )


def _identify(audio: Any, number: int, folder: Path | None) -> tuple[str, object]:
    """The name of a cell of audio, and what is the same for all cells with the same audio."""
    content = audio.get("bytes") if isinstance(audio, Mapping) else None
    path = audio.get("path") if isinstance(audio, Mapping) else None
    name = str(path) if path else f"row {number}"
    if content:
        return name, hashlib.blake2b(content, digest_size=16).hexdigest()
    if not path:
        return name, name
    return plain_path(name, folder), file_identity(name, folder or Path())


def _warn_of_common(where: str, keys: Mapping[tuple[str, object], str]) -> None:
    """Warn of audio that is in training and in another split."""
    training = {identity for part, identity in keys if split_named(part) == "train"}
    common = [
        key for (part, identity), key in keys.items() if split_named(part) != "train" and identity in training
    ]
    if common:
        rank_zero_warn(
            f"{where}: {len(common)} validation and test clips have the audio of a training clip "
            f"({abbreviate(common)}). Results on them say nothing. Remove them from one split."
        )


def _tell_columns(where: str, columns: Columns) -> None:
    """Say which columns are read."""
    names = {
        "audio": columns.filename,
        "captions": ", ".join(columns.captions),
        "clip ids": columns.clip_id,
        "splits": columns.split,
    }
    found = ", ".join(f"{role} in column {name!r}" for role, name in names.items() if name)
    rank_zero_info(f"{where}: {found}.")


def missing_splits(splits: Mapping[str, Split]) -> list[Split]:
    """The splits that have no clip.

    Args:
        splits: Split of each clip.

    Examples:
        >>> missing_splits({"a": "train", "b": "test"})
        ['val']
    """
    return [split for split in SPLITS if split not in splits.values()]

"""The published annotation files of AudioCaps, Clotho and WavCaps, read into clips."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ask_lightning.data.clips import Clip, ClipCollector
from ask_lightning.data.keys import (
    NAMESPACES,
    file_stem,
    normalize_title,
    recording_key,
    stretch_keys,
    youtube_id,
)
from ask_lightning.data.published.collections import COLLECTIONS
from ask_lightning.data.tables import (
    caption_columns,
    numbered_rows,
    read_header,
    read_json,
    read_rows,
    read_text,
)

_NO_PATH = ("", "wav_path")  # what WavCaps writes where its makers had the path of a file


class _TitledRow(NamedTuple):
    """A row that names a file, and the FreeSound id of the sound that it was cut from, if that is known."""

    place: str
    name: str
    captions: list[str]
    sound: str | None
    path: str = ""


def read_audiocaps(annotations: str | Path) -> list[Clip]:
    r"""Read a split of AudioCaps.

    Rows with the same video and the same start are captions of one clip. If a video occurs with several
    starts, each of them is a clip of its own.

    Args:
        annotations: Path of the CSV: the official one of versions 1 and 2 (`audiocap_id`, `youtube_id`,
            `start_time`, `caption`), or that of ML-ACT (`file_name` and `caption` or `caption_1` and so on).

    Returns:
        The clips, with keys of the namespace `youtube` and the `audiocap_id` of each caption as aliases.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not as published; the message says where.

    Examples:
        >>> path = getfixture("tmp_path") / "val.csv"
        >>> _ = path.write_text("audiocap_id,youtube_id,start_time,caption\n97151,vfY_TJq7n_U,130,Ducks")
        >>> read_audiocaps(path)[0].key
        'youtube:vfY_TJq7n_U'
    """
    table = Path(annotations)
    if "youtube_id" not in (header := read_header(table)) and "file_name" in header:
        return _read_table_of_files(table, "youtube")
    remedy = "AudioCaps has audiocap_id, youtube_id, start_time and caption."
    rows = list(read_rows(table, ["audiocap_id", "youtube_id", "start_time", "caption"], remedy=remedy))
    starts: dict[str, set[int]] = defaultdict(set)
    for line, row in rows:
        if not row["youtube_id"]:
            raise ValueError(
                f"{table}, line {line}: column 'youtube_id' is empty. Fill it or remove the row."
            )
        starts[row["youtube_id"]].add(_parse_start(table, line, row["start_time"]))
    collector = ClipCollector(str(table))
    seen: set[str] = set()
    for line, row in rows:
        video, start = row["youtube_id"], _parse_start(table, line, row["start_time"])
        key, aliases = stretch_keys(recording_key("youtube", video), start, starts[video])
        collector.add(
            f"line {line}",
            key,
            [row["caption"]],
            name=video,
            aliases=[*aliases, recording_key("audiocap", row["audiocap_id"])],
            repeated=row["audiocap_id"] in seen,
            start=start,
        )
        seen.add(row["audiocap_id"])
    return collector.clips()


def read_clotho(annotations: str | Path, metadata: str | Path | None = None) -> list[Clip]:
    r"""Read a split of Clotho.

    Args:
        annotations: Path of the CSV of captions (`file_name`, `caption_1` to `caption_5`), or of the JSON of
            the repositories of WavCaps and ML-CLAP. There the title of a clip is the file name of `wav`, else
            of `audio`; an `id` is a FreeSound id if it is a number, and otherwise none.
        metadata: Path of the CSV of metadata of the same split (`file_name`, `sound_id`). With FreeSound ids
            these are the keys of the clips, which WavCaps has too; without them, their titles.

    Returns:
        The clips, with keys of the namespace `freesound` or `file`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not as published; the message says where.

    Examples:
        >>> path = getfixture("tmp_path") / "clotho_captions_validation.csv"
        >>> _ = path.write_text("file_name,caption_1,caption_2\nRain 1.wav,rain,it rains")
        >>> read_clotho(path)
        [Clip(key='file:rain 1', captions=('rain', 'it rains'), name='Rain 1.wav', ...)]
    """
    sounds = {} if metadata is None else _read_sound_ids(Path(metadata))
    table = Path(annotations)
    if table.suffix.lower() == ".json":
        return _read_clotho_json(table, sounds)
    return _read_table_of_files(table, "file", sounds)


def read_wavcaps(annotations: str | Path, collection: str | None = None) -> list[Clip]:
    """Read one JSON of WavCaps, or of AudioCaps written in the same way. For Clotho's see `read_clotho`.

    Clips of YouTube whose `id` is none of YouTube, such as a checksum, are named by their file.

    Args:
        annotations: Path of the JSON: an object with a list `data` of objects with `id` and `caption`, or
            `caption_1` and so on.
        collection: `"AudioSet_SL"`, `"FreeSound"`, `"BBC_Sound_Effects"`, `"SoundBible"`, `"AudioCaps"` or
            `"Clotho"`. None: inferred from the name of the file and its entries.

    Returns:
        The clips, with keys of the namespaces `youtube`, `freesound`, `bbc`, `soundbible` or else `file`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not as published; the message says which entry.

    Examples:
        >>> path = getfixture("tmp_path") / "sb_final.json"
        >>> entry = '{"id": "2219", "caption": "An airplane is landing.", "audio": "wav_path"}'
        >>> _ = path.write_text('{"num_captions_per_audio": 1, "data": [' + entry + ']}')
        >>> read_wavcaps(path)[0].key
        'soundbible:2219'
    """
    table = Path(annotations)
    if collection is not None and collection.lower() not in NAMESPACES:
        names = [known.name for known in COLLECTIONS]
        raise ValueError(f"Argument `collection` has to be one of {names}, but got {collection!r}.")
    if (collection or table.stem).lower().startswith("clotho"):
        return _read_clotho_json(table, {})
    entries = _read_entries(table)
    given = None if collection is None else NAMESPACES[collection.lower()]
    given = given or next(
        (known.namespace for known in COLLECTIONS if Path(known.table).stem in table.name.lower()), None
    )
    collections = {known.namespace: known.name for known in COLLECTIONS}
    collector = ClipCollector(str(table))
    for number, entry in enumerate(entries):
        place = f"entry {number}"
        name = _text(entry, "id") or _file_name(entry)
        if given == "youtube" and not youtube_id(name) and youtube_id(_file_name(entry)):
            name = _file_name(entry)
        captions = _captions_of(entry)
        if not name or captions is None:
            lacking = "'id'" if not name else "'caption'"
            raise ValueError(
                f"{table}, {place}: no {lacking}; it has {sorted(entry)}. Is it a JSON of WavCaps?"
            )
        space = given or _guess_namespace(entry, name)
        title = _text(entry, "file_name")
        collector.add(
            place,
            recording_key(space, name),
            captions,
            name=name,
            aliases=[recording_key("file", title)] if normalize_title(title) else [],
            collection=collections.get(space, ""),
            path=_path(entry, ("audio", "wav")),
        )
    return collector.clips()


def _read_table_of_files(table: Path, namespace: str, sounds: Mapping[str, str] | None = None) -> list[Clip]:
    """Read a CSV with a column of file names and one or more columns of captions."""
    columns = caption_columns(read_header(table)) or ["caption_1"]
    remedy = "The published file has file_name and caption_1 to caption_5 (or caption)."
    rows: list[_TitledRow] = []
    for line, row in read_rows(table, ["file_name", *columns], remedy=remedy):
        name = row["file_name"]
        if not name:
            raise ValueError(f"{table}, line {line}: column 'file_name' is empty. Fill it or remove the row.")
        captions = [row[column] for column in columns]
        rows.append(_TitledRow(f"line {line}", name, captions, (sounds or {}).get(normalize_title(name))))
    return _titled_clips(table, rows, namespace)


def _read_clotho_json(table: Path, sounds: Mapping[str, str]) -> list[Clip]:
    """Read a split of Clotho in the form of WavCaps."""
    rows: list[_TitledRow] = []
    for number, entry in enumerate(_read_entries(table)):
        name, captions = _file_name(entry), _captions_of(entry)
        if not name or captions is None:
            lacking = "'wav' or 'audio' that names a file" if not name else "'caption'"
            raise ValueError(f"{table}, entry {number}: no {lacking}; it has {sorted(entry)}.")
        given = _text(entry, "id")
        sound = given if given.isdecimal() else sounds.get(normalize_title(name))
        rows.append(_TitledRow(f"entry {number}", name, captions, sound, _path(entry, ("wav", "audio"))))
    return _titled_clips(table, rows, "file")


def _titled_clips(table: Path, rows: Sequence[_TitledRow], namespace: str) -> list[Clip]:
    """The clips of rows that name files."""
    sound_of = {row.name: row.sound for row in rows}
    files_of = Counter(sound_of.values())
    collector = ClipCollector(str(table))
    for row in rows:
        # Two files that were cut from the same sound are two clips.
        keys = [recording_key(namespace, row.name)]
        if sound := sound_of[row.name]:
            keys.insert(0 if files_of[sound] == 1 else len(keys), recording_key("freesound", sound))
        clip_key, *aliases = keys
        collector.add(row.place, clip_key, row.captions, name=row.name, aliases=aliases, path=row.path)
    return collector.clips()


def _read_entries(table: Path) -> list[Mapping[str, Any]]:
    """The clips in a JSON in the form of WavCaps."""
    content = read_json(table)
    entries = content.get("data") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"{table}: no list 'data' of objects. WavCaps has an object with that key.")
    return entries


def _text(entry: Mapping[str, Any], field: str) -> str:
    """What a field of an entry says; nothing if it is null or not there."""
    value = entry.get(field)
    return "" if value is None else str(value)


def _path(entry: Mapping[str, Any], fields: Sequence[str]) -> str:
    """The path of the file of an entry on the machine of its makers, or nothing."""
    return next((path for path in (_text(entry, field) for field in fields) if path not in _NO_PATH), "")


def _file_name(entry: Mapping[str, Any]) -> str:
    """The name of the file of an entry, or nothing."""
    return PurePosixPath(_path(entry, ("wav", "audio"))).name.strip()


def _read_sound_ids(metadata: Path) -> dict[str, str]:
    """Read FreeSound ids by normalised title."""
    try:
        text = read_text(metadata)
    except ValueError:
        text = read_text(metadata, "latin-1")  # some of the published ones are; only the ids matter
    rows = numbered_rows(metadata, text, ",")
    _, header = next(rows, (0, []))
    if "file_name" not in header or "sound_id" not in header:
        raise ValueError(
            f"{metadata}: no columns 'file_name' and 'sound_id'; it has {header}. Clotho has both."
        )
    name, sound = header.index("file_name"), header.index("sound_id")
    return {
        normalize_title(fields[name]): fields[sound]
        for _, fields in rows
        if len(fields) == len(header) and fields[sound].isdigit()
    }


def _captions_of(entry: Mapping[str, Any]) -> list[str] | None:
    """All captions of an entry, or None if it has none or something else in their place."""
    columns = caption_columns(entry)
    captions: list[str] = []
    for given in (entry[column] for column in columns):
        if given is None or isinstance(given, str):
            captions.append(given or "")
        elif isinstance(given, Iterable) and not isinstance(given, Mapping):
            captions += ["" if caption is None else str(caption) for caption in given]  # empty: counted later
        else:
            return None
    return captions if columns else None


def _guess_namespace(entry: Mapping[str, Any], name: str) -> str:
    """The namespace of an entry of an unknown collection."""
    link = _text(entry, "download_link").lower()
    for known in COLLECTIONS:
        if known.site and known.site in link:
            return known.namespace
    # Names of Clotho's files may have twelve letters as well; only AudioSet's begin with a Y before the id.
    return "youtube" if youtube_id(name) and len(file_stem(name)) == 12 and name.startswith("Y") else "file"


def _parse_start(table: Path, line: int, text: str) -> int:
    """The start of a clip in whole seconds."""
    try:
        return int(float(text))
    except (ValueError, OverflowError):  # of infinity
        raise ValueError(
            f"{table}, line {line}: start_time has to be a number of seconds, but is {text!r}. "
            "Compare the line with the published file."
        ) from None

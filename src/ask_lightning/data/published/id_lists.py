"""Lists of clips by id, in files or not: those to leave out, and captions to replace or to add."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ask_lightning.data.clips import Clip, some
from ask_lightning.data.keys import NAMESPACES, possible_keys
from ask_lightning.data.tables import read_header, read_json, read_rows, read_text

EnrichMode = Literal["replace", "add"]

_ID_COLUMNS = (
    "clip_id",
    "id",
    "audiocap_id",
    "youtube_id",
    "file_name",
    "filename",
    "audio_name",
    "sound_id",
)
_CAPTION = re.compile(r"captions?(?:_\d+)?")


def read_ids(source: str | Path | Iterable[str]) -> list[frozenset[str]]:
    """Read a list of clips.

    Args:
        source: The ids themselves, or the path of a file that holds them: `.json` with a list, or an object
            of lists under the names of collections as in the black lists of WavCaps (`"AudioSet"`,
            `"FreeSound"`); `.csv` with a column called `id`, `youtube_id`, `file_name` or `sound_id`; any
            other with one id on a line. Ids are keys (`youtube:vfY_TJq7n_U`) or as any of the datasets
            writes them (`vfY_TJq7n_U`, `YvfY_TJq7n_U.wav`, `180913`, `Rain 1.wav`).

    Returns:
        For each id the keys that it may mean.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a list of ids.

    Examples:
        >>> path = getfixture("tmp_path") / "exclude.json"
        >>> _ = path.write_text('{"FreeSound": ["180913"]}')
        >>> read_ids(path)
        [frozenset({'freesound:180913'})]
    """
    if not isinstance(source, (str, Path)):
        return [possible_keys(str(name)) for name in source]
    path = Path(source)
    if path.suffix.lower() == ".json":
        return _ids_in_json(path, read_json(path))
    if path.suffix.lower() == ".csv":
        column = next((name for name in read_header(path) if name in _ID_COLUMNS), None)
        if column is not None:
            rows = read_rows(path, [column], remedy="")
            collection = "youtube" if column == "youtube_id" else None
            return [possible_keys(row[column], collection) for _, row in rows if row[column]]
    lines = (line.strip() for line in read_text(path).splitlines())
    return [possible_keys(line) for line in lines if line]


def without(clips: Sequence[Clip], excluded: str | Path | Iterable[str], where: str) -> list[Clip]:
    """The clips that are not on a list.

    Args:
        clips: Any.
        excluded: The list; see `read_ids`.
        where: What the clips are, for the report.

    Returns:
        Those that remain, in order. One line of the log says how many were left out; a list of which no clip
        is there is warned about.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a list of ids, or all clips are on it.

    Examples:
        >>> clips = [Clip("youtube:vfY_TJq7n_U", ("ducks",), "vfY_TJq7n_U"), Clip("file:a", ("rain",), "a")]
        >>> [clip.key for clip in without(clips, ["YvfY_TJq7n_U.wav"], "train")]
        ['file:a']
    """
    lists = read_ids(excluded)
    names = frozenset().union(*lists)
    remaining = [clip for clip in clips if not clip.keys & names]
    if clips and not remaining:
        raise ValueError(f"{where}: all {len(clips)} clips are on the exclusion list. Is it the right list?")
    count = len(clips) - len(remaining)
    if lists and not count:
        rank_zero_warn(
            f"{where}: none of the {len(lists)} ids of the exclusion list is there. Is it a list for another "
            "dataset?"
        )
    else:
        rank_zero_info(f"{where}: left out {count} of {len(clips)} clips that are on the exclusion list.")
    return remaining


def read_captions_by_id(path: str | Path) -> list[tuple[str, frozenset[str], list[str]]]:
    """Read captions that belong to clips of a dataset.

    Args:
        path: Of a CSV with a column of ids (`clip_id`, `id`, `audiocap_id`, `youtube_id` or `file_name`) and
            `caption`, or `caption_1` and so on; or of a JSON with an object from ids to a caption or a list
            of them, or a list of objects with `id` and `caption`, by itself or under `data`.

    Returns:
        For each entry its id, the keys that this may mean, and the captions.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is something else.

    Examples:
        >>> path = getfixture("tmp_path") / "enriched.json"
        >>> _ = path.write_text('{"vfY_TJq7n_U": ["Ducks quack beside a pond while two people talk."]}')
        >>> read_captions_by_id(path)[0][2]
        ['Ducks quack beside a pond while two people talk.']
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        return _captions_in_csv(path)
    content = read_json(path)
    if isinstance(content, Mapping) and isinstance(content.get("data"), list):
        content = content["data"]
    if isinstance(content, Mapping):
        return [(str(name), possible_keys(str(name)), _texts(given)) for name, given in content.items()]
    entries: list[tuple[str, frozenset[str], list[str]]] = []
    for number, entry in enumerate(content if isinstance(content, list) else [None]):
        column = next((name for name in _ID_COLUMNS if isinstance(entry, Mapping) and name in entry), None)
        captions = [entry[name] for name in entry if _CAPTION.fullmatch(name)] if column else []
        if not captions:
            raise ValueError(
                f"{path}, entry {number}: it has to be an object with an 'id' and a 'caption'. Or write one "
                "object from ids to captions."
            )
        texts = [text for given in captions for text in _texts(given)]
        entries.append((str(entry[column]), _keys(str(entry[column]), column), texts))
    return entries


def enrich(clips: Sequence[Clip], path: str | Path, mode: EnrichMode, where: str) -> list[Clip]:
    r"""Give clips other captions, or more.

    Args:
        clips: Any.
        path: Of the captions; see `read_captions_by_id`.
        mode: `"replace"`: a clip that the file lists has its captions only. `"add"`: in addition to its own.
        where: What the clips are, for the report.

    Returns:
        The clips in order; those that the file does not list are as they were. A warning says how many these
        are, and which ids of the file belong to no clip.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: `mode` is neither, the file is something else, or none of its ids belongs to a clip.

    Examples:
        >>> path = getfixture("tmp_path") / "enriched.csv"
        >>> _ = path.write_text("youtube_id,caption\nvfY_TJq7n_U,Ducks on a pond")
        >>> clips = [Clip("youtube:vfY_TJq7n_U", ("ducks",), "vfY_TJq7n_U")]
        >>> enrich(clips, path, "add", "train")[0].captions
        ('ducks', 'Ducks on a pond')
    """
    if mode not in ("replace", "add"):
        raise ValueError(f"Argument `enriched_mode` has to be 'replace' or 'add', but got {mode!r}.")
    owners: dict[str, int] = {name: number for number, clip in enumerate(clips) for name in clip.keys}
    new: dict[int, list[str]] = {}
    unknown: list[str] = []
    for name, keys, captions in read_captions_by_id(path):
        owner = next((owners[candidate] for candidate in sorted(keys) if candidate in owners), None)
        texts = [text.strip() for text in captions if text.strip()]
        if owner is None:
            unknown.append(name)
        elif texts:
            new.setdefault(owner, []).extend(texts)
    if not new:
        raise ValueError(
            f"{path}: none of its {len(unknown)} ids belongs to a clip of {where} ({some(unknown)}). Ids are "
            f"written like {clips[0].name!r} or {clips[0].key!r}."
        )
    if unknown or len(new) < len(clips):
        rank_zero_warn(
            f"{path}: captions for {len(new)} of {len(clips)} clips of {where}; {len(clips) - len(new)} keep "
            f"their own alone, and {len(unknown)} ids belong to no clip"
            + (f" ({some(unknown)})." if unknown else ".")
        )
    return [
        replace(clip, captions=((clip.captions if mode == "add" else ()) + tuple(new[number])))
        if number in new
        else clip
        for number, clip in enumerate(clips)
    ]


def _ids_in_json(path: Path, content: Any) -> list[frozenset[str]]:
    if isinstance(content, list):
        return [possible_keys(str(name)) for name in content]
    if isinstance(content, Mapping) and all(isinstance(names, list) for names in content.values()):
        return [
            possible_keys(str(name), collection) for collection, names in content.items() for name in names
        ]
    raise ValueError(
        f"{path}: it has to be a list of ids, or an object of lists with the collections as keys "
        f"({', '.join(NAMESPACES)})."
    )


def _captions_in_csv(path: Path) -> list[tuple[str, frozenset[str], list[str]]]:
    header = read_header(path)
    column = next((name for name in _ID_COLUMNS if name in header), None)
    captions = [name for name in header if _CAPTION.fullmatch(name)]
    remedy = f"It needs one of {', '.join(_ID_COLUMNS)}, and caption or caption_1 and so on."
    rows = list(read_rows(path, [column or "id", *(captions or ["caption"])], remedy=remedy))
    return [
        (row[column], _keys(row[column], column), [row[name] for name in captions])
        for _, row in rows
        if column is not None
    ]


def _keys(name: str, column: str | None) -> frozenset[str]:
    spaces = {"audiocap_id": "audiocap", "youtube_id": "youtube", "sound_id": "freesound", "file_name": None}
    return possible_keys(name, spaces.get(column or ""))


def _texts(given: object) -> list[str]:
    return [given] if isinstance(given, str) else [str(text) for text in given]  # type: ignore[attr-defined]

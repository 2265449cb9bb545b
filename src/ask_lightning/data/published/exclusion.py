"""Lists of clips to leave out, in files or in memory."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ask_lightning.data.clips import Clip
from ask_lightning.data.keys import NAMESPACES, possible_keys
from ask_lightning.data.tables import read_header, read_json, read_rows, read_text

ID_COLUMNS = (
    "clip_id",
    "id",
    "audiocap_id",
    "youtube_id",
    "file_name",
    "filename",
    "audio_name",
    "sound_id",
)
"""Names of the columns that may hold ids, the preferred ones first."""

_NAMESPACE_OF_COLUMN = {"audiocap_id": "audiocap", "youtube_id": "youtube", "sound_id": "freesound"}


def read_ids(source: str | Path | Iterable[str]) -> list[frozenset[str]]:
    """Read a list of ids.

    Args:
        source: The ids themselves, or the path of a file that holds them: `.json` with a list, or an object
            of lists under the names of collections as in the black lists of WavCaps (`"AudioSet"`,
            `"FreeSound"`); `.csv` with a column called `id`, `youtube_id`, `file_name` or `sound_id`; any
            other file with one id on a line. Ids are keys (`youtube:vfY_TJq7n_U`) or as any of the datasets
            writes them (`vfY_TJq7n_U`, `YvfY_TJq7n_U.wav`, `180913`, `Rain 1.wav`).

    Returns:
        For each id the keys that it may stand for.

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
        return _parse_json_ids(path, read_json(path))
    if path.suffix.lower() == ".csv":
        column = next((name for name in read_header(path) if name in ID_COLUMNS), None)
        if column is not None:
            rows = read_rows(path, [column], remedy="")
            return [keys_of_id(row[column], column) for _, row in rows if row[column]]
    lines = (line.strip() for line in read_text(path).splitlines())
    return [possible_keys(line) for line in lines if line]


def keys_of_id(name: str, column: str) -> frozenset[str]:
    """The keys that an id in a column of a table may stand for.

    Args:
        name: Id as the table has it.
        column: Name of the column, which tells the namespace of some ids.

    Examples:
        >>> keys_of_id("180913", "sound_id")
        frozenset({'freesound:180913'})
    """
    return possible_keys(name, _NAMESPACE_OF_COLUMN.get(column))


def exclude_clips(clips: Sequence[Clip], excluded: str | Path | Iterable[str], where: str) -> list[Clip]:
    """The clips that are not on a list.

    The number of excluded clips is logged. A list that excludes none of the clips is warned about.

    Args:
        clips: Clips to choose from.
        excluded: List of ids or path of a file; see `read_ids`.
        where: Name of the clips in messages.

    Returns:
        The remaining clips in order.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a list of ids, or all clips are on it.

    Examples:
        >>> clips = [Clip("youtube:vfY_TJq7n_U", ("ducks",), "vfY_TJq7n_U"), Clip("file:a", ("rain",), "a")]
        >>> [clip.key for clip in exclude_clips(clips, ["YvfY_TJq7n_U.wav"], "train")]
        ['file:a']
    """
    try:
        lists = read_ids(excluded)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{where}: there is no exclusion list at {excluded}. Correct the path in `exclude`."
        ) from error
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


def _parse_json_ids(path: Path, content: Any) -> list[frozenset[str]]:
    """The keys of each id in the content of a JSON file; see `read_ids`."""
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

"""Enriched captions for the clips of a published dataset, such as those of a re-annotated training set."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from lightning.pytorch.utilities import rank_zero_warn

from ask_lightning.data.clips import Clip, abbreviate, given_text
from ask_lightning.data.keys import possible_keys
from ask_lightning.data.published.exclusion import ID_COLUMNS, keys_of_id
from ask_lightning.data.tables import caption_columns, read_header, read_json, read_rows
from ask_lightning.utilities.arguments import check_choice

Mode = Literal["replace", "add"]
Use = Literal["knowledge", "train", "both"]


@dataclass(frozen=True)
class EnrichedCaptions:
    r"""Captions from a file that replace or complete those of a dataset.

    Args:
        path: Path of the captions by clip id, a CSV or JSON; see `read_captions_by_id`. None: there are none.
        mode: `"replace"`: clips that the file lists have only its captions. `"add"`: they keep their own as
            well.
        used_in: Whether the captions are used in the `"knowledge"`, in `"train"` or in `"both"`.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> path = getfixture("tmp_path") / "enriched.csv"
        >>> _ = path.write_text("youtube_id,caption\nvfY_TJq7n_U,Ducks on a pond")
        >>> clips = [Clip("youtube:vfY_TJq7n_U", ("ducks",), "vfY_TJq7n_U")]
        >>> EnrichedCaptions(path, mode="add").apply(clips, "train")[0].captions
        ('ducks', 'Ducks on a pond')
    """

    path: str | Path | None = None
    mode: Mode = "replace"
    used_in: Use = "knowledge"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("used_in", self.used_in, get_args(Use))

    def apply(self, clips: Sequence[Clip], where: str) -> list[Clip]:
        """Give clips the captions of the file.

        A warning says how many clips the file does not list, and which of its ids belong to no clip.

        Args:
            clips: Clips with their own captions.
            where: Name of the clips in messages.

        Returns:
            The clips in order. Those that the file does not list are unchanged.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is something else, none of its ids belongs to a clip, or one belongs to
                several.
        """
        if self.path is None:
            return list(clips)
        owners: dict[str, list[int]] = defaultdict(list)
        for number, clip in enumerate(clips):
            for key in clip.keys:
                owners[key].append(number)
        new: dict[int, list[str]] = {}
        unknown: list[str] = []
        for name, keys, captions in read_captions_by_id(self.path):
            found = next((owners[candidate] for candidate in sorted(keys) if candidate in owners), [])
            found = [number for number in found if clips[number].name == name] or found
            texts = [text for caption in captions if (text := given_text(caption))]
            if len(found) > 1:
                raise ValueError(
                    f"{self.path}: the id {name!r} stands for {len(found)} clips of {where} "
                    f"({abbreviate([clips[number].key for number in found])}). Write their keys, or the "
                    "`audiocap_id` of each caption, in its place."
                )
            if not found:
                unknown.append(name)
            elif texts:
                new.setdefault(found[0], []).extend(texts)
        if not new:
            raise ValueError(
                f"{self.path}: none of its {len(unknown)} ids belongs to a clip of {where} "
                f"({abbreviate(unknown)}). Ids are written like {clips[0].name!r} or {clips[0].key!r}."
            )
        if unknown or len(new) < len(clips):
            rank_zero_warn(
                f"{self.path}: captions for {len(new)} of {len(clips)} clips of {where}; "
                f"{len(clips) - len(new)} keep their own alone, and {len(unknown)} ids belong to no clip"
                + (f" ({abbreviate(unknown)})." if unknown else ".")
            )
        return [
            replace(clip, captions=(clip.captions if self.mode == "add" else ()) + tuple(new[number]))
            if number in new
            else clip
            for number, clip in enumerate(clips)
        ]


def read_captions_by_id(path: str | Path) -> list[tuple[str, frozenset[str], list[str]]]:
    """Read captions that belong to clips of a dataset.

    Args:
        path: Path of a CSV with a column of ids (`clip_id`, `id`, `audiocap_id`, `youtube_id` or `file_name`)
            and `caption`, or `caption_1` and so on; or of a JSON with an object from ids to a caption or list
            of captions, or a list of objects with `id` and `caption`, by itself or under `data`.

    Returns:
        For each entry its id, the keys that the id may stand for, and the captions.

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
        return _read_captions_csv(path)
    content = read_json(path)
    if isinstance(content, Mapping) and isinstance(content.get("data"), list):
        content = content["data"]
    if isinstance(content, Mapping):
        return [
            (name, possible_keys(name), _as_texts(path, f"id {name!r}", given))
            for name, given in content.items()
        ]
    entries: list[tuple[str, frozenset[str], list[str]]] = []
    for number, entry in enumerate(content if isinstance(content, list) else [None]):
        column = next((name for name in ID_COLUMNS if isinstance(entry, Mapping) and name in entry), None)
        captions = [entry[name] for name in caption_columns(entry)] if column else []
        if column is None or not captions:
            raise ValueError(
                f"{path}, entry {number}: it has to be an object with an 'id' and a 'caption'. Or write one "
                "object from ids to captions."
            )
        texts = [text for given in captions for text in _as_texts(path, f"entry {number}", given)]
        entries.append((str(entry[column]), keys_of_id(str(entry[column]), column), texts))
    return entries


def _read_captions_csv(path: Path) -> list[tuple[str, frozenset[str], list[str]]]:
    """Read captions by id from a CSV; see `read_captions_by_id`."""
    header = read_header(path)
    column = next((name for name in ID_COLUMNS if name in header), None)
    captions = caption_columns(header)
    remedy = f"It needs one of {', '.join(ID_COLUMNS)}, and caption or caption_1 and so on."
    rows = list(read_rows(path, [column or "id", *(captions or ["caption"])], remedy=remedy))
    return [
        (row[column], keys_of_id(row[column], column), [row[name] for name in captions])
        for _, row in rows
        if column is not None
    ]


def _as_texts(path: Path, place: str, given: object) -> list[str]:
    """One caption or a list of them; null is none."""
    listed = given if isinstance(given, list) else [given]
    texts = [text for text in listed if isinstance(text, str)]
    if len(texts) < len(listed) - listed.count(None):
        raise ValueError(
            f"{path}, {place}: a caption or a list of captions has to be there, but it is {given!r:.60}. "
            "Keep the texts alone."
        )
    return texts

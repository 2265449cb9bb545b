"""Tables of audio files and their captions, and how to split them."""

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ask_lightning.data.tables import check_columns, check_width, numbered_rows, read_text


@dataclass(frozen=True)
class CaptionedFile:
    """One caption of one audio file.

    Attributes:
        filename: Path of the file, relative to the folder of the dataset or absolute.
        caption: What is heard.
        clip_id: Same number, same recording: captions and takes that are all correct for each other.
    """

    filename: str
    caption: str
    clip_id: int


def read_captions(
    table: str | Path,
    *,
    filename: str = "filename",
    captions: str | Sequence[str] = "caption",
    clip_id: str | None = None,
    delimiter: str = ",",
    encoding: str = "utf-8",
) -> list[CaptionedFile]:
    r"""Read a CSV with a header line. A file with several captions has several columns, or several rows.

    Args:
        table: Path of the CSV.
        filename: Name of the column of audio files.
        captions: Name of the column of captions, or of several. Each makes a pair of its own.
        clip_id: Name of a column of any texts that says which rows are of one recording. None: a file is
            a recording.
        delimiter: What separates the fields.
        encoding: Of the CSV.

    Returns:
        The pairs in the order of the rows, then of the columns. Clips are numbered from 0 as they appear.

    Raises:
        FileNotFoundError: There is no such CSV.
        ValueError: It is empty, in another encoding, lacks a column, has a row with too many or too few
            fields, an empty field, or a file with two clip ids. The message says where, and what to do.

    Examples:
        >>> path = getfixture("tmp_path") / "clips.csv"
        >>> _ = path.write_text("filename,caption\na.wav,rain\nb.wav,wind\na.wav,it rains")
        >>> [(pair.caption, pair.clip_id) for pair in read_captions(path)]
        [('rain', 0), ('wind', 1), ('it rains', 0)]
    """
    table = Path(table)
    caption_columns = [captions] if isinstance(captions, str) else list(captions)
    if not caption_columns:
        raise ValueError("Argument `captions` has to name at least one column, but got none.")
    rows = numbered_rows(table, read_text(table, encoding), delimiter)
    _, header = next(rows, (0, []))
    if not header:
        raise ValueError(f"{table} is empty. It needs a header line and a row for each audio file.")
    columns = [filename, *caption_columns] + ([] if clip_id is None else [clip_id])
    remedy = "Name the columns by the arguments `filename`, `captions` and `clip_id`."
    check_columns(table, header, columns, delimiter, remedy)

    pairs: list[CaptionedFile] = []
    numbers: dict[str, int] = {}
    clip_of_file: dict[str, str] = {}
    for line, fields in rows:
        where = f"{table}, line {line}"
        check_width(table, line, fields, header, delimiter)
        row = dict(zip(header, fields, strict=True))
        for column in columns:
            if not row[column]:
                raise ValueError(
                    f"{where}: column {column!r} is empty. Fill it or remove the row; files with different "
                    "numbers of captions are written as one row for each caption."
                )
        clip = row[filename if clip_id is None else clip_id]
        earlier = clip_of_file.setdefault(row[filename], clip)
        if earlier != clip:
            raise ValueError(
                f"{where}: {row[filename]!r} has the clip id {clip!r}, but had {earlier!r} above. Give all "
                "rows of a file the same clip id."
            )
        number = numbers.setdefault(clip, len(numbers))
        pairs += [CaptionedFile(row[filename], row[column], number) for column in caption_columns]
    if not pairs:
        raise ValueError(f"{table} has a header but no rows. It needs a row for each audio file.")
    return pairs


def split_by_clip(clip_ids: Sequence[Hashable], fractions: Sequence[float], seed: int = 0) -> list[list[int]]:
    """Divide items into parts so that no clip is in two of them.

    Which part a clip falls into depends on `seed`, its id and the ids of the other clips, not on their
    order, and is the same on every machine.

    Args:
        clip_ids: Clip of each item: numbers or texts.
        fractions: Share of the clips in each part, each above 0, with sum 1.
        seed: Which division.

    Returns:
        For each part the indices of its items, ascending.

    Raises:
        ValueError: The fractions do not sum to 1, or a part would be empty.

    Examples:
        >>> train, val = split_by_clip([7, 7, 8, 9, 9, 10], (0.5, 0.5))
        >>> sorted(train + val), len(train) in (2, 3, 4)
        ([0, 1, 2, 3, 4, 5], True)
    """
    if not fractions or min(fractions) <= 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ValueError(f"Argument `fractions` has to be positive numbers with sum 1, but got {fractions}.")
    # Drawing lots by a hash, and not from a random generator: numpy and torch do not promise the same
    # permutation in every version.
    clips = sorted(set(clip_ids), key=lambda clip: hashlib.blake2b(f"{seed}:{clip}".encode()).digest())
    ends = [round(len(clips) * sum(fractions[: part + 1])) for part in range(len(fractions))]
    part_of_clip: dict[Hashable, int] = {}
    for part, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start == end:
            raise ValueError(
                f"Part {part} of `fractions` {fractions} would be empty: there are only {len(clips)} clips."
            )
        part_of_clip.update(dict.fromkeys(clips[start:end], part))
    parts: list[list[int]] = [[] for _ in fractions]
    for index, clip in enumerate(clip_ids):
        parts[part_of_clip[clip]].append(index)
    return parts

"""What the page searches, and how it chooses what to show. Axes: `N` clips, `d` width."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ask_lightning.data.audio.decoding import AudioFileError
from ask_lightning.utilities.case_folding import fold_case

MOST_SHOWN = 50
"""Largest number of clips that the page shows at once."""


class QueryError(ValueError):
    """A query that cannot be answered; the page shows the message."""


@dataclass(frozen=True)
class Match:
    """A clip as an answer to a query.

    Attributes:
        row: Number of the clip, from 0 to N - 1.
        score: What the answer is sorted by: the score of a refinement, or the cosine.
        cosine: Cosine similarity of the query and what it was compared with.
        caption: The caption that is shown with the clip.
    """

    row: int
    score: float
    cosine: float
    caption: str


@dataclass(frozen=True)
class Refinement:
    """An order of the clips that is better than that by cosine similarity, and can be turned off.

    Attributes:
        label: Words beside the switch.
        explanation: Words that say what it does.
        score: Name of its score.
        finds_all: Whether all clips are sorted, as `Collection.finds_all` says of the cosine.
    """

    label: str
    explanation: str
    score: str
    finds_all: bool = True


@dataclass(frozen=True, eq=False)
class Collection:
    """Clips that can be searched and heard.

    Attributes:
        title: Words that say which clips these are.
        names: Names of the N clips.
        captions: All captions of each of the N clips.
        files: Audio file of each of the N clips; None for those that cannot be heard.
        embeddings: Embeddings of the clips, `(N, d)`.
        by_text: Function that ranks the clips for a text, best first; the second argument says whether by the
            refinement, the third is a text that clips have to contain. It raises `QueryError` for a text that
            cannot be used.
        by_sound: Function that ranks clips or captions for the path of an audio file, best first, in the same
            way.
        file_names: Names of the files of the N clips by which a filter finds them. Empty: there are none.
        refinement: What sorts the clips better than cosine similarity, if there is something.
        finds_all: Whether a search by cosine similarity ranks all clips. Otherwise it finds the best ones
            alone, at least `MOST_SHOWN` if there are so many, and has to know which words clips have to
            contain, for what it does not find cannot be shown.
        key: Tells these clips from those that another server numbers, of whom a page may still be open.
    """

    title: str
    names: Sequence[str]
    captions: Sequence[Sequence[str]]
    files: Sequence[Path | None]
    embeddings: Tensor
    by_text: Callable[[str, bool, str], list[Match]]
    by_sound: Callable[[Path, bool, str], list[Match]]
    file_names: Sequence[str] = ()
    refinement: Refinement | None = None
    finds_all: bool = True
    key: str = field(default_factory=lambda: secrets.token_hex(8))

    def __len__(self) -> int:
        return len(self.names)

    def texts_of(self, row: int) -> list[str]:
        """The texts of a clip in which a filter looks for words: its name, its file name and its captions.

        Args:
            row: Number of the clip.
        """
        return [self.names[row], *self.file_names[row : row + 1], *self.captions[row]]


@dataclass(frozen=True)
class Answer:
    """What a query has found.

    Attributes:
        query: The text, or the path of an audio file. None: nothing has been asked yet.
        matches: The clips, best first, each once.
        refinement: What the clips are sorted by. None: by cosine similarity.
        finds_all: Whether all clips are there. Otherwise those are left out that lack the words they have to
            contain, and those that are not among the best.
        problem: The reason why there are no matches; empty if there are.
    """

    query: str | Path | None = None
    matches: tuple[Match, ...] = ()
    refinement: Refinement | None = None
    finds_all: bool = True
    problem: str = ""


def answer_query(
    collection: Collection, query: str | Path | None, refined: bool = False, words: str = ""
) -> Answer:
    """Search a collection.

    Args:
        collection: The clips.
        query: A text, or the path of an audio file. None: nothing to ask, which is answered by a problem.
        refined: Whether to sort by the refinement, where the collection has one.
        words: Text that the clips have to contain, where not all are found.

    Returns:
        The clips, best first. For a sound the score of a clip is that of its best caption. A query that
        cannot be used is answered by a problem.
    """
    if query is None or (isinstance(query, str) and not query.strip()):
        return Answer(query, problem="There is nothing to search for. Type some words or choose a sound.")
    refinement = collection.refinement if refined else None
    finds_all = collection.finds_all if refinement is None else refinement.finds_all
    given = (refinement is not None, "" if finds_all else words)
    try:
        if isinstance(query, str):
            matches = collection.by_text(query, *given)
        else:
            matches = collection.by_sound(query, *given)
    except (AudioFileError, QueryError, ImportError) as error:
        message = str(error)
        if isinstance(query, Path):  # the name that the user knows, not that of the upload
            message = message.replace(str(query), query.name)
        return Answer(query, problem=message)
    return Answer(query, tuple(best_of_each_clip(matches)), refinement, finds_all)


def best_of_each_clip(matches: Sequence[Match]) -> list[Match]:
    """Leave out all but the first match of each clip.

    Args:
        matches: Matches, best first.

    Examples:
        >>> found = [Match(3, 0.9, 0.9, "rain"), Match(1, 0.8, 0.8, "wind"), Match(3, 0.7, 0.7, "a storm")]
        >>> [match.caption for match in best_of_each_clip(found)]
        ['rain', 'wind']
    """
    first: dict[int, Match] = {}
    for match in matches:
        first.setdefault(match.row, match)
    return list(first.values())


def filter_matches(
    collection: Collection,
    matches: Sequence[Match],
    *,
    words: str = "",
    lowest: float | None = None,
    count: int = 10,
) -> list[Match]:
    """Choose the matches to show.

    Args:
        collection: The clips.
        matches: Matches, best first.
        words: Text that the name, the file name or a caption of a clip has to contain, in any case.
        lowest: Lowest score that is shown. None: all are.
        count: Largest number of matches.

    Returns:
        The first `count` of the matches that pass.
    """
    passed = [
        match
        for match in matches
        if (lowest is None or match.score >= lowest) and contains(collection, match.row, words)
    ]
    return passed[:count]


def contains(collection: Collection, row: int, words: str) -> bool:
    """Whether the name, the file name or a caption of a clip contains a text, in any case.

    Args:
        collection: The clips.
        row: Number of the clip.
        words: The text; spaces around it do not count.
    """
    wanted = fold_case(words.strip())
    return any(wanted in fold_case(text) for text in collection.texts_of(row))

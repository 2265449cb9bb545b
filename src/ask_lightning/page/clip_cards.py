"""Clips as HTML: players, spectrograms, scores. Whatever comes from data is escaped."""

from collections.abc import Sequence

from ask_lightning.page.collection import Answer, Collection, Match
from ask_lightning.page.texts import as_html

CLIP_PATH = "/clip"
"""Path of the server under which clips are: `/clip/3` the sound of clip 3, `/clip/3/spectrogram.png`, …

The page asks with the key of its collection, `/clip/3?of=KEY`.
"""

_WELCOME = "Describe a sound in words, or give one: the clips that fit best are listed here."


def answer_html(collection: Collection, answer: Answer, shown: Sequence[Match]) -> str:
    """The answer to a query as HTML.

    Args:
        collection: The clips.
        answer: All that was found.
        shown: The matches of it to show, best first.

    Returns:
        A heading that can be focused, a line that says what follows, and a list of clips. The page's script
        repeats the line where screen readers hear it.
    """
    heading = f'<h2 id="results" class="unseen" tabindex="-1" data-of="{collection.key}">Results</h2>'
    if answer.problem:
        return f'{heading}<p class="problem" role="alert">{as_html(answer.problem)}</p>'
    if answer.query is None:
        return f'{heading}<p class="status">{_WELCOME}</p>'
    lines = [f'{heading}<p class="status">{_describe(answer, shown)}</p>']
    if shown:
        lowest, highest = answer.matches[-1].score, answer.matches[0].score
        # Without the role, a list without visible numbers is none to some browsers.
        lines.append('<ol class="clips" role="list" aria-label="Clips that were found, best first">')
        for rank, match in enumerate(shown, start=1):
            share = (match.score - lowest) / (highest - lowest) if highest > lowest else 1.0
            score = _score_html(match, answer.refinement is not None, share)
            lines.append(f"<li>{clip_card(collection, match.row, match.caption, rank, score)}</li>")
        lines.append("</ol>")
    return "\n".join(lines)


def clip_card(
    collection: Collection, row: int, caption: str | None = None, rank: int | None = None, score: str = ""
) -> str:
    """A clip as HTML: caption, name, spectrogram, player and its other captions.

    Args:
        collection: The clips.
        row: Number of the clip.
        caption: The caption that stands above. None: the first caption of the clip.
        rank: Place of the clip in an answer, from 1. None: the clip is no answer.
        score: HTML of its score.
    """
    captions = collection.captions[row]
    headline = caption if caption is not None else captions[0] if captions else collection.names[row]
    place = "" if rank is None else f'<span class="rank" aria-hidden="true">{rank}</span>'
    others = [text for text in dict.fromkeys(captions) if text != headline]
    more = ""
    if others:
        items = "".join(f"<li>{as_html(text)}</li>" for text in others)
        word = "caption" if len(others) == 1 else "captions"
        more = (
            f"<details><summary>{len(others)} more {word}"
            f'<span class="unseen"> of {as_html(collection.names[row])}</span></summary>'
            f"<ul>{items}</ul></details>"
        )
    file = collection.files[row]
    subtitle = collection.names[row] if file is None else file.name
    return (
        f'<article class="clip" data-row="{row}" aria-label="{as_html(headline)}">'
        f"<header>{place}<h3>{as_html(headline)}</h3>{score}</header>"
        f'<p class="name">{as_html(subtitle)}</p>'
        f"{_sound_html(collection, row, headline)}{more}</article>"
    )


def _sound_html(collection: Collection, row: int, headline: str) -> str:
    """The spectrogram and the player of a clip, or why there are none."""
    file = collection.files[row]
    if file is None:
        return '<p class="problem">The folder of audio has no file of this clip, or several.</p>'
    address, key = f"{CLIP_PATH}/{row}", f"?of={collection.key}"
    name, words = as_html(file.name), as_html(headline)
    return (
        '<div class="picture">'
        f'<img src="{address}/spectrogram.png{key}" loading="lazy" width="640" height="128" '
        f'alt="Spectrogram of {name}: {words}">'
        '<span class="playhead" hidden></span></div>'
        f'<audio controls preload="none" src="{address}{key}" aria-label="Sound of {name}: {words}"></audio>'
    )


def _score_html(match: Match, refined: bool, share: float) -> str:
    """A score in figures and as a bar that is full at the best clip and empty at the worst one."""
    figures = f'<span class="score">score {match.score:.3f}</span>'
    if refined:
        figures += f'<span class="cosine">cosine {match.cosine:.3f}</span>'
    bar = f'<span class="bar" aria-hidden="true"><span style="width: {100 * share:.0f}%"></span></span>'
    return f'<p class="scores">{figures}{bar}</p>'


def _describe(answer: Answer, shown: Sequence[Match]) -> str:
    """What an answer shows, in a sentence, as HTML."""
    query = (
        f"“{as_html(answer.query)}”"
        if isinstance(answer.query, str)
        else f"the sound {as_html(answer.query.name) if answer.query else ''}"
    )
    if not shown:
        return f"No clip for {query} passes the filters. Loosen them to see some."
    kind = "cosine similarity" if answer.refinement is None else answer.refinement.score
    word = "clip" if len(answer.matches if answer.finds_all else shown) == 1 else "clips"
    total = f" of {len(answer.matches):,}" if answer.finds_all else ""
    return f"{len(shown)}{total} {word} for {query}, best first by {kind}."

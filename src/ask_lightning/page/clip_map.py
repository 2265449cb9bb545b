"""The map: clips as points, near to each other where their embeddings are. Axes: `n` clips, `d` width."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ask_lightning.callbacks.drift_map import project_to_plane
from ask_lightning.page.collection import Collection
from ask_lightning.page.texts import as_html
from ask_lightning.utilities.arguments import check_count
from ask_lightning.utilities.case_folding import fold_case

MOST_POINTS = 2000
"""Number of points up to which a map shows every clip; browsers become slow beyond."""

WIDTH, HEIGHT = 1000, 640
"""Size of the map in its own units."""

_MARGIN = 24


def choose_rows(total: int, count: int = MOST_POINTS) -> list[int]:
    """Clips that are shown on a map: all, or evenly spaced ones if there are too many.

    Args:
        total: Number of clips.
        count: Largest number of points, at least 1.

    Returns:
        Numbers of the clips, rising.

    Examples:
        >>> choose_rows(3), choose_rows(9, count=3)
        ([0, 1, 2], [0, 3, 6])
    """
    check_count("count", count)
    shown = min(total, count)
    return [number * total // shown for number in range(shown)]


def place_points(embeddings: Tensor) -> Tensor:
    """Places of clips on the map: their two principal components, which fill its frame.

    Args:
        embeddings: Embeddings `(n, d)`.

    Returns:
        `(n, 2)`, to the right from 0 to `WIDTH` and downwards from 0 to `HEIGHT`, with a margin. What does
        not vary lies in the middle.
    """
    plane = project_to_plane(embeddings)  # (n, 2)
    lowest, highest = plane.amin(dim=0), plane.amax(dim=0)  # (2,)
    size = torch.tensor([WIDTH, HEIGHT], dtype=torch.float32)
    span = highest - lowest
    shares = torch.where(span > 0, (plane - lowest) / span.clamp_min(1e-12), torch.tensor(0.5))
    shares[:, 1] = 1 - shares[:, 1]
    return _MARGIN + shares * (size - 2 * _MARGIN)


def map_html(collection: Collection, rows: Sequence[int], places: Tensor) -> str:
    """The map as HTML, whose points the keyboard reaches.

    Args:
        collection: The clips.
        rows: Numbers of the n clips on the map.
        places: Their places, `(n, 2)`.
    """
    points = []
    for number, (row, (right, down)) in enumerate(zip(rows, places.tolist(), strict=True)):
        captions = collection.captions[row]
        file = collection.files[row]
        name = collection.names[row] if file is None else file.name
        label = f"{captions[0]}, {name}" if captions else name
        texts = fold_case("\n".join(collection.texts_of(row)))
        points.append(
            f'<circle class="point" cx="{right:.1f}" cy="{down:.1f}" r="6" role="button" '
            f'tabindex="{-1 if number else 0}" data-row="{row}" data-texts="{as_html(texts)}" '
            f'aria-label="{as_html(label)}"></circle>'
        )
    total = len(collection)
    which = f"All {total:,} clips." if len(rows) == total else f"{len(rows):,} of {total:,} clips."
    return (
        f'<p class="hint" id="map-hint">{which} Clips lie near to each other where the model hears them '
        "alike: the two principal components of their embeddings. Point at a clip to read its caption, click "
        "to see and hear it; by keyboard, arrows go from clip to clip and Enter opens one.</p>"
        '<label class="mark">Mark clips that contain <input type="search" id="map-words" '
        'autocomplete="off"></label> <span id="map-count" role="status"></span>'
        '<div class="map-and-clip"><div class="map">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="Map of the clips" '
        f'aria-describedby="map-hint">{"".join(points)}</svg>'
        '<div id="map-label" aria-hidden="true" hidden></div></div>'
        '<section aria-label="Opened clip"><h2 class="unseen">Opened clip</h2>'
        '<div id="map-clip"><p class="none">No clip is open.</p></div></section></div>'
    )

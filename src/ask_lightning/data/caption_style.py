"""How captions are written when a model reads them: as published, or in lower case without punctuation."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

from ask_lightning.data.clips import Clip, abbreviate

CaptionStyle = Literal["raw", "plain"]
"""`"raw"`: captions as the dataset has them. `"plain"`: as `plain_caption` rewrites them."""

# What ML-CLAP removes, which is what ML-ACT removes, and brackets, bars, stars and full-width marks.
_PUNCTUATION = re.compile(r"[,.!?;:\"()|*，。！？；：、]")


def plain_caption(caption: str) -> str:
    """A caption in lower case, with spaces in place of punctuation, and without needless spaces.

    ML-ACT and ML-CLAP rewrite each caption so before their tokenizers see it. Apostrophes and hyphens stay.
    Of the marks that only ML-CLAP removes, `( ) | *` and full-width ones, ML-ACT's files hold eight in
    AudioCaps' training captions and none elsewhere.

    References:
        The function `_sentence_process` of Mei et al.'s public code (arXiv 2203.15537) and `text_preprocess`
        of Yan et al.'s (arXiv 2406.07012). Both leave a space at the end, and where there were three or more;
        no tokenizer tells these from one.

    Args:
        caption: Caption in any style.

    Examples:
        >>> plain_caption("A dog barks , then (quietly) it's raining.")
        "a dog barks then quietly it's raining"
    """
    return " ".join(_PUNCTUATION.sub(" ", caption.lower()).split())


def style_caption(caption: str, style: CaptionStyle) -> str:
    """A caption in a style.

    Args:
        caption: Caption as it was published or typed.
        style: Style of the result.

    Examples:
        >>> style_caption("Rain.", "raw"), style_caption("Rain.", "plain")
        ('Rain.', 'rain')
    """
    return plain_caption(caption) if style == "plain" else caption


def style_clips(clips: Sequence[Clip], style: CaptionStyle) -> list[Clip]:
    """Clips with their captions in a style.

    Captions of which nothing is left are left out, and clips without another caption too; a warning names
    them.

    Args:
        clips: Clips with captions as they were published.
        style: Style of the captions of the result.

    Examples:
        >>> [clip.captions for clip in style_clips([Clip("file:a", ("Rain!", "It rains."), "a")], "plain")]
        [('rain', 'it rains')]
    """
    if style == "raw":
        return list(clips)
    styled, empty = [], []
    for clip in clips:
        captions = tuple(text for caption in clip.captions if (text := plain_caption(caption)))
        if len(captions) < len(clip.captions):
            empty.append(clip.name)
        if captions:
            styled.append(clip if captions == clip.captions else replace(clip, captions=captions))
    if empty:
        rank_zero_warn(
            f"Nothing but punctuation is in captions of {len(empty)} clips ({abbreviate(empty)}). They are "
            'left out, because `caption_style="plain"` removes punctuation.'
        )
    return styled

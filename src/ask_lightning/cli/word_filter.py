"""Which clips or captions contain a text. Axes: `N` clips, `P` captions."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ask_lightning.cli.encoded_pairs import EncodedPairs, Side
from ask_lightning.cli.stored_texts import StoredTexts
from ask_lightning.utilities.case_folding import fold_case


@dataclass(frozen=True)
class WordFilter:
    """Lets pass the rows of a side whose caption, name or file name contains a text, in any case.

    Attributes:
        pairs: The encoded clips and captions.
        side: `"audio"`: a clip passes by any of its captions. `"text"`: a caption passes by itself, or by the
            name or file name of its clip.
        words: The text; spaces around it do not count.
        whole_clips: Whether a caption passes by the other captions of its clip, too.
    """

    pairs: EncodedPairs
    side: Side
    words: str
    whole_clips: bool = False

    @property
    def _wanted(self) -> str:
        return fold_case(self.words.strip())

    def __call__(self, row: int) -> bool:
        """Whether a row passes.

        Args:
            row: Number of the row.
        """
        pairs, wanted = self.pairs, self._wanted
        clip, captions = pairs.clip_and_captions(self.side, row)
        if self.whole_clips:
            captions = pairs.captions_of(clip)
        texts = (pairs.names[clip], *pairs.files[clip : clip + 1], *(pairs.captions[one] for one in captions))
        return any(wanted in fold_case(text) for text in texts)

    def rows(self) -> Tensor:
        """All rows that pass, rising, `(n,)` int64; far quicker than to ask of each."""
        clips = self._containing(self.pairs.names)  # (N,)
        if len(self.pairs.files):
            clips |= self._containing(self.pairs.files)
        captions = self._containing(self.pairs.captions)  # (P,)
        if self.side == "audio" or self.whole_clips:
            clips[self.pairs.clip_of[captions]] = True
        if self.side == "audio":
            return clips.nonzero()[:, 0]
        return (captions | clips[self.pairs.clip_of]).nonzero()[:, 0]

    def _containing(self, texts: Sequence[str]) -> Tensor:
        """Which of some texts contain the words, bool."""
        return StoredTexts.of(texts).containing(self._wanted)

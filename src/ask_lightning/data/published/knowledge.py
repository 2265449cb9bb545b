"""The source of the knowledge base of a published dataset."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ask_lightning.data.audio.options import AudioOptions
from ask_lightning.data.caption_style import CaptionStyle
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.clips import Clip, abbreviate
from ask_lightning.data.published.exclusion import exclude_clips
from ask_lightning.data.published.leakage import check_leakage, find_leakage
from ask_lightning.data.published.wavcaps import WavCaps


@dataclass(frozen=True)
class KnowledgeSource:
    """The clips that the knowledge base is built from: the training clips, or WavCaps.

    Args:
        wavcaps: Folder of WavCaps, if WavCaps is the source. None: the source is the training clips.
        collections: Names of the collections of WavCaps to use. None: all that are there.
        exclude: Clips to leave out, such as a published black list: path of a list, or ids; see `read_ids`.
        exclude_evaluation: Whether to leave validation and test clips out. If not, a warning says how many
            of them are in the source.

    Examples:
        >>> KnowledgeSource(wavcaps="/data/WavCaps", collections=["FreeSound"]).exclude_evaluation
        True
    """

    wavcaps: str | Path | None = None
    collections: Sequence[str] | None = None
    exclude: str | Path | Sequence[str] | None = None
    exclude_evaluation: bool = True

    def build(
        self,
        training: Callable[[], ClipDataset],
        evaluation: Sequence[Clip],
        audio: AudioOptions,
        *,
        caption_style: CaptionStyle = "raw",
        check_counts: bool = True,
    ) -> ClipDataset:
        """Make the dataset.

        Args:
            training: Function that returns the training clips. It is called only if they are the source.
            evaluation: Validation and test clips of all datasets that the model is tested on.
            audio: How the audio of WavCaps is read.
            caption_style: Style of the captions of WavCaps, as for `ClipDataset`.
            check_counts: Whether to warn of clip counts of WavCaps that were never published.

        Raises:
            ValueError: All clips of the source are evaluation clips.
        """
        if self.wavcaps is None:
            source = training()
            if self.exclude is not None:
                source = source.variant(clips=exclude_clips(source.clips, self.exclude, "the knowledge"))
        else:
            source = WavCaps(
                self.wavcaps,
                audio,
                collections=self.collections,
                exclude=self.exclude,
                caption_style=caption_style,
                check_counts=check_counts,
            )
        if not self.exclude_evaluation:
            check_leakage(source, evaluation)
            return source
        return _without_evaluation_clips(source, evaluation)


def _without_evaluation_clips(source: ClipDataset, evaluation: Sequence[Clip]) -> ClipDataset:
    """The clips of a source without those of evaluation sets, by id and title; warns of equal captions."""
    leakage = find_leakage(source, evaluation)
    leaked = {*leakage.by_id, *leakage.by_title}
    if leakage.by_caption:
        rank_zero_warn(
            f"{len(leakage.by_caption)} of {len(source.clips)} clips of the knowledge have the words of "
            f"a validation or test caption ({abbreviate(leakage.by_caption)}). They stay in it, since short "
            "captions repeat by chance. If they are the same recordings, leave them out with "
            '`KnowledgeSource(exclude=...)`; `leaked_ids(..., by=["caption"])` lists them.'
        )
    if not leaked:
        return source
    if len(leaked) == len(source.clips):
        raise ValueError(
            f"All {len(leaked)} clips of the knowledge are validation or test clips. Pass another "
            "`knowledge`, or one with `exclude_evaluation=False` if you mean it."
        )
    rank_zero_info(
        f"Left out of the knowledge: {len(leaked)} of {len(source.clips)} clips that validation or test "
        f"sets hold ({abbreviate(sorted(leaked))})."
    )
    return source.variant(clips=[clip for clip in source.clips if clip.key not in leaked])

"""The published sizes of the datasets, and what was found of them on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ask_lightning.data.clips import abbreviate
from ask_lightning.utilities.text_tables import Cell, markdown_table

# AudioCaps 1 and 2: READMEs and files of github.com/cdjkim/audiocaps, `dataset` and `dataset2.0`. The README
# of version 2 counts the lines of train.csv, two more than it has captions: some captions go over two lines.
# The copy OpenSound/AudioCaps on the hub, a row for each caption, lacks what YouTube had lost by then. The
# numbers of rows on its page are rounded; mteb/audiocaps_a2t, made of its test split, counts that exactly.
PUBLISHED_COUNTS: Mapping[tuple[str, str], Mapping[str, tuple[int | None, int | range]]] = {
    ("AudioCaps", "train"): {
        "version 1": (49_838, 49_838),
        "ML-ACT": (49_274, 49_274),
        "version 2": (91_254, 91_254),
        "version 2 by its README": (None, 91_256),
        "OpenSound": (None, range(45_150, 45_250)),
    },
    ("AudioCaps", "val"): {
        "version 1 and 2": (495, 2_475),
        "ML-ACT": (494, 2_470),
        "OpenSound": (None, range(2_215, 2_225)),
    },
    ("AudioCaps", "test"): {
        "version 1 and 2": (975, 4_875),
        "ML-ACT": (957, 4_785),
        "OpenSound": (883, 4_411),
    },
    ("Clotho", "train"): {"version 2.1": (3_839, 19_195), "version 1": (2_893, 14_465)},
    ("Clotho", "val"): {"version 2.1": (1_045, 5_225)},
    ("Clotho", "test"): {"version 1 and 2.1": (1_045, 5_225)},
    ("WavCaps", "AudioSet_SL"): {"WavCaps": (108_317, 108_317)},
    ("WavCaps", "BBC_Sound_Effects"): {"WavCaps": (31_201, 31_201)},
    ("WavCaps", "FreeSound"): {"WavCaps": (262_300, 262_300)},
    ("WavCaps", "SoundBible"): {"WavCaps": (1_232, 1_232)},
}
"""Numbers of clips and captions of each split by publication. No number of clips: none was published; a range
of captions: a rounded number was."""


@dataclass(frozen=True)
class SplitReport:
    """How much of a split is listed and how much of it was found.

    Attributes:
        dataset: `"AudioCaps"`, `"Clotho"` or `"WavCaps"`.
        split: `"train"`, `"val"`, `"test"` or, of WavCaps, the name of a collection.
        listed_clips: Number of clips in the annotation file.
        listed_captions: Number of captions in the annotation file.
        clips: Number of clips in use.
        captions: Number of captions in use.
        missing: Names of the clips without audio.
        variants: Number of files by the pattern of their names.
        problems: Other findings that a user should look at.

    Examples:
        >>> SplitReport("AudioCaps", "val", 495, 2475, 450, 2250).publication
        'version 1 and 2'
    """

    dataset: str
    split: str
    listed_clips: int
    listed_captions: int
    clips: int
    captions: int
    missing: Sequence[str] = ()
    variants: Mapping[str, int] = field(default_factory=dict)
    problems: Sequence[str] = ()

    @property
    def publication(self) -> str | None:
        """The publication with the counts of the annotation file, if there is one."""
        for name, (clips, captions) in PUBLISHED_COUNTS.get((self.dataset, self.split), {}).items():
            if self.listed_captions in _as_range(captions) and clips in (None, self.listed_clips):
                return name
        return None

    def __str__(self) -> str:
        origin = f" as {self.publication}" if self.publication else ""
        named = ", ".join(f"{pattern}: {count}" for pattern, count in self.variants.items())
        return (
            f"{self.dataset} {self.split}: {self.listed_clips} clips with {self.listed_captions} captions "
            f"listed{origin}; {self.clips} clips with {self.captions} captions in use, "
            f"{len(self.missing)} without audio" + (f"; files named {named}" if named else "")
        )


def log_report(report: SplitReport, *, check_counts: bool = True) -> None:
    """Log a report, and warn of missing clips, unknown counts and other problems.

    Args:
        report: Report of a split.
        check_counts: Whether to warn of counts that were never published.

    Examples:
        >>> log_report(SplitReport("AudioCaps", "val", 495, 2475, 495, 2475))
    """
    rank_zero_info(str(report))
    warnings = list(report.problems)
    if report.missing:
        warnings.insert(
            0, f"{len(report.missing)} clips have no audio ({abbreviate(report.missing)}) and are left out"
        )
    published = PUBLISHED_COUNTS.get((report.dataset, report.split))
    if check_counts and published and report.publication is None:
        known = "; ".join(
            f"{name} {f'{clips:,} clips with ' if clips else ''}{_describe_count(captions)} captions"
            for name, (clips, captions) in published.items()
        )
        warnings.append(
            f"{report.listed_clips:,} clips with {report.listed_captions:,} captions are listed, but "
            f"published are: {known}. Is the annotation file whole and of this split? Pass "
            "`check_counts=False` if you mean it"
        )
    if warnings:
        rank_zero_warn(f"{report.dataset} {report.split}: {'. '.join(warnings)}.")


def _as_range(count: int | range) -> range:
    return count if isinstance(count, range) else range(count, count + 1)


def _describe_count(count: int | range) -> str:
    """A number, or the round number for which a range stands."""
    return f"about {(count.start + count.stop) // 2:,}" if isinstance(count, range) else f"{count:,}"


def report_table(reports: Sequence[SplitReport]) -> str:
    """A table of reports in Markdown.

    Args:
        reports: Reports of splits, one for each row.

    Examples:
        >>> print(report_table([SplitReport("AudioCaps", "val", 495, 2475, 450, 2250, missing=["a"] * 45)]))
        | split | listed | as | in use | without audio |
        |---|---|---|---|---|
        | AudioCaps val | 495 / 2475 | version 1 and 2 | 450 / 2250 | 45 |
    """
    rows: list[list[Cell]] = [
        [
            f"{report.dataset} {report.split}",
            f"{report.listed_clips} / {report.listed_captions}",
            report.publication or "?",
            f"{report.clips} / {report.captions}",
            len(report.missing),
        ]
        for report in reports
    ]
    return markdown_table(["split", "listed", "as", "in use", "without audio"], rows)

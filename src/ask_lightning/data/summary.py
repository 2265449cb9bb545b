"""What there is in data: lengths, rates, captions, what is there twice, what cannot be read."""

import hashlib
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ask_lightning.data.audio.decoding import AudioFileError
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.clips import Clip
from ask_lightning.data.keys import plain_words

_WORDS_SHOWN = 20
_PIECE = 1 << 20


@dataclass
class SplitSummary:
    """What there is in a split.

    Attributes:
        clips: Number of clips.
        captions: Number of captions.
        seconds: Length of each clip.
        sample_rates: Number of clips by their rate in Hz.
        channels: Number of clips by their number of channels.
        captions_per_clip: Number of clips by how many captions they have.
        caption_words: Number of words of each caption.
    """

    clips: int = 0
    captions: int = 0
    seconds: list[float] = field(default_factory=list)
    sample_rates: Counter[int] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    captions_per_clip: Counter[int] = field(default_factory=Counter)
    caption_words: list[int] = field(default_factory=list)

    @property
    def hours(self) -> float:
        """Length of all clips together."""
        return sum(self.seconds) / 3600

    def as_dict(self) -> dict[str, Any]:
        """The numbers for a JSON file, of lengths the smallest, the median and the largest."""
        counts = {
            name: {str(value): number for value, number in sorted(getattr(self, name).items())}
            for name in ("sample_rates", "channels", "captions_per_clip")
        }
        return {
            "clips": self.clips,
            "captions": self.captions,
            "hours": round(self.hours, 4),
            "seconds": spread(self.seconds),
            "caption_words": spread(self.caption_words),
            **counts,
        }


@dataclass
class DataSummary:
    """What there is in all splits.

    Attributes:
        splits: Summary of each split.
        same_audio: Names of clips, with their splits, that have the same bytes: a list for each such audio.
        audio_in_two_splits: Those of these lists that reach over two splits.
        repeated_captions: Number of captions whose words are those of a caption of another recording. Takes
            of one recording may have the same.
        captions_in_two_splits: Validation and test clips that have the words of a training caption.
        unreadable: Reason by the key of each clip that cannot be read.
        words: The most frequent words of captions, with how often they occur.
    """

    splits: dict[str, SplitSummary]
    same_audio: list[list[str]]
    audio_in_two_splits: list[list[str]]
    repeated_captions: int
    captions_in_two_splits: list[str]
    unreadable: dict[str, str]
    words: list[tuple[str, int]]

    def as_dict(self) -> dict[str, Any]:
        """The summary for a JSON file."""
        return {
            "splits": {name: split.as_dict() for name, split in self.splits.items()},
            "same_audio": self.same_audio,
            "audio_in_two_splits": self.audio_in_two_splits,
            "repeated_captions": self.repeated_captions,
            "captions_in_two_splits": self.captions_in_two_splits,
            "unreadable": self.unreadable,
            "words": dict(self.words),
        }


def summarize(
    datasets: Mapping[str, ClipDataset], progress: Callable[[Sequence[Clip]], Iterable[Clip]] = iter
) -> DataSummary:
    r"""Look at all clips of all splits. Each file is opened, and its bytes are read; nothing is decoded.

    Args:
        datasets: Datasets by split.
        progress: Function that passes the clips of a split on and may show how far it is.

    Returns:
        What there is.

    Examples:
        >>> import numpy, soundfile
        >>> from ask_lightning.data import AudioFolder
        >>> folder = getfixture("tmp_path")
        >>> for name in ("a", "b"):
        ...     soundfile.write(folder / f"{name}.wav", numpy.zeros(8000), 8000)
        >>> _ = (folder / "clips.csv").write_text("file,caption\na.wav,rain\nb.wav,it rains")
        >>> found = summarize({"train": AudioFolder(folder, folder / "clips.csv")})
        >>> found.splits["train"].seconds, found.same_audio
        ([1.0, 1.0], [['a.wav (train)', 'b.wav (train)']])
    """
    splits: dict[str, SplitSummary] = {}
    unreadable: dict[str, str] = {}
    by_content: dict[str, list[tuple[str, str]]] = defaultdict(list)  # digest → split and name
    by_words: dict[str, list[tuple[str, Clip]]] = defaultdict(list)
    frequent: Counter[str] = Counter()
    for split, dataset in datasets.items():
        summary = splits[split] = SplitSummary()
        unreadable |= dataset.skipped
        for clip in progress(dataset.clips):
            try:
                with dataset.open(clip) as recording:
                    seconds, rate = recording.frames / recording.rate, recording.rate
                    channels = recording.read(0, 1).shape[1]
                digest = _digest(dataset, clip)
            except (AudioFileError, OSError) as error:
                unreadable[clip.key] = str(error)
                continue
            summary.clips += 1
            summary.captions += len(clip.captions)
            summary.seconds.append(seconds)
            summary.sample_rates[rate] += 1
            summary.channels[channels] += 1
            summary.captions_per_clip[len(clip.captions)] += 1
            if digest:
                by_content[digest].append((split, clip.name))
            for caption in clip.captions:
                words = caption.split()
                summary.caption_words.append(len(words))
                frequent.update(word for word in re.findall(r"[^\W\d_]{3,}", caption.lower()))
            for text in {plain_words(caption) for caption in clip.captions}:
                by_words[text].append((split, clip))
    same = [clips for clips in by_content.values() if len(clips) > 1]
    repeated = [clips for clips in by_words.values() if len({clip.recording for _, clip in clips}) > 1]
    known = [clips for clips in by_words.values() if any(split == "train" for split, _ in clips)]
    return DataSummary(
        splits=splits,
        same_audio=[_named(clips) for clips in same],
        audio_in_two_splits=[_named(clips) for clips in same if len({split for split, _ in clips}) > 1],
        repeated_captions=sum(map(len, repeated)),
        captions_in_two_splits=sorted(
            {clip.name for clips in known for split, clip in clips if split != "train"}
        ),
        unreadable=unreadable,
        words=frequent.most_common(_WORDS_SHOWN),
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """The smallest value, the median and the largest one.

    Args:
        values: Numbers, perhaps none.

    Examples:
        >>> spread([3, 1, 2])
        {'least': 1, 'median': 2, 'most': 3}
    """
    if not values:
        return {}
    return {
        "least": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "most": round(max(values), 3),
    }


def _named(clips: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{name} ({split})" for split, name in clips]


def _digest(dataset: ClipDataset, clip: Clip) -> str:
    """A checksum of the bytes of a clip's file; empty where a file holds many clips."""
    path, place = dataset.origin(clip)
    if place:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()

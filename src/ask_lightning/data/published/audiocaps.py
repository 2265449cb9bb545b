"""AudioCaps as a Lightning data module."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ask_lightning.data.clips import Clip
from ask_lightning.data.published.annotations import read_audiocaps, read_wavcaps
from ask_lightning.data.published.datamodule import PublishedData
from ask_lightning.data.published.file_index import FolderIndex, Matches, audiocaps_names, match_files
from ask_lightning.data.published.locate import SPLIT_WORDS


class AudioCapsData(PublishedData):
    """AudioCaps, version 1 or 2, official or as packed by ML-ACT.

    The page on data says how to lay it out. Clips that are gone from YouTube are left out and counted.

    Args:
        root: Folder of the dataset; all other arguments are those of `PublishedData`.

    Examples:
        >>> from ask_lightning.data.synthetic.published_layouts import write_audiocaps
        >>> root = write_audiocaps(getfixture("tmp_path"), num_train=8, num_val=2, num_test=2, seconds=1)
        >>> data = AudioCapsData(root, seconds=1, batch_size=4, check_counts=False)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["waveform"].shape, batch["num_samples"].tolist()
        (torch.Size([4, 32000]), [32000, 32000, 32000, 32000])
        >>> len(data.datasets["val"]), len(data.knowledge_dataset())
        (10, 8)
    """

    dataset_name: ClassVar[str] = "AudioCaps"
    namespace: ClassVar[str] = "youtube"

    def read_table(self, path: Path, split: str) -> list[Clip]:
        """See `PublishedData`."""
        return read_wavcaps(path, "AudioCaps") if path.suffix.lower() == ".json" else read_audiocaps(path)

    def match(self, clips: Sequence[Clip], index: FolderIndex, split: str) -> Matches:
        """See `PublishedData`."""
        return match_files(clips, index, audiocaps_names, prefer=lambda _: SPLIT_WORDS[split])

    def looked_for(self, clip: Clip) -> str:
        """See `PublishedData`."""
        names = ", ".join(name for _, name in audiocaps_names(clip))
        return f"{names} with any ending of audio"

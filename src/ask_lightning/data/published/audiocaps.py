"""AudioCaps as a Lightning data module."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ask_lightning.data.clips import Clip
from ask_lightning.data.published.annotations import read_audiocaps, read_wavcaps
from ask_lightning.data.published.datamodule import PublishedDataModule
from ask_lightning.data.published.file_index import FolderIndex, Matches, audiocaps_names, match_files
from ask_lightning.data.published.locate import SPLIT_WORDS
from ask_lightning.data.splits import Split


class AudioCapsData(PublishedDataModule):
    """AudioCaps, version 1 or 2, official or as packed by ML-ACT.

    The documentation of the data shows the layouts that are understood. Clips that have disappeared from
    YouTube are left out and counted.

    For arguments see `PublishedDataModule`.

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

    def read_annotations(self, path: Path, split: Split) -> list[Clip]:
        """Read the CSV or JSON of a split."""
        return read_wavcaps(path, "AudioCaps") if path.suffix.lower() == ".json" else read_audiocaps(path)

    def match_files(self, clips: Sequence[Clip], index: FolderIndex, split: Split) -> Matches:
        """Find the files of clips, in a folder named like the split if there is one."""
        return match_files(clips, index, audiocaps_names, prefer=lambda _: SPLIT_WORDS[split])

    def describe_file_names(self, clip: Clip) -> str:
        """The names that the file of a clip may have."""
        names = ", ".join(name for _, name in audiocaps_names(clip))
        return f"{names} with any ending of audio"

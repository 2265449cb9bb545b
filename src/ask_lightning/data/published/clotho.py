"""Clotho as a Lightning data module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from ask_lightning.data.audio.options import Crop
from ask_lightning.data.clips import Clip
from ask_lightning.data.published.annotations import read_clotho
from ask_lightning.data.published.datamodule import PublishedDataModule
from ask_lightning.data.published.file_index import FolderIndex, Matches, clotho_names, match_files
from ask_lightning.data.published.locate import SPLIT_WORDS, find_metadata_table
from ask_lightning.data.splits import Split


class ClothoData(PublishedDataModule):
    """Clotho 2.1, official or as packed by ML-ACT.

    The documentation of the data shows the layouts that are understood. Clips of 15 to 30 s are read whole
    and batches are padded, as ML-ACT does. With the official tables of metadata beside the captions, the keys
    of the clips are FreeSound ids, by which WavCaps can be searched for them.

    Args:
        root: Folder of the dataset.
        seconds: Length of a training crop, and the longest that a training waveform may be.
        train_crop: `"full"` for whole clips in padded batches, `"random"` or `"center"`.
        eval_crop: `"full"` or `"center"`.
        batch_size: Number of pairs in a batch of each process, at least 2.
        options: All other arguments of `PublishedDataModule`.

    Examples:
        >>> from ask_lightning.data.synthetic.published_layouts import write_clotho
        >>> root = write_clotho(getfixture("tmp_path"), num_train=4, num_val=2, num_test=2, seconds=1)
        >>> data = ClothoData(root, batch_size=4, check_counts=False)
        >>> next(iter(data.val_dataloader()))["waveform"].shape
        torch.Size([4, 32000])
        >>> len(data.datasets["train"])
        20
    """

    dataset_name: ClassVar[str] = "Clotho"
    namespace: ClassVar[str] = "file"

    def __init__(
        self,
        root: str | Path,
        *,
        seconds: float = 30.0,
        train_crop: Crop = "full",
        eval_crop: Literal["center", "full"] = "full",
        batch_size: int = 24,
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            seconds=seconds,
            train_crop=train_crop,
            eval_crop=eval_crop,
            batch_size=batch_size,
            **options,
        )

    def read_annotations(self, path: Path, split: Split) -> list[Clip]:
        """Read the CSV or JSON of a split, with the table of metadata beside it."""
        return read_clotho(path, find_metadata_table(path, SPLIT_WORDS[split]))

    def match_files(self, clips: Sequence[Clip], index: FolderIndex, split: Split) -> Matches:
        """Find the files of clips, but not in folders named like other splits."""
        others = [word for name, words in SPLIT_WORDS.items() if name != split for word in words]
        # Titles are not unique: a file of another split is another recording.
        return match_files(
            clips,
            index,
            clotho_names,
            prefer=lambda _: SPLIT_WORDS[split],
            reject=lambda _: others,
        )

    def describe_file_names(self, clip: Clip) -> str:
        """The names that the file of a clip may have."""
        names = ", ".join(name for _, name in clotho_names(clip)[:-1])
        return f"{names} with any ending of audio, but not below folders of other splits"

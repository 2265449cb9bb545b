"""Clotho as a Lightning data module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from ask_lightning.data.clip_dataset import Crop
from ask_lightning.data.clips import Clip
from ask_lightning.data.published.annotations import read_clotho, read_wavcaps
from ask_lightning.data.published.datamodule import PublishedData
from ask_lightning.data.published.file_index import FolderIndex, Matches, clotho_names, match_files
from ask_lightning.data.published.locate import SPLIT_WORDS, beside


class ClothoData(PublishedData):
    """Clotho 2.1, official or as packed by ML-ACT.

    The page on data says how to lay it out. Clips of 15 to 30 s are read whole, and batches padded, as
    ML-ACT does. With the official tables of metadata beside the captions, clips are known by their
    FreeSound ids, so that WavCaps can be checked for them.

    Args:
        root: Folder of the dataset.
        seconds: Length of a training crop, and the longest that a training waveform may be.
        train_crop: `"full"` for whole clips in padded batches, `"random"` or `"center"`.
        eval_crop: `"full"` or `"center"`.
        batch_size: Pairs in a batch of each process, at least 2.
        options: All other arguments are those of `PublishedData`.

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

    def read_table(self, path: Path, split: str) -> list[Clip]:
        """See `PublishedData`."""
        if path.suffix.lower() == ".json":
            return read_wavcaps(path, "file")
        return read_clotho(path, beside(path, SPLIT_WORDS[split]))

    def match(self, clips: Sequence[Clip], index: FolderIndex, split: str) -> Matches:
        """See `PublishedData`."""
        others = [word for name, words in SPLIT_WORDS.items() if name != split for word in words]
        # Titles are not unique: a file of another split is another recording.
        return match_files(
            clips,
            index,
            clotho_names,
            prefer=lambda _: SPLIT_WORDS[split],
            reject=lambda _: others,
        )

    def looked_for(self, clip: Clip) -> str:
        """See `PublishedData`."""
        names = ", ".join(name for _, name in clotho_names(clip)[:-1])
        return f"{names} with any ending of audio, but not below folders of other splits"

"""The clips of datasets that are made of others, by torch's `Subset` and `ConcatDataset`."""

from collections.abc import Sequence

from torch.utils.data import ConcatDataset, Subset

from ask_lightning.data.clip_dataset import ClipDataset


def clip_parts(dataset: object, items: Sequence[int] | None = None) -> list[ClipDataset]:
    r"""The datasets of clips that a dataset consists of.

    Args:
        dataset: A `ClipDataset`, a `Subset` or a `ConcatDataset` of such ones, or something else.
        items: Numbers of the items that count. None: all.

    Returns:
        The datasets with the clips and captions that count, in order; of other datasets none.

    Examples:
        >>> import numpy, soundfile
        >>> from ask_lightning.data import AudioFolder
        >>> folder = getfixture("tmp_path")
        >>> for name in ("a.wav", "b.wav"):
        ...     soundfile.write(folder / name, numpy.zeros(8000), 8000)
        >>> _ = (folder / "clips.csv").write_text("file,caption\na.wav,rain\na.wav,it rains\nb.wav,wind")
        >>> clips = AudioFolder(folder, folder / "clips.csv")
        >>> [clip.captions for part in clip_parts(Subset(clips, [1])) for clip in part.clips]
        [('it rains',)]
    """
    if isinstance(dataset, ClipDataset):
        return [dataset if items is None else dataset.of_items(items)]
    if isinstance(dataset, Subset):
        chosen = [int(index) for index in dataset.indices]
        return clip_parts(dataset.dataset, chosen if items is None else [chosen[item] for item in items])
    parts: list[ClipDataset] = []
    if isinstance(dataset, ConcatDataset):
        start = 0
        for part in dataset.datasets:
            end = start + len(part)  # type: ignore[arg-type]
            own = None if items is None else [item - start for item in items if start <= item < end]
            if own is None or own:
                parts += clip_parts(part, own)
            start = end
    return parts

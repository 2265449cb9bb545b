"""What the splits of a dataset share: recordings and captions that are in training and in evaluation."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from ask_lightning.data.captions import read_columns
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.clip_parts import clip_parts
from ask_lightning.data.clips import Clip, abbreviate
from ask_lightning.data.keys import plain_words


@dataclass(frozen=True)
class Overlap:
    """The evaluation clips of which training knows something. Lists hold names of clips.

    Attributes:
        recordings: Clips with the clip id, or the file, of a training clip.
        same_names: Clips of another folder with the name, and so the clip id, of a training clip.
        captions: Clips with the words of a training caption, capitals and signs aside.
        num_clips: Number of evaluation clips.
    """

    recordings: list[str]
    same_names: list[str]
    captions: list[str]
    num_clips: int


def find_overlap(train: Sequence[ClipDataset], evaluation: Sequence[ClipDataset]) -> Overlap:
    """Compare training with validation and test clips.

    Args:
        train: Datasets of the training clips.
        evaluation: Datasets of the validation and the test clips.

    Returns:
        What they share.
    """
    known = [(part, clip) for part in train for clip in part.clips]
    recordings = {clip.recording for _, clip in known}
    places = {_place_of(part, clip) for part, clip in known}
    captions = {plain_words(caption) for _, clip in known for caption in clip.captions}
    shared = Overlap([], [], [], sum(len(part.clips) for part in evaluation))
    for part in evaluation:
        for clip in part.clips:
            place = _place_of(part, clip)
            if place in places:
                shared.recordings.append(clip.name)
            elif clip.recording in recordings:
                (shared.recordings if clip.group else shared.same_names).append(clip.name)
            if any(plain_words(caption) in captions for caption in clip.captions):
                shared.captions.append(clip.name)
    return shared


def warn_of_overlap(where: str, datasets: Mapping[str, object], *, caption_remedy: str) -> None:
    """Warn if validation or test clips are known from training.

    Args:
        where: Name of the data in the warning.
        datasets: Datasets by split. Those without clips are not compared; of a `Subset` and a
            `ConcatDataset` the clips are those of their parts.
        caption_remedy: What to do about shared captions, the end of the warning.
    """
    train = clip_parts(datasets.get("train"))
    others = [part for name, whole in datasets.items() if name != "train" for part in clip_parts(whole)]
    if not train or not others:
        return
    shared = find_overlap(train, others)
    of_all = f"of {shared.num_clips} validation and test clips"
    if shared.recordings:
        rank_zero_warn(
            f"{where}: {len(shared.recordings)} {of_all} are recordings that training has too "
            f"({abbreviate(shared.recordings)}). Results on them say nothing. Remove them from one split."
        )
    if shared.same_names:
        rank_zero_warn(
            f"{where}: {len(shared.same_names)} {of_all} have the names, and so the clip ids, of training "
            f"clips in another folder ({abbreviate(shared.same_names)}). If they are other recordings, tell "
            "them apart by the argument `collection`."
        )
    if shared.captions:
        rank_zero_warn(
            f"{where}: {len(shared.captions)} {of_all} have the words of a training caption "
            f"({abbreviate(shared.captions)}). {caption_remedy}"
        )


def columns_across_splits(
    annotations: str | Path,
    parts: Sequence[Sequence[Clip]],
    *,
    filename_column: str,
    delimiter: str,
    encoding: str,
) -> dict[str, int]:
    """The columns of a table that may name recordings whose files are in several parts.

    These are columns whose values mostly belong to one file but sometimes to several, as those of an id of
    the source do; the values of a class or of a licence belong to many.

    Args:
        annotations: Path of the CSV.
        parts: Clips of each part, the training clips first.
        filename_column: Name of the column of audio files.
        delimiter: Character between the fields.
        encoding: Encoding of the CSV.

    Returns:
        For each column the number of clips in later parts that share its value with a clip of the first.
    """
    columns = read_columns(annotations, filename_column, delimiter=delimiter, encoding=encoding)
    found: dict[str, int] = {}
    for column, values in columns.items():
        known = [[values.get(clip.path, "") for clip in part] for part in parts]
        given = [value for part in known for value in part if value]
        if not len(given) / 2 <= len(set(given)) < len(given):
            continue
        first = set(known[0]) - {""}
        if count := sum(value in first for part in known[1:] for value in part):
            found[column] = count
    return found


def _place_of(dataset: ClipDataset, clip: Clip) -> object:
    """The file of a clip, and the place in it; the same for all names of one file."""
    path, place = dataset.origin(clip)
    if dataset.audio.check != "none":  # files were opened at the start, so looking at them again costs little
        try:
            state = os.stat(path)
        except OSError:
            pass
        else:
            if state.st_ino:
                return state.st_dev, state.st_ino, place
    return os.path.abspath(path), place

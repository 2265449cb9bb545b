"""Any folder of audio files with a CSV of captions as a dataset for retrieval."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ask_lightning.data.audio.options import AudioOptions, Check, Crop, Features
from ask_lightning.data.audio.stores import FileStore
from ask_lightning.data.caption_style import CaptionStyle
from ask_lightning.data.captions import read_captions
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.columns import AUTO


class AudioFolder(ClipDataset):
    r"""Audio files with captions that a CSV lists: wav, flac, ogg, mp3, and by PyAV m4a, mp4 and more.

    Items, crops, and the answer to files that cannot be used are those of `ClipDataset`.

    Args:
        root: Folder of the audio files.
        annotations: Path of the CSV.
        filename_column: Name of the column of audio files, which are relative to `root` or absolute.
            `"auto"`: it has one of the usual names, see `ask_lightning.data.columns`.
        caption_columns: Name of the column of captions, or names of several columns, or `"auto"`.
        clip_id_column: Name of the column of clip ids. None: each file is a clip of its own. `"auto"`: a
            column with a usual name, if there is one.
        delimiter: Character between the fields of the CSV. `"auto"`: as the header tells.
        encoding: Encoding of the CSV.
        caption_style: `"raw"` for captions as they are, `"plain"` for lower case without punctuation; see
            `ask_lightning.data.plain_caption`.
        collection: Name that keeps the clip ids apart from those of another folder that gives the same names
            to other recordings.
        sample_rate: Rate of the waveforms in Hz.
        seconds: Length of a crop.
        crop: `"random"`, `"center"` or `"full"`; see `AudioOptions`.
        features: None for waveforms, `"log_mel"` for spectrograms; see `AudioOptions`.
        num_mels: Number of mel bins of the spectrograms.
        seed: Seed of the random crops, at least 0.
        strict: Whether a file that cannot be used is an error, or left out with a warning.
        check: `"header"`, `"decode"` or `"none"`: how files are examined; see `AudioOptions`.
        cache: None, `"memory"` or a folder; see `AudioOptions`.

    Raises:
        FileNotFoundError: There is no such folder or CSV.
        AudioFileError: No file can be used, or one cannot and `strict` is set.
        ValueError: An argument is outside its range, or the CSV has a mistake; see `read_captions`.

    Examples:
        >>> import numpy, soundfile
        >>> folder = getfixture("tmp_path")
        >>> soundfile.write(folder / "a.wav", numpy.zeros((22050, 2)), 22050)
        >>> _ = (folder / "clips.csv").write_text("filename,caption\na.wav,silence")
        >>> clips = AudioFolder(folder, folder / "clips.csv", seconds=2)
        >>> clips[0]["waveform"].shape, clips[0]["num_samples"]
        (torch.Size([32000]), 16000)
    """

    def __init__(
        self,
        root: str | Path,
        annotations: str | Path,
        *,
        filename_column: str = AUTO,
        caption_columns: str | Sequence[str] = AUTO,
        clip_id_column: str | None = AUTO,
        delimiter: str = AUTO,
        encoding: str = "utf-8",
        caption_style: CaptionStyle = "raw",
        collection: str = "",
        sample_rate: int = 16000,
        seconds: float = 10.0,
        crop: Crop = "center",
        features: Features | None = None,
        num_mels: int = 64,
        seed: int = 0,
        strict: bool = False,
        check: Check = "header",
        cache: Literal["memory"] | str | Path | None = None,
    ) -> None:
        audio = AudioOptions(
            sample_rate=sample_rate,
            seconds=seconds,
            crop=crop,
            features=features,
            num_mels=num_mels,
            seed=seed,
            strict=strict,
            check=check,
            cache=cache,
        )
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"There is no folder of audio files at {root}. Correct `root`.")
        clips = read_captions(
            annotations,
            filename_column=filename_column,
            caption_columns=caption_columns,
            clip_id_column=clip_id_column,
            delimiter=delimiter,
            encoding=encoding,
            collection=collection,
            root=root,
        )
        store = FileStore(root, {clip.key: clip.path for clip in clips})
        super().__init__(clips, store, audio, caption_style=caption_style)

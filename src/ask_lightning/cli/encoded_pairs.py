"""Embeddings of a split, and the file that holds them. Axes: `N` clips, `P` captions, `d` width."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ask_lightning.cli.errors import UsageError, check_writable
from ask_lightning.cli.stored_texts import StoredTexts
from ask_lightning.data.caption_style import CaptionStyle
from ask_lightning.interaction import TokenEmbeddings, with_padding
from ask_lightning.knowledge.checksum import checksum
from ask_lightning.metrics import AudioTextRetrieval, Calibration, HubCalibration, QueryBank
from ask_lightning.metrics.table import CALIBRATED, mean_recall
from ask_lightning.utilities.atomic_files import atomic_write

Side = Literal["audio", "text"]
"""The clips or the captions."""

_FORMAT = "ask-lightning pairs 5"
_TENSORS = (
    *("audio", "text", "clip_ids", "clip_of"),
    *("audio_tokens", "audio_lengths", "text_tokens", "text_lengths"),
)
_TEXTS = ("names", "captions", "files")  # one for each clip or caption
_METADATA = ("model", "caption_style", "sample_rate")
_REMEDY = "Write it with `ask-lightning encode`."
# Bytes of a side's embeddings that are compared with their checksum: so many take a fifth of a second.
_LARGEST_CHECKED = 1 << 26


@dataclass
class EncodedPairs:
    """Clips and captions as unit vectors, and the model that encoded them.

    Attributes:
        audio: Embeddings of the clips, `(N, d)`.
        text: Embeddings of the captions, `(P, d)`.
        clip_ids: Ids of the clips, `(N,)` int64.
        clip_of: Row of each caption's clip in `audio`, `(P,)` int64.
        names: Names of the N clips: their keys, or the clip id that takes of one recording share.
        captions: Texts of the P captions.
        model: The model's class as `class_path`, the path of its weights as `checkpoint`, and their
            `fingerprint`.
        caption_style: Style of the captions, in which queries are encoded too.
        sample_rate: Rate of the waveforms in Hz, at which queries are heard too. None: the data did not say.
        calibration: What calibrated search subtracts from the scores of these clips and captions, or None.
        audio_tokens: Unit vectors of the frames of all clips one after another, `(frames, d)`, or None where
            the model has no interaction.
        audio_lengths: Number of frames of each clip, `(N,)` int64, or None.
        text_tokens: Unit vectors of the words of all captions one after another, `(words, d)`, or None.
        text_lengths: Number of words of each caption, `(P,)` int64, or None.
        files: Names of the N clips' audio files as their dataset writes them, most often relative paths; of
            takes of one recording that of the first. A name is empty where the dataset has none.
        checksums: Checksum of the embeddings of each side, `"audio"` and `"text"`, as the file says. Empty
            where the pairs are of no file.
        log_mel: Length of the clips in `"seconds"` and number of mel bins, `"num_mels"`, where the model was
            given log-mel spectrograms, so that queries are as well. None: it was given waveforms.
    """

    audio: Tensor
    text: Tensor
    clip_ids: Tensor
    clip_of: Tensor
    names: Sequence[str]
    captions: Sequence[str]
    model: dict[str, str | None] = field(default_factory=dict)
    caption_style: CaptionStyle = "raw"
    sample_rate: int | None = None
    calibration: HubCalibration | None = None
    files: Sequence[str] = ()
    audio_tokens: Tensor | None = None
    audio_lengths: Tensor | None = None
    text_tokens: Tensor | None = None
    text_lengths: Tensor | None = None
    checksums: dict[str, int] = field(default_factory=dict)
    log_mel: dict[str, Any] | None = None

    def captions_of(self, row: int) -> list[int]:
        """The rows of a clip's captions, rising.

        Args:
            row: Row of the clip.
        """
        order, ends = self._captions_by_clip
        start = int(ends[row - 1]) if row else 0
        found: list[int] = order[start : int(ends[row])].tolist()
        return found

    def clip_and_captions(self, side: Side, row: int) -> tuple[int, list[int]]:
        """The rows of a clip and all its captions, or of a caption's clip and that caption.

        Args:
            side: `"audio"`: the row is that of a clip. `"text"`: it is that of a caption.
            row: The row.
        """
        return (row, self.captions_of(row)) if side == "audio" else (int(self.clip_of[row]), [row])

    @cached_property
    def _captions_by_clip(self) -> tuple[Tensor, Tensor]:
        """The rows of the captions `(P,)` clip by clip, and where those of each clip end, `(N,)`."""
        order = self.clip_of.argsort(stable=True)
        return order, self.clip_of.bincount(minlength=len(self.names)).cumsum(0)

    @property
    def has_tokens(self) -> bool:
        """Whether there are frames and words beside the clips and captions."""
        return self.audio_tokens is not None and self.text_tokens is not None

    def with_tokens(self, side: Side, rows: Tensor) -> TokenEmbeddings:
        """Some clips with their frames, or captions with their words, in float32.

        Args:
            side: `"audio"` for clips, `"text"` for captions.
            rows: Numbers of the rows, `(n,)` int64.
        """
        pooled, tokens, lengths = (getattr(self, f"{side}{part}") for part in ("", "_tokens", "_lengths"))
        ends = lengths.cumsum(0)
        spans = zip((ends - lengths)[rows].tolist(), ends[rows].tolist(), strict=True)
        taken = torch.cat([tokens[start:end] for start, end in spans]).float()
        return with_padding(pooled[rows], taken, lengths[rows])

    def calibrate(self, training: "EncodedPairs", validation: "EncodedPairs") -> str:
        """Calibrate these clips and captions.

        Args:
            training: The training split, encoded by the same model: the bank.
            validation: The validation split, encoded by the same model, on which kind and parameters are
                chosen.

        Returns:
            Lines that say what was chosen, and what it does to the recall on the validation split.
        """
        bank = QueryBank(training.audio, training.text)
        metric = AudioTextRetrieval()
        clip_of = validation.clip_of
        metric.update(validation.audio[clip_of], validation.text, validation.clip_ids[clip_of])
        chosen = metric.choose_calibration(bank)
        metric.calibrate(bank, chosen)
        scores = metric.compute()
        self.calibration = HubCalibration.from_bank(bank, self.audio, self.text, chosen)
        raw, calibrated = 100 * mean_recall(scores), 100 * mean_recall(scores, CALIBRATED)
        report = (
            f"They are calibrated by the training split: {chosen}. Mean recall on the validation split: "
            f"{raw:.1f} % by cosine, {calibrated:.1f} % calibrated."
        )
        return report if calibrated > raw else f"{report} Calibration does not help: search with `--raw`."

    def save(self, path: Path) -> None:
        """Write the pairs to a file, as a whole or not at all.

        Args:
            path: Path of the `.safetensors` file; its folder is created if it does not exist.

        Raises:
            UsageError: The path has another ending, or the file cannot be written.
        """
        check_output(path)
        tensors = {name: tensor for name in _TENSORS if (tensor := getattr(self, name)) is not None}
        for name in _TEXTS:
            texts = StoredTexts.of(getattr(self, name))
            tensors |= {name: texts.content, f"{name}_ends": texts.ends}
        metadata = {name: json.dumps(getattr(self, name)) for name in _METADATA}
        metadata["checksums"] = json.dumps({side: checksum(getattr(self, side)) for side in get_args(Side)})
        if self.log_mel is not None:
            metadata["log_mel"] = json.dumps(self.log_mel)
        if self.calibration is not None:
            metadata["calibration"] = json.dumps(self.calibration.calibration.parameters)
            for name, values in self.calibration.tensors.items():
                tensors[name] = values.float() if values.is_floating_point() else values
        try:
            with atomic_write(path) as temporary:
                save_file(
                    {name: tensor.contiguous() for name, tensor in tensors.items()},
                    temporary,
                    metadata={"format": _FORMAT, **metadata},
                )
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: Path) -> "EncodedPairs":
        """Read the pairs from a file, which is mapped into memory: its parts are read when they are used.

        Args:
            path: Path of the file.

        Returns:
            The pairs.

        Raises:
            UsageError: The file is missing, damaged or of another kind.
        """
        if not path.is_file():
            raise UsageError(f"There is no file {str(path)!r}. {_REMEDY}")
        try:
            with safe_open(path, framework="pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is damaged or of another kind ({error}). {_REMEDY}") from error
        if metadata.get("format") != _FORMAT:
            raise UsageError(
                f"{path} holds no encoded pairs: its format is {metadata.get('format')!r}, not {_FORMAT!r}. "
                f"{_REMEDY}"
            )
        try:
            texts: dict[str, Any] = {
                name: StoredTexts(tensors.pop(name), tensors.pop(f"{name}_ends")) for name in _TEXTS
            }
            settings = {name: json.loads(metadata[name]) for name in (*_METADATA, "checksums")}
            settings["log_mel"] = json.loads(metadata.get("log_mel", "null"))
        except (KeyError, ValueError) as error:
            raise UsageError(f"{path} is damaged ({error}). {_REMEDY}") from error
        calibration = None
        if "calibration" in metadata:
            biases = {name: tensors.pop(name) for name in list(tensors) if name.endswith(("_bias", "_hubs"))}
            try:
                calibration = HubCalibration(Calibration(**json.loads(metadata["calibration"])), **biases)
            except (TypeError, ValueError) as error:
                raise UsageError(
                    f"{path} holds a calibration of another kind than this version makes ({error}). {_REMEDY}"
                ) from error
        try:
            pairs = cls(**tensors, **texts, **settings, calibration=calibration)
        except TypeError as error:
            raise UsageError(
                f"{path} holds other parts than this version reads ({error}). {_REMEDY}"
            ) from error
        for side, written in pairs.checksums.items():
            rows = getattr(pairs, side)
            if rows.nbytes <= _LARGEST_CHECKED and checksum(rows) != written:
                raise UsageError(
                    f"{path} is damaged: its {side} embeddings are not those that were written. {_REMEDY}"
                )
        return pairs


def check_output(path: Path) -> None:
    """Refuse a path that cannot be written to, before the work is done.

    Args:
        path: Path of the file to write.

    Raises:
        UsageError: The path has another ending, or its folder cannot be written to.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"Argument `output` has to end with .safetensors, but got {str(path)!r}.")
    check_writable(path)

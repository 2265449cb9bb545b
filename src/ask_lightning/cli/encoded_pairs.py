"""Embeddings of a split, and the file that holds them. Axes: `N` clips, `P` captions, `d` width."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ask_lightning.cli.errors import UsageError
from ask_lightning.data.caption_style import CaptionStyle
from ask_lightning.data.clips import Clip
from ask_lightning.encoding.encoders import call_encoder, encoder_name, find_encoders, find_interaction
from ask_lightning.encoding.outputs import as_encoded
from ask_lightning.interaction import (
    TokenEmbeddings,
    pooled,
    rows_of,
    unit_embeddings,
    with_padding,
    without_padding,
)
from ask_lightning.metrics import AudioTextRetrieval, Calibration, HubCalibration, QueryBank
from ask_lightning.metrics.grid import unit_clips
from ask_lightning.metrics.table import CALIBRATED, mean_recall
from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.clip_ids import integer_ids
from ask_lightning.utilities.weights import weights_fingerprint

_FORMAT = "ask-lightning pairs 3"
_TENSORS = (
    *("audio", "text", "clip_ids", "clip_of"),
    *("audio_tokens", "audio_lengths", "text_tokens", "text_lengths"),
)
_TEXTS = ("names", "captions", "model", "caption_style", "sample_rate", "files")
_REMEDY = "Write it with `ask-lightning encode`."


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
    """

    audio: Tensor
    text: Tensor
    clip_ids: Tensor
    clip_of: Tensor
    names: list[str]
    captions: list[str]
    model: dict[str, str | None] = field(default_factory=dict)
    caption_style: CaptionStyle = "raw"
    sample_rate: int | None = None
    calibration: HubCalibration | None = None
    files: list[str] = field(default_factory=list)
    audio_tokens: Tensor | None = None
    audio_lengths: Tensor | None = None
    text_tokens: Tensor | None = None
    text_lengths: Tensor | None = None

    @property
    def has_tokens(self) -> bool:
        """Whether there are frames and words beside the clips and captions."""
        return self.audio_tokens is not None and self.text_tokens is not None

    def with_tokens(self, side: Literal["audio", "text"], rows: Tensor) -> TokenEmbeddings:
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
        metadata = {name: json.dumps(getattr(self, name)) for name in _TEXTS}
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
        """Read the pairs from a file.

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
        texts = {name: json.loads(metadata[name]) for name in _TEXTS}
        calibration = None
        if "calibration" in metadata:
            biases = {name: tensors.pop(name) for name in list(tensors) if name.endswith(("_bias", "_hubs"))}
            try:
                calibration = HubCalibration(Calibration(**json.loads(metadata["calibration"])), **biases)
            except (TypeError, ValueError) as error:
                raise UsageError(
                    f"{path} holds a calibration of another kind than this version makes ({error}). {_REMEDY}"
                ) from error
        return cls(**tensors, **texts, calibration=calibration)


def check_output(path: Path) -> None:
    """Refuse a path that cannot be written to, before the work is done.

    Args:
        path: Path of the file to write.

    Raises:
        UsageError: The path has another ending, or its folder cannot be written to.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"Argument `output` has to end with .safetensors, but got {str(path)!r}.")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"{path} cannot be written: {existing} is no folder, or a read-only one.")


class _EmbeddingPredictor(pl.LightningModule):
    """Predicts the embeddings of a model, so that the trainer handles device and precision.

    Args:
        model: The model.
        tokens: Dtype in which frames and words are kept, or None if they are not.
    """

    def __init__(self, model: pl.LightningModule, tokens: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self.tokens = tokens
        self._seen: set[int] = set()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        try:
            encoders = find_encoders(self.model)
        except ValueError as error:
            raise UsageError(
                f"{type(self.model).__name__} has no methods to encode with. Add `encode_audio(batch)` and "
                "`encode_text(batch)`."
            ) from error
        found: dict[str, Any] = {
            "clip_id": integer_ids(batch["clip_id"]).cpu(),
            "caption": list(batch["caption"]),
        }
        first = self._first_rows(found["clip_id"].tolist())
        finite = []
        for side, encoder in zip(("audio", "text"), encoders, strict=True):
            encoded = as_encoded(call_encoder(self.model, encoder, batch), encoder_name(encoder))
            embeddings = unit_embeddings(encoded, torch.float32).to("cpu")
            found[side] = pooled(embeddings)
            finite.append(pooled(embeddings).isfinite().all(dim=1))
            if self.tokens is not None and isinstance(embeddings, TokenEmbeddings):
                finite.append((embeddings.tokens.isfinite().all(2) | ~embeddings.valid).all(dim=1))
                kept = embeddings if side == "text" else rows_of(embeddings, first)
                tokens, lengths = without_padding(kept)
                found |= {f"{side}_tokens": tokens.to(self.tokens), f"{side}_lengths": lengths}
        return found | {"finite": torch.stack(finite).all(dim=0)}

    def _first_rows(self, clip_ids: list[int]) -> Tensor:
        """The rows of a batch whose clips no row before had."""
        rows = []
        for row, clip in enumerate(clip_ids):
            if clip not in self._seen:
                self._seen.add(clip)
                rows.append(row)
        return torch.tensor(rows, dtype=torch.int64)


def encode_pairs(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    loader: Any,
    checkpoint: str | None = None,
    *,
    tokens: torch.dtype | None = torch.float32,
) -> EncodedPairs:
    """Encode the pairs of a loader.

    Args:
        trainer: A trainer on one device.
        model: A model with methods that encode audio and text, such as `encode_audio` and `encode_text`.
        loader: Loader of the pairs, in order. If its dataset has `clips`, they give the names.
        checkpoint: Path of a checkpoint whose weights are loaded; None for the model's present weights.
        tokens: Dtype in which frames and words are kept, if the model has an interaction that compares them.
            None: they are not kept.

    Returns:
        The embeddings on the CPU, with each clip once, in the order of the loader. Takes of one recording are
        one clip, as in the metrics: its embedding is their mean direction, or, with tokens, the first take
        stands for it.

    Raises:
        UsageError: The trainer has several devices, the model lacks the methods, or an embedding has NaN or
            infinity.
    """
    if trainer.world_size > 1:
        raise UsageError(
            f"Embeddings are written by one device, not by {trainer.world_size}. Pass `devices=1`."
        )
    if checkpoint is not None:
        model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    fingerprint = weights_fingerprint(model)
    if find_interaction(model) is None:
        tokens = None
    batches = trainer.predict(_EmbeddingPredictor(model, tokens), loader)
    assert batches is not None
    predictions: list[dict[str, Any]] = batches  # type: ignore[assignment]
    joined: dict[str, Any] = {
        key: torch.cat([prediction[key] for prediction in predictions])
        for key in predictions[0]
        if key != "caption"
    }
    audio, text, ids = (joined.pop(key) for key in ("audio", "text", "clip_id"))  # (P, d), (P, d), (P,)
    broken = int((~joined.pop("finite")).sum())
    if broken:
        raise UsageError(
            f"The model makes NaN or infinity of {broken} of {len(ids)} pairs, which no search could find. "
            "Has its training diverged? Pass an earlier checkpoint as `--ckpt_path`."
        )
    clips, number = unit_clips(audio, ids)  # (N, d), (P,); clips in the order of their ids
    # From there to the order of the loader.
    first_pair: dict[int, int] = {}  # clip id → row of its first pair
    for row, clip in enumerate(ids.tolist()):
        first_pair.setdefault(clip, row)
    order = number[list(first_pair.values())]  # (N,)
    listed = _clips_by_id(getattr(loader.dataset, "clips", ()))
    return EncodedPairs(
        audio=audio[list(first_pair.values())] if joined else clips[order].float(),  # (N, d)
        text=text,  # (P, d)
        clip_ids=torch.tensor(list(first_pair)),
        clip_of=order.argsort()[number],
        names=[listed[clip].recording if clip in listed else str(clip) for clip in first_pair],
        captions=[caption for prediction in predictions for caption in prediction["caption"]],
        model={
            "class_path": f"{type(model).__module__}.{type(model).__qualname__}",
            "checkpoint": None if checkpoint is None else str(Path(checkpoint).absolute()),
            "fingerprint": fingerprint,
        },
        caption_style=getattr(loader.dataset, "caption_style", "raw"),
        sample_rate=getattr(getattr(loader.dataset, "audio", None), "sample_rate", None),
        files=[_file_name(listed[clip]) if clip in listed else "" for clip in first_pair],
        **joined,
    )


def _clips_by_id(clips: Iterable[Clip]) -> dict[int, Clip]:
    """The first clip of each recording, by the integer ids that batches hold."""
    first: dict[str, Clip] = {}
    for clip in clips:
        first.setdefault(clip.recording, clip)
    return dict(zip(integer_ids(list(first)).tolist(), first.values(), strict=True)) if first else {}


def _file_name(clip: Clip) -> str:
    """The name of a clip's audio file as its dataset writes it."""
    return clip.path or clip.name

"""Embeddings of a split on disk. Axes: `N` clips, `P` captions, `d` width."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ask_lightning.cli.errors import UsageError
from ask_lightning.encoding.encoders import call_encoder, encoder_name, find_encoders
from ask_lightning.encoding.outputs import as_embeddings
from ask_lightning.functional import unit_length
from ask_lightning.utilities.atomic_files import written_whole
from ask_lightning.utilities.clip_ids import integer_ids

_FORMAT = "ask-lightning pairs 1"
_REMEDY = "Write it with `ask-lightning encode`."


@dataclass
class EncodedPairs:
    """Clips and captions as unit vectors, and what made them.

    Attributes:
        audio: `(N, d)`, one row for each clip.
        text: `(P, d)`, one row for each caption.
        clip_ids: `(N,)` int64.
        clip_of: `(P,)` int64, the row of each caption's clip.
        names: N names of clips.
        captions: P texts.
        model: `class_path`, the model's class, and `checkpoint`, the path of its weights.
    """

    audio: Tensor
    text: Tensor
    clip_ids: Tensor
    clip_of: Tensor
    names: list[str]
    captions: list[str]
    model: dict[str, str | None] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write a file that is there as a whole or not at all.

        Args:
            path: Of the file, `.safetensors`; its folder is made if need be.

        Raises:
            UsageError: It has another ending, or cannot be written.
        """
        check_output(path)
        tensors = {name: getattr(self, name) for name in ("audio", "text", "clip_ids", "clip_of")}
        about = {name: json.dumps(getattr(self, name)) for name in ("names", "captions", "model")}
        try:
            with written_whole(path) as temporary:
                save_file(
                    {name: tensor.contiguous() for name, tensor in tensors.items()},
                    temporary,
                    metadata={"format": _FORMAT, **about},
                )
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: Path) -> "EncodedPairs":
        """Read such a file.

        Args:
            path: Of the file.

        Raises:
            UsageError: It is missing, damaged or another file.
        """
        if not path.is_file():
            raise UsageError(f"There is no file {str(path)!r}. {_REMEDY}")
        try:
            with safe_open(path, framework="pt") as stored:
                about = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is damaged or of another kind ({error}). {_REMEDY}") from error
        if about.get("format") != _FORMAT:
            raise UsageError(
                f"{path} holds no encoded pairs: its format is {about.get('format')!r}, not {_FORMAT!r}. "
                f"{_REMEDY}"
            )
        return cls(**tensors, **{name: json.loads(about[name]) for name in ("names", "captions", "model")})


def check_output(path: Path) -> None:
    """Refuse a file to write to before the work is done.

    Args:
        path: Of the file.

    Raises:
        UsageError: Its ending is another one, or its folder cannot be written to.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"Argument `output` has to end with .safetensors, but got {str(path)!r}.")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f"{path} cannot be written: {there} is no folder, or a read-only one.")


class _Embedder(pl.LightningModule):
    """A model as something that predicts embeddings, under whatever precision and device the trainer has."""

    def __init__(self, model: pl.LightningModule) -> None:
        super().__init__()
        self.model = model

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        try:
            encoders = find_encoders(self.model)
        except ValueError as error:
            raise UsageError(
                f"{type(self.model).__name__} has no methods to encode with. Add `encode_audio(batch)` and "
                "`encode_text(batch)`."
            ) from error
        sides = {}
        for side, encoder in zip(("audio", "text"), encoders, strict=True):
            embeddings = as_embeddings(call_encoder(self.model, encoder, batch), encoder_name(encoder))
            sides[side] = unit_length(embeddings.float()).cpu()
        return {**sides, "clip_id": integer_ids(batch["clip_id"]).cpu(), "caption": list(batch["caption"])}


def encode_pairs(
    trainer: pl.Trainer, model: pl.LightningModule, loader: Any, checkpoint: str | None = None
) -> EncodedPairs:
    """Encode the pairs of a loader.

    Args:
        trainer: On one device.
        model: With methods that encode audio and text, such as `encode_audio` and `encode_text`.
        loader: Over pairs, in order. The clips of its dataset give the names if it has `clips`.
        checkpoint: Path of the weights to load before. None: the model's present ones.

    Returns:
        The embeddings on the CPU: clips once, in the order in which they come.

    Raises:
        UsageError: There are several devices, or the model has no such methods.
    """
    if trainer.world_size > 1:
        raise UsageError(
            f"Embeddings are written by one device, not by {trainer.world_size}. Pass `devices=1`."
        )
    if checkpoint is not None:
        model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    batches = trainer.predict(_Embedder(model), loader)
    assert batches is not None
    parts: list[dict[str, Any]] = batches  # type: ignore[assignment]
    audio, text, ids = (torch.cat([part[key] for part in parts]) for key in ("audio", "text", "clip_id"))
    rows: dict[int, int] = {}  # of each clip, its first pair
    for row, clip in enumerate(ids.tolist()):
        rows.setdefault(clip, row)
    places = {clip: place for place, clip in enumerate(rows)}
    known = _names(getattr(loader.dataset, "clips", ()))
    return EncodedPairs(
        audio=audio[list(rows.values())],  # (N, d)
        text=text,  # (P, d)
        clip_ids=torch.tensor(list(rows)),
        clip_of=torch.tensor([places[clip] for clip in ids.tolist()]),
        names=[known.get(clip, str(clip)) for clip in rows],
        captions=[caption for part in parts for caption in part["caption"]],
        model={
            "class_path": f"{type(model).__module__}.{type(model).__qualname__}",
            "checkpoint": None if checkpoint is None else str(Path(checkpoint).absolute()),
        },
    )


def _names(clips: Iterable[Any]) -> dict[int, str]:
    keys = [clip.key for clip in clips]
    return dict(zip(integer_ids(keys).tolist(), keys, strict=True)) if keys else {}

"""Encoding a split by all processes of a trainer, part by part. Axes: `N` clips, `P` captions, `d` width.

Whole batches are divided among the processes, because an encoder may let a clip depend on the others of its
batch (by their length, for one): the embeddings are those of a single process, to the last bit.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader

from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.cli.encoded_parts import EncodedParts, batches_of_parts
from ask_lightning.cli.errors import UsageError
from ask_lightning.data.audio.options import AudioOptions
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.clip_parts import clip_parts
from ask_lightning.data.clips import Clip
from ask_lightning.encoding.encoders import call_encoder, encoder_name, find_encoders, find_interaction
from ask_lightning.encoding.outputs import as_encoded
from ask_lightning.encoding.source_identity import source_key
from ask_lightning.encoding.source_loader import batch_size_of, has_index
from ask_lightning.interaction import TokenEmbeddings, pooled, rows_of, unit_embeddings, without_padding
from ask_lightning.metrics.grid import unit_clips
from ask_lightning.utilities.clip_ids import integer_ids
from ask_lightning.utilities.distributed import Ranks
from ask_lightning.utilities.weights import weights_fingerprint


class SplitEncoder(pl.LightningModule):
    """Encodes a split in the trainer's loop of prediction, which handles device, precision and progress.

    Each process encodes some of the parts that are not on disk, and writes each as soon as it is complete.

    Args:
        model: A model with methods that encode audio and text, such as `encode_audio` and `encode_text`.
        loader: Loader of the pairs of a map-style dataset, in order.
        folder: Folder of the parts.
        checkpoint: Path of the checkpoint whose weights the model has. None: it has those of its config.
        tokens: Dtype in which frames and words are kept, if the model has an interaction that compares them.
            None: they are not kept.
        options: What else the embeddings depend on, such as the precision.
        num_batches: Number of the first batches of the loader to encode.

    Attributes:
        parts: The parts on disk.
        num_parts: Number of the parts that there will be.

    Raises:
        UsageError: The model lacks the methods, or the loader is of another kind.
    """

    def __init__(
        self,
        model: pl.LightningModule,
        loader: DataLoader[Any],
        folder: Path,
        *,
        checkpoint: str | None = None,
        tokens: torch.dtype | None = torch.float32,
        options: Sequence[object] = (),
        num_batches: int | None = None,
    ) -> None:
        super().__init__()
        # A process has nothing to do where there are fewer parts than processes.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        if not has_index(loader) or loader.batch_sampler is None:
            raise UsageError(
                "The split has to be a map-style Dataset, whose items are read by number, in a DataLoader "
                f"that makes the batches, but got a {type(loader).__name__} of a "
                f"{type(getattr(loader, 'dataset', None)).__name__}."
            )
        try:
            self._encoders = find_encoders(model)
        except ValueError as error:
            raise UsageError(
                f"{type(model).__name__} has no methods to encode with. Add `encode_audio(batch)` and "
                "`encode_text(batch)`."
            ) from error
        self.model = model
        self._loader = loader
        self._tokens = None if find_interaction(model) is None else tokens
        self._checkpoint = checkpoint
        self._fingerprint = weights_fingerprint(model)
        self._batches = batches_of_parts(len(loader) if num_batches is None else num_batches)
        # How batches are divided into parts depends on their number, which a limit may lower.
        length = str(sum(map(len, self._batches)))
        described = (_describe_model(model), self._fingerprint, str(self._tokens), length, *map(str, options))
        self.parts = EncodedParts(folder, _digest((*described, *_describe_data(loader))))
        self.num_parts = len(self._batches)
        self._part_of: list[int] = []
        self._encoded: list[dict[str, Any]] = []

    def predict_dataloader(self) -> Iterable[Any]:
        """The batches that this process encodes; collective."""
        ranks = Ranks.current()
        ranks.require_equal(
            (self._fingerprint, [len(batches) for batches in self._batches]),
            "the weights and the batches that are to be encoded",
        )
        found: set[int] = set()
        with ranks.all_or_none("looking for parts that are encoded already"):
            if ranks.rank == 0:
                removed = self.parts.remove_others()
                found = self.parts.find()
                _say_what_is_there(len(found), removed, self.num_parts)
        # A description may hold addresses in memory, which differ between processes.
        identity, found = ranks.all_gather_object((self.parts.identity, found))[0]
        self.parts = replace(self.parts, identity=identity)
        missing = [part for part in range(self.num_parts) if part not in found]
        own = missing[ranks.rank :: ranks.size]
        self._part_of = [part for part in own for _ in self._batches[part]]
        return _ChosenBatches(self._loader, [batch for part in own for batch in self._batches[part]])

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> int:
        """Encode a batch; with the last one of a part, write the part.

        Args:
            batch: The batch.
            batch_idx: Number of the batch among those of this process.

        Returns:
            The number of its pairs.

        Raises:
            UsageError: An embedding has NaN or infinity, or the part cannot be written.
            SIGTERMException: The process was asked to end meanwhile.
        """
        if self.trainer.received_sigterm:  # which Lightning does not heed in prediction
            raise SIGTERMException
        size = len(batch["caption"])
        self._encoded.append(self._encode(batch))
        part = self._part_of[batch_idx]
        if batch_idx + 1 < len(self._part_of) and self._part_of[batch_idx + 1] == part:
            return size
        tensors = {
            name: torch.cat([one[name] for one in self._encoded])
            for name in self._encoded[0]
            if name != "caption"
        }
        self.parts.write(part, tensors, [caption for one in self._encoded for caption in one["caption"]])
        self._encoded.clear()
        return size

    def _encode(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embeddings of a batch on the CPU, with ids and captions."""
        ids = integer_ids(batch["clip_id"]).cpu()
        found: dict[str, Any] = {"clip_id": ids, "caption": list(batch["caption"])}
        # Frames are kept once for each clip; captions of a clip follow each other most often.
        first = torch.tensor(list(_first_rows(ids.tolist()).values()), dtype=torch.int64)
        finite = []
        for side, encoder in zip(("audio", "text"), self._encoders, strict=True):
            encoded = as_encoded(call_encoder(self.model, encoder, batch), encoder_name(encoder))
            embeddings = unit_embeddings(encoded, torch.float32).to("cpu")
            found[side] = pooled(embeddings)
            finite.append(pooled(embeddings).isfinite().all(dim=1))
            if self._tokens is not None and isinstance(embeddings, TokenEmbeddings):
                finite.append((embeddings.tokens.isfinite().all(2) | ~embeddings.valid).all(dim=1))
                kept = embeddings if side == "text" else rows_of(embeddings, first)
                tokens, lengths = without_padding(kept)
                found |= {f"{side}_tokens": tokens.to(self._tokens), f"{side}_lengths": lengths}
                if side == "audio":
                    found["token_clips"] = ids[first]
        if broken := int((~torch.stack(finite).all(dim=0)).sum()):
            raise UsageError(
                f"The model makes NaN or infinity of {broken} of the {len(ids)} pairs of a batch, which no "
                "search could find. Has its training diverged? Pass an earlier checkpoint as `--ckpt_path`."
            )
        return found

    def join(self) -> EncodedPairs:
        """Join the parts on disk.

        Returns:
            The embeddings, with each clip once, in the order of the loader. Takes of one recording are one
            clip, as in the metrics: its embedding is their mean direction, or, with tokens, the first take
            stands for it.

        Raises:
            UsageError: There is no pair, or a part is not there: processes of other machines have written to
                folders of their own.
        """
        if self.num_parts == 0:
            raise UsageError("There is no batch to encode. Check the data and `limit_predict_batches`.")
        missing = self.num_parts - len(self.parts.find())
        if missing:
            raise UsageError(
                f"{missing} of {self.num_parts} parts are not in {self.parts.folder}. All machines have to "
                "write to the same folder: pass as `--output` a path that all of them see."
            )
        pieces: dict[str, list[Tensor]] = {}
        captions: list[str] = []
        seen: set[int] = set()
        for number in range(self.num_parts):
            tensors, texts = self.parts.read(number)
            _drop_frames_of(seen, tensors)
            for name, tensor in tensors.items():
                pieces.setdefault(name, []).append(tensor)
            captions += texts
        joined: dict[str, Any] = {name: torch.cat(pieces.pop(name)) for name in list(pieces)}
        audio, text, ids = (joined.pop(name) for name in ("audio", "text", "clip_id"))  # (P, d), (P, d), (P,)
        clips, number_of = unit_clips(audio, ids)  # (N, d), (P,); clips in the order of their ids
        # From there to the order of the loader.
        first_pair = _first_rows(ids.tolist())
        order = number_of[list(first_pair.values())]  # (N,)
        parts: list[Any] = [*clip_parts(self._loader.dataset)] or [self._loader.dataset]
        listed = _clips_by_id(clip for part in parts for clip in getattr(part, "clips", ()))
        return EncodedPairs(
            audio=audio[list(first_pair.values())] if joined else clips[order].float(),  # (N, d)
            text=text,  # (P, d)
            clip_ids=torch.tensor(list(first_pair)),
            clip_of=order.argsort()[number_of],
            names=[listed[clip].recording if clip in listed else str(clip) for clip in first_pair],
            captions=captions,
            model={
                "class_path": f"{type(self.model).__module__}.{type(self.model).__qualname__}",
                "checkpoint": None if self._checkpoint is None else str(Path(self._checkpoint).absolute()),
                "fingerprint": self._fingerprint,
            },
            caption_style=getattr(parts[0], "caption_style", "raw"),
            sample_rate=getattr(getattr(parts[0], "audio", None), "sample_rate", None),
            log_mel=_log_mel_of(getattr(parts[0], "audio", None)),
            files=[_file_name(listed[clip]) if clip in listed else "" for clip in first_pair],
            **joined,
        )


def encode_split(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    loader: DataLoader[Any],
    folder: Path,
    *,
    checkpoint: str | None = None,
    tokens: torch.dtype | None = torch.float32,
) -> SplitEncoder:
    """Encode the pairs of a loader into parts on disk, those that are not there yet; collective.

    Args:
        trainer: The trainer, on one device or under DDP.
        model: A model with methods that encode audio and text, with the weights to encode by.
        loader: Loader of the pairs of a map-style dataset, in order.
        folder: Folder of the parts, which all processes see.
        checkpoint: Path of the checkpoint whose weights the model has, if they are of one.
        tokens: Dtype in which frames and words are kept, or None if they are not.

    Returns:
        The encoder, whose `join` gives the embeddings when all parts are there. They are when this returns.

    Raises:
        UsageError: The strategy divides the model or is not DDP, the model lacks the methods, the loader is
            of another kind, or an embedding has NaN or infinity.
    """
    strategy = trainer.strategy
    divides = isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, DDPStrategy)
    if trainer.world_size > 1 and divides:
        raise UsageError(
            f"Several devices encode under DDP, not under {type(strategy).__name__}. Pass "
            "`--trainer.strategy ddp`, or `--trainer.devices 1`."
        )
    limit = trainer.limit_predict_batches
    total = len(loader)
    encoder = SplitEncoder(
        model,
        loader,
        folder,
        checkpoint=checkpoint,
        tokens=tokens,
        options=(trainer.precision,),
        num_batches=min(total, limit) if isinstance(limit, int) else int(total * limit),
    )
    # The limit is of the whole split, whatever is left of it and whoever encodes it.
    trainer.limit_predict_batches = 1.0
    try:
        trainer.predict(encoder, return_predictions=False)
    finally:
        trainer.limit_predict_batches = limit
    Ranks.current().all_gather_object(None)  # the slowest process has written its parts
    return encoder


class _ChosenBatches:
    """Some batches of a loader. It is no `DataLoader`, whose batches Lightning would divide once more.

    Args:
        loader: The loader.
        numbers: Numbers of the batches, ascending.
    """

    def __init__(self, loader: DataLoader[Any], numbers: list[int]) -> None:
        self._numbers = numbers
        settings = ["collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator"]
        if loader.num_workers > 0:
            settings += ["multiprocessing_context", "prefetch_factor"]
        self._loader: DataLoader[Any] = DataLoader(
            loader.dataset,
            batch_sampler=_ChosenIndices(loader.batch_sampler, numbers),
            num_workers=loader.num_workers,
            **{name: getattr(loader, name) for name in settings},
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)


class _ChosenIndices:
    """The items of some batches of a sampler, of which no other list is held: there may be millions."""

    def __init__(self, sampler: Any, numbers: list[int]) -> None:
        self._sampler, self._numbers = sampler, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[list[int]]:
        wanted = set(self._numbers)
        return (list(items) for number, items in enumerate(self._sampler) if number in wanted)


def _say_what_is_there(found: int, removed: int, total: int) -> None:
    """Say what a run before has left."""
    if removed:
        rank_zero_info(
            f"{removed} parts on disk are of another model, other data or other options, and were removed."
        )
    if found:
        rank_zero_info(f"{found} of {total} parts are there already; the others are encoded.")


def _drop_frames_of(seen: set[int], tensors: dict[str, Tensor]) -> None:
    """Drop the frames of clips that have been seen from a part, and note its clips as seen."""
    if "token_clips" not in tensors:
        return
    is_new = []
    for clip in tensors.pop("token_clips").tolist():
        is_new.append(clip not in seen)
        seen.add(clip)
    kept, lengths = torch.tensor(is_new), tensors["audio_lengths"]
    tensors["audio_tokens"] = tensors["audio_tokens"][kept.repeat_interleave(lengths)]
    tensors["audio_lengths"] = lengths[kept]


def _digest(described: Iterable[str]) -> str:
    """A checksum of some texts."""
    digest = blake2b(digest_size=16)
    for text in described:
        encoded = text.encode(errors="surrogatepass")
        digest.update(b"%d " % len(encoded) + encoded)
    return digest.hexdigest()


def _describe_model(model: pl.LightningModule) -> str:
    """Class and hyperparameters: some, such as how padding is treated, are not in the weights."""
    return f"{type(model).__module__}.{type(model).__qualname__} {sorted(dict(model.hparams).items())}"


def _describe_data(loader: DataLoader[Any]) -> Iterator[str]:
    """What tells two loaders apart: clips with captions and files, how they are read, and the batches.

    Other datasets than this library's do not say what their items are, so each loader of one is another.
    """
    dataset = loader.dataset
    yield f"{source_key(loader)} {batch_size_of(loader)} {len(loader)}"
    yield getattr(loader.collate_fn, "__qualname__", "")
    if not isinstance(dataset, ClipDataset):
        yield uuid4().hex
        return
    # Where audio is cached and how files are examined changes nothing of what is read.
    yield repr(replace(dataset.audio, cache=None, check="header", strict=False, seed=0))
    for clip in dataset.clips:
        path, place = dataset.origin(clip)
        state = path.stat()
        yield f"{clip} {path.absolute()} {place} {state.st_size} {state.st_mtime_ns}"


def _first_rows(clip_ids: Iterable[int]) -> dict[int, int]:
    """The first row of each clip, in the order in which clips appear."""
    first: dict[int, int] = {}
    for row, clip in enumerate(clip_ids):
        first.setdefault(clip, row)
    return first


def _clips_by_id(clips: Iterable[Clip]) -> dict[int, Clip]:
    """The first clip of each recording, by the integer ids that batches hold."""
    first: dict[str, Clip] = {}
    for clip in clips:
        first.setdefault(clip.recording, clip)
    return dict(zip(integer_ids(list(first)).tolist(), first.values(), strict=True)) if first else {}


def _log_mel_of(audio: AudioOptions | None) -> dict[str, Any] | None:
    """What the spectrograms of a dataset are made by, or None where it has waveforms."""
    if audio is None or audio.features is None:
        return None
    return {"seconds": audio.seconds, "num_mels": audio.num_mels}


def _file_name(clip: Clip) -> str:
    """The name of a clip's audio file as its dataset writes it."""
    return clip.path or clip.name

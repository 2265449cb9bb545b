"""Encoders that take a batch in chunks, so that a large batch needs the memory of a chunk.

An encoder's graph is kept for no chunk: the embeddings of all chunks are the start of the loss's graph, and
when their gradients are known, each chunk is encoded once more, with the same random numbers, and passes its
part of them on to the parameters. The gradient is that of the whole batch. Reference: Gao et al., "Scaling
Deep Contrastive Learning Batch Size under Memory Limited Setup" (arXiv 2101.06983), there called GradCache.

Axes: `B` batch, `c` chunk, `L` tokens, `d` width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import TransformerEnginePrecision
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm

from ask_lightning.capture import Step, shadowing
from ask_lightning.encoding.batch_rows import num_rows, rows_of, tensors_of
from ask_lightning.encoding.encoders import Encoder, call_encoder, encoder_name
from ask_lightning.encoding.outputs import as_encoded
from ask_lightning.encoding.two_passes import TwoPasses
from ask_lightning.interaction import Embeddings, TokenEmbeddings
from ask_lightning.utilities.arguments import check_count


class ChunkedEncoding:
    """The encoders of a model in chunks.

    Args:
        audio: Encoder of the audio.
        text: Encoder of the text.
        size: Largest number of rows of a chunk.
        step: Way in which the embeddings of a training step are taken.

    Raises:
        ValueError: `size` is not an integer of at least 1, or the step is the model's and an encoder is not a
            method, which could be called in chunks there.
    """

    def __init__(self, audio: Encoder, text: Encoder, size: int, step: Step) -> None:
        check_count("chunk_size", size)
        self._size, self._step = size, step
        self._names = [encoder for encoder in (audio, text) if isinstance(encoder, str)]
        if step != "encode" and len(self._names) < 2:
            raise ValueError(
                f'With step="{step}", `chunk_size` needs `audio` and `text` to be names of methods that the '
                "training step calls, but got "
                f'{encoder_name(audio)} and {encoder_name(text)}. Name methods, or use step="encode".'
            )
        self._audio, self._text = audio, text
        self._has_checked_norms = False

    def encode_batch(self, model: nn.Module, batch: Any) -> tuple[Embeddings, Embeddings]:
        """Encode both sides of a batch, with tokens where an encoder returns them.

        Args:
            model: The model or a copy of it.
            batch: The batch to encode.

        Returns:
            Audio and text embeddings, `(B, d)` or `TokenEmbeddings`.

        Raises:
            TypeError: An encoder returns no embeddings, or the batch cannot be cut into rows.
            ValueError: Parts of the batch have different numbers of rows.
        """
        sides = []
        for encoder in (self._audio, self._text):
            name = encoder_name(encoder)

            def encode(part: Any, encoder: Encoder = encoder, name: str = name) -> Embeddings:
                return as_encoded(call_encoder(model, encoder, part), name)

            embeddings = encode_in_chunks(encode, {"batch": batch}, {}, self._size, model, name)
            sides.append(cast(Embeddings, embeddings))
        return sides[0], sides[1]

    def check(self, module: pl.LightningModule, trainer: pl.Trainer) -> None:
        """Refuse, before training, what would make the second pass another one than the first.

        Args:
            module: Module that is trained, with the model inside.
            trainer: Trainer at the start of `fit`.

        Raises:
            RuntimeError: The module was compiled as a whole, or computes in 8 bits.
        """
        self._has_checked_norms = False
        if module._compiler_ctx is not None:
            raise RuntimeError(
                "`chunk_size` cannot be combined with torch.compile(ASKModule(...)), which compiles the "
                "first pass over the chunks and not the second. Compile the encoders: model.audio_encoder = "
                "torch.compile(model.audio_encoder)."
            )
        if isinstance(trainer.precision_plugin, TransformerEnginePrecision):
            raise RuntimeError(
                "`chunk_size` cannot be combined with TransformerEnginePrecision, whose scales are "
                'updated by each pass. Use precision="bf16-mixed".'
            )

    @contextmanager
    def of_step(self, model: nn.Module) -> Iterator[None]:
        """Have a training step encode in chunks.

        Args:
            model: The model whose step runs.

        Raises:
            RuntimeError: The step does not call a method that it has to call in chunks, or the model has
                batch norm that is synchronised over ranks.
        """
        if not self._has_checked_norms:
            self._has_checked_norms = True
            _check_batch_norm(model)
        if self._step == "encode":
            yield
            return
        with self.of_methods(model) as calls:
            yield
        if missing := [f"`self.{name}`" for name, count in calls.items() if count == 0]:
            raise RuntimeError(
                f"`chunk_size` has no effect, because {type(model).__name__}.training_step does not call "
                f"{' and '.join(missing)}. Name the methods that it calls by `audio` and `text`, or use "
                'step="encode".'
            )

    @contextmanager
    def of_methods(self, model: nn.Module) -> Iterator[dict[str, int]]:
        """Have the methods of a model encode what they are called with in chunks, for a while.

        Args:
            model: The model or a copy of it.

        Yields:
            How often each of the methods has been called.
        """
        calls = dict.fromkeys(self._names, 0)

        def in_chunks(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def encode(*positional: Any, **named: Any) -> Any:
                calls[name] += 1
                given = {f"argument {i}": value for i, value in enumerate(positional, 1)}
                return encode_in_chunks(method, given, named, self._size, model, name)

            return encode

        with shadowing(model, {name: in_chunks(name, getattr(model, name)) for name in self._names}):
            yield calls


def encode_in_chunks(
    encode: Callable[..., Any],
    positional: Mapping[str, Any],
    named: Mapping[str, Any],
    size: int,
    model: nn.Module,
    name: str,
) -> Any:
    """What an encoder returns for a batch, by a graph with the memory of a chunk.

    Args:
        encode: The encoder, which returns `(c, d)` embeddings or `TokenEmbeddings` for c rows.
        positional: Its positional arguments by names for messages, in order; all are cut into rows.
        named: Its named arguments, which are cut as well.
        size: Largest number of rows of a chunk. Chunks are as equal as they can be.
        model: Module whose buffers, logs and random streams the encoder may use.
        name: Name of the encoder, for messages.

    Returns:
        `(B, d)` embeddings or `TokenEmbeddings`; where one chunk is enough, whatever the encoder returns.

    Raises:
        ValueError: The arguments have different numbers of rows, the encoder returns another number of
            embeddings than it got rows, or an argument has a gradient.
        TypeError: An argument cannot be cut into rows, or the encoder returns something else.
        RuntimeError: The encoder uses reentrant checkpoints; or, in the backward pass, encoding a chunk again
            has given other embeddings.
    """
    arguments = {**positional, **named}
    rows = num_rows(arguments, name)
    count = -(-rows // size)
    if count == 1:
        return encode(*positional.values(), **named)
    starts = [rows * chunk // count for chunk in range(count + 1)]

    def encode_chunk(chunk: int) -> Embeddings:
        start, stop = starts[chunk], starts[chunk + 1]
        cut = {key: rows_of(value, start, stop, rows) for key, value in arguments.items()}
        output = encode(*(cut[key] for key in positional), **{key: cut[key] for key in named})
        return _checked(output, stop - start, name)

    if not torch.is_grad_enabled():
        return _joined([encode_chunk(chunk) for chunk in range(count)])
    _refuse_gradients(arguments, name)
    passes = TwoPasses(encode_chunk, model, name)
    for chunk in range(count):
        passes.encode(chunk)
    return _joined(passes.with_gradient())


def _checked(output: Any, rows: int, name: str) -> Embeddings:
    """What an encoder has returned for so many rows, if it can be joined with that of other chunks."""
    if not isinstance(output, Tensor | TokenEmbeddings):
        raise TypeError(
            f"With `chunk_size`, `{name}` has to return a tensor (batch, width) or TokenEmbeddings, which "
            f"can be joined, but got a {type(output).__name__}. Return the embeddings themselves, or use "
            'step="encode".'
        )
    if (isinstance(output, Tensor) and output.ndim == 0) or len(output) != rows:
        found = (
            "a single number" if isinstance(output, Tensor) and output.ndim == 0 else f"{len(output)} rows"
        )
        raise ValueError(
            f"`chunk_size` needs an embedding for each row, but `{name}` returned {found} for a chunk of "
            f"{rows} rows. Leave `chunk_size` out where rows of a batch are encoded together."
        )
    return output


def _joined(chunks: list[Embeddings]) -> Embeddings:
    """The embeddings of all chunks, with tokens padded to the longest."""
    with_tokens = [chunk for chunk in chunks if isinstance(chunk, TokenEmbeddings)]
    if not with_tokens:
        return torch.cat(cast(list[Tensor], chunks))
    longest = max(chunk.tokens.shape[1] for chunk in with_tokens)
    missing = [longest - chunk.tokens.shape[1] for chunk in with_tokens]
    is_masked = any(missing) or any(chunk.mask is not None for chunk in with_tokens)
    return TokenEmbeddings(
        torch.cat([chunk.pooled for chunk in with_tokens]),
        torch.cat([pad(one.tokens, (0, 0, 0, more)) for one, more in zip(with_tokens, missing, strict=True)]),
        torch.cat([pad(one.valid, (0, more)) for one, more in zip(with_tokens, missing, strict=True)])
        if is_masked
        else None,
    )


def _refuse_gradients(arguments: Mapping[str, Any], name: str) -> None:
    """Refuse tensors that were computed with a graph, which chunks would run through again and again."""
    for path, tensor in tensors_of(arguments):
        if tensor.requires_grad:
            raise ValueError(
                f"With `chunk_size`, `{name}` has to take a batch without gradient, but {path} was computed "
                "from parameters, for the whole batch. Compute it inside of the encoder, chunk by chunk."
            )


def _check_batch_norm(model: nn.Module) -> None:
    """Warn of batch norm in training mode; refuse it if ranks with other numbers of chunks synchronise it."""
    norms = [name for name, part in model.named_modules() if isinstance(part, _BatchNorm) and part.training]
    if not norms:
        return
    listed = ", ".join(norms[:3]) + (f" and {len(norms) - 3} more" if len(norms) > 3 else "")
    if any(isinstance(part, nn.SyncBatchNorm) and part.training for part in model.modules()):
        raise RuntimeError(
            f"`chunk_size` cannot be combined with batch norm that is synchronised over ranks ({listed}). "
            "Leave `sync_batchnorm` out, or put these layers into evaluation mode."
        )
    rank_zero_warn(
        f"{listed} of {type(model).__name__} take the statistics of a batch, which with `chunk_size` are "
        "those of each chunk: training differs from that without chunks, and small chunks make it noisy. "
        "Put batch norm into evaluation mode, or take group or layer norm."
    )

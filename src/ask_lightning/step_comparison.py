"""Whether knowledge and keys are made of what the training step compares; looked at in the first step.

A refresh and momentum encoders call the two methods of a model with the batch. What the step changes in the
batch before it calls them, or in their embeddings afterwards, they know nothing of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from ask_lightning.capture import outside_graphs, shadowing
from ask_lightning.encoding.batch_parts import BatchContent, EncoderCall, describe
from ask_lightning.encoding.encoders import Encoder, call_encoder
from ask_lightning.encoding.isolation import muted_logging, preserved_random_state
from ask_lightning.encoding.outputs import as_embeddings
from ask_lightning.encoding.run_state import BufferState, PlainState, random_streams
from ask_lightning.functional import unit_length
from ask_lightning.interaction import Embeddings, pooled

# The cosine of a vector and itself in half precision is closer to 1; one that passed another layer is not.
_SAME_DIRECTION = 0.9999


class StepComparison:
    """Observes how a training step calls the two methods of a model, and what becomes of their embeddings.

    Args:
        model: Model whose step runs.
        audio: Name of the method that encodes audio, or what to call a callable.
        text: Name of the method that encodes text, or what to call a callable.
        batch: Batch of the step, before it runs.
        warns: Whether anything but the step calls the two methods, which is when differences matter.
    """

    def __init__(
        self, model: pl.LightningModule, audio: str, text: str, batch: Any, *, warns: bool = True
    ) -> None:
        self._model, self._names, self._warns = model, (audio, text), warns
        self._content = BatchContent(batch)
        # Each call of a method: where in the batch its arguments are, and what it has returned.
        self._outputs: dict[str, list[tuple[EncoderCall | None, Tensor]]] = {}
        self._other_arguments: dict[str, str] = {}
        self._have_drawn = False

    @outside_graphs
    def encode_by(self, audio: Encoder, text: Encoder, batch: Any) -> None:
        """Encode the batch before the step by callables, whose calls cannot be observed in it.

        Each starts with the random numbers with which the step will: one that encodes first draws the same.

        Args:
            audio: Encoder of the audio.
            text: Encoder of the text.
            batch: Batch of the step.
        """
        buffers, numbers = BufferState(self._model), PlainState(self._model)
        for name, encoder in zip(self._names, (audio, text), strict=True):
            with preserved_random_state(), muted_logging(self._model):
                before = random_streams()
                # With gradients: autocast would keep weights without them for the step.
                output = call_encoder(self._model, encoder, batch)
                self._outputs[name] = [(None, as_embeddings(output, name).detach().clone())]
                self._have_drawn |= random_streams() != before
        buffers.restore()
        numbers.restore()

    @contextmanager
    @outside_graphs
    def observing(self) -> Iterator[None]:
        """Observe the calls of the methods for a while."""

        def observed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*positional: Any, **named: Any) -> Any:
                if not self._content.is_all_of(positional, named):
                    passed = [
                        *map(describe, positional),
                        *(f"{key}={describe(one)}" for key, one in named.items()),
                    ]
                    self._other_arguments.setdefault(name, ", ".join(passed))
                place = self._content.find_call(positional, named)
                output = method(*positional, **named)
                # A copy, which the step does not change in place.
                copy = as_embeddings(output, name).detach().clone()
                self._outputs.setdefault(name, []).append((place, copy))
                return output

            return call

        with shadowing(
            self._model, {name: observed(name, getattr(self._model, name)) for name in self._names}
        ):
            yield

    def compare_calls(self) -> None:
        """Warn if the step has called a method with something else than the batch as it was given."""
        if not (self._warns and self._other_arguments):
            return
        passed = " and ".join(f"`{name}` with {what}" for name, what in self._other_arguments.items())
        rank_zero_warn(
            f"`{type(self._model).__name__}.training_step` calls {passed}, which is not the batch as it was "
            "given. Knowledge, and keys of momentum encoders, are encoded by calls with the batch itself. "
            "That is right if the step augments the batch without changing the order of its rows, which clip "
            "ids follow; anything else has to be done for both: in the two methods, or in the model's "
            "`on_after_batch_transfer`, or by "
            'ASKModule(..., step="encode", audio=lambda model, batch: ..., text=lambda model, batch: ...).'
        )

    @outside_graphs
    def compare_captured(self, audio: Embeddings, text: Embeddings) -> None:
        """Warn if the step has changed in place what the two methods have returned in it.

        Args:
            audio: What the audio method has returned, at the end of the step.
            text: What the text method has returned, at the end of the step.
        """
        changed = [
            f"`{name}`"
            for name, side in zip(self._names, (audio, text), strict=True)
            if name in self._outputs and not self._is_returned(name, side)
        ]
        if changed:
            rank_zero_warn(
                f"`{type(self._model).__name__}.training_step` changes in place what {' and '.join(changed)} "
                "returned, so the loss gets other embeddings than knowledge, and keys of momentum encoders, "
                "consist of. Do that in the two methods, so that both are compared in one space."
            )

    def compare_embeddings(self, criterion: str, audio: Embeddings, text: Embeddings) -> None:
        """Compare what the step passes to its criterion with what the two methods have returned in it.

        Args:
            criterion: Name of the criterion.
            audio: First argument of the criterion.
            text: Second argument of the criterion.

        Raises:
            RuntimeError: The criterion is called with text first.
        """
        if set(self._outputs) != set(self._names):
            return  # the step encodes by other methods
        model = type(self._model).__name__
        sides = dict(zip(self._names, (audio, text), strict=True))
        if all(self._is_returned(name, side) for name, side in sides.items()):
            self._compare_order(sides)
            return
        if all(map(self._is_returned, self._names, (text, audio))):
            raise RuntimeError(
                f"`{model}.training_step` calls `self.{criterion}` with what `{self._names[1]}` returned "
                f'first, but ASKModule(..., criterion="{criterion}") needs a call with (audio, text). '
                "Exchange the two arguments."
            )
        # Of a step that draws other masks of dropout than the callables nothing can be said.
        if not self._warns or self._have_drawn:
            return
        rank_zero_warn(
            f"`{model}.training_step` calls `self.{criterion}` with other embeddings than "
            f"`{self._names[0]}` and `{self._names[1]}` return, of which knowledge, and keys of momentum "
            "encoders, consist. If it passes them through further layers, do that in the two methods, so "
            "that both are compared in one space."
        )

    def _is_returned(self, name: str, embeddings: Embeddings) -> bool:
        """Whether a call of a method has returned these embeddings."""
        return any(_are_same(embeddings, output) for _, output in self._outputs[name])

    def _compare_order(self, sides: Mapping[str, Embeddings]) -> None:
        """Warn if a method that is called with several parts of the batch has first been called with others.

        Args:
            sides: The embeddings of the pairs by the names of the methods, of which calls have returned them.
        """
        late = []
        for name, embeddings in sides.items():
            calls = self._outputs[name]
            # Those by which a refresh calls the method: with the batch itself, else as it is called first.
            own = [out for place, out in calls if place == calls[0][0] or (place and place.takes_batch)]
            if not any(_are_same(embeddings, output) for output in own):
                late.append(f"`{name}`")
        if late and self._warns:
            rank_zero_warn(
                f"`{type(self._model).__name__}.training_step` contrasts what a later call returned. "
                "Knowledge, and keys of momentum encoders, are made of what the first call of "
                f"{' and '.join(late)} gets, which is something else. Call it first with what belongs to the "
                "pairs."
            )


@torch.no_grad()
def _are_same(embeddings: Embeddings, others: Tensor) -> bool:
    """Whether two batches of embeddings have the same directions."""
    rows = pooled(embeddings)
    if rows.shape != others.shape or rows.ndim != 2:
        return False
    one, other = (unit_length(side.detach().float()) for side in (rows, others))
    are_zero = (one.abs().amax(dim=1) == 0) & (other.abs().amax(dim=1) == 0)
    return bool((((one * other).sum(dim=1) > _SAME_DIRECTION) | are_zero).all())

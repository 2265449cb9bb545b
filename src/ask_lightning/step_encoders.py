"""The encoders of a model as its training step calls them, to encode batches outside of the step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from ask_lightning.capture import Step, shadowing, step_arguments
from ask_lightning.encoding.batch_parts import BatchContent, EncoderCall, describe
from ask_lightning.encoding.encoders import Encoder, encode_batch, encoder_name
from ask_lightning.encoding.outputs import as_encoded
from ask_lightning.encoding.run_state import BufferState, PlainState, RandomState
from ask_lightning.interaction import Embeddings


class StepEncoders:
    """Encodes batches with what the training step passes to the encoders: the batch itself, or parts of it.

    If an encoder cannot take the batch, the training step is run until it has called both, to see what it
    passes. A number that is no part of the batch has to be the same for all batches; it is looked at for two
    of them in each epoch.

    Args:
        audio: The audio encoder.
        text: The text encoder.
        step: How the training step is taken; with `"encode"` it is not run.

    Attributes:
        calls: The calls of the two encoders by their names; empty while they take the batch itself.
    """

    def __init__(self, audio: Encoder, text: Encoder, step: Step) -> None:
        self.calls: dict[str, EncoderCall] = {}
        self._audio, self._text, self._step = audio, text, step
        self._take_batch = False
        self._observed_in_epoch, self._checked_numbers = 0, False

    def __call__(self, batch: Any, model: nn.Module, epoch: int) -> tuple[Embeddings, Embeddings]:
        """Encode both sides of a batch.

        Args:
            batch: The batch.
            model: The model, or a copy of it.
            epoch: The present epoch.

        Returns:
            Audio and text embeddings, `(B, d)` or `TokenEmbeddings`.

        Raises:
            TypeError: An encoder does not return embeddings, or takes something else than the batch or a
                part, or a number that is another one for the next batch.
        """
        if not self.calls:
            before = None if self._take_batch else _StateOfEncoders(model)
            try:
                encoded = encode_batch(model, self._audio, self._text, batch)
                self._take_batch = True
                return encoded
            except Exception as error:
                if before is not None:
                    before.restore()
                self.calls = self._observe(batch, model, error)
                self._observed_in_epoch, self._checked_numbers = epoch, False
        elif any(call.has_numbers for call in self.calls.values()):
            self._check_numbers(batch, model, epoch)
        outputs = []
        for encoder, call in self.calls.items():
            positional, named = call.arguments(batch)
            outputs.append(as_encoded(getattr(model, encoder)(*positional, **named), encoder))
        return outputs[0], outputs[1]

    def _check_numbers(self, batch: Any, model: nn.Module, epoch: int) -> None:
        """Compare the numbers that the training step passes with those that it passed for another batch."""
        is_same_epoch = self._observed_in_epoch == epoch
        if is_same_epoch and self._checked_numbers:
            return
        before, self.calls = self.calls, self._observe(batch, model)
        self._observed_in_epoch, self._checked_numbers = epoch, is_same_epoch
        # From one epoch to the next a schedule may change them.
        if is_same_epoch and self.calls != before:
            first, second = _describe_calls(before), _describe_calls(self.calls)
            self.calls = {}
            raise TypeError(
                f"`{type(model).__name__}.training_step` calls {first} for one batch and {second} for "
                "another, and how the numbers follow from the batch is not known. Put them into the batch, "
                'or say how the encoders are called: ASKModule(..., step="encode", '
                "audio=lambda model, batch: ..., text=lambda model, batch: ...)."
            )

    def _observe(
        self, batch: Any, model: nn.Module, error: Exception | None = None
    ) -> dict[str, EncoderCall]:
        """How the training step calls the encoders; `error` ended a call with the batch itself."""
        if self._step != "encode" and isinstance(self._audio, str) and isinstance(self._text, str):
            assert isinstance(model, pl.LightningModule)
            return _calls_in_step(model, self._audio, self._text, batch, error)
        is_named = isinstance(self._audio, str) or isinstance(self._text, str)
        if is_named and isinstance(error, TypeError | KeyError | IndexError | AttributeError):
            raise _refused_batch(model, self._audio, self._text, batch, error) from error
        assert error is not None
        raise error


def _calls_in_step(
    model: pl.LightningModule, audio: str, text: str, batch: Any, error: Exception | None
) -> dict[str, EncoderCall]:
    """Find out how a training step calls the encoders, by running it until it has called both.

    Args:
        model: The model whose `training_step` runs until the second call. Buffers, numbers and the like among
            its attributes, learning rates and random streams are what they were afterwards; other things that
            it did are done.
        audio: Name of the method that encodes audio.
        text: Name of the method that encodes text.
        batch: The batch for the step.
        error: The error in which a call of the methods with the batch itself ended. None: calls in another
            batch have been found before.

    Returns:
        The calls of the audio and of the text method in terms of the batch.

    Raises:
        Exception: `error` itself, if the step calls the methods with the batch, too.
        TypeError: The step calls them with something that is no part of the batch, or does not call them.
    """
    content = BatchContent(batch)  # the step may write into the batch
    observed, failure = _observed_calls(model, (audio, text), batch, *step_arguments(model, 0))
    step, calls = f"`{type(model).__name__}.training_step`", {}
    for name, (positional, named) in observed.items():
        call = content.find_call(positional, named)
        if call is None:
            passed = ", ".join(map(describe, (*positional, *named.values())))
            raise _refused_batch(
                model,
                audio,
                text,
                batch,
                error,
                f" {step} calls `{name}` with {passed}, which is no part of the batch.",
            ) from error
        calls[name] = call
    if error is not None and calls and all(call.takes_batch for call in calls.values()):
        raise error  # it has another reason
    if missing := [f"`self.{name}`" for name in (audio, text) if name not in calls]:
        reason = f" ({failure})" if failure else ""
        told = f" {step} ends without a call of {' and '.join(missing)}{reason}."
        raise _refused_batch(model, audio, text, batch, error, told) from error
    if error is not None:
        rank_zero_info(f"As the training step does, a refresh calls {_describe_calls(calls)}.")
    return {name: calls[name] for name in (audio, text)}


def _describe_calls(calls: Mapping[str, EncoderCall]) -> str:
    """Calls of encoders as code, for messages.

    Args:
        calls: The calls by the names of the encoders.
    """
    return " and ".join(f"`{name}({call})`" for name, call in calls.items())


def _refused_batch(
    model: object, audio: Encoder, text: Encoder, batch: Any, error: Exception | None, found: str = ""
) -> TypeError:
    """The error for encoders that cannot be called with a batch.

    Args:
        model: The model that has them.
        audio: The audio encoder.
        text: The text encoder.
        batch: The batch with which they were called.
        error: The error in which that ended, if there was one.
        found: What the training step does instead, a sentence with a space before it.
    """
    names = encoder_name(audio), encoder_name(text)
    ended = f", which ended in {type(error).__name__}: {error}" if error is not None else ""
    return TypeError(
        f"`{names[0]}` and `{names[1]}` of {type(model).__name__} were called with the batch, "
        f"{describe(batch)}{ended}.{found} Say how they are called: "
        f'ASKModule(..., step="encode", audio=lambda model, batch: model.{names[0]}(batch["..."]), '
        f'text=lambda model, batch: model.{names[1]}(batch["..."])).'
    )


class _StateOfEncoders:
    """Random streams and a model's buffers, which an encoder changes while it encodes.

    A resumed run looks at a step again. If that drew random numbers, it would go on otherwise than a run
    without a break.
    """

    def __init__(self, model: nn.Module) -> None:
        self._states: list[BufferState | RandomState] = [BufferState(model)]
        if _is_training_thread():
            self._states.append(RandomState())

    def restore(self) -> None:
        """Put everything back to where it was."""
        for state in self._states:
            state.restore()


def _is_training_thread() -> bool:
    """Whether this is no thread of a refresh in the background, beside which training goes on."""
    return threading.current_thread() is threading.main_thread()


class _AllCalled(BaseException):
    """Ends a training step that is only observed; no `except Exception` of the step's own catches it."""


def _observed_calls(
    model: pl.LightningModule, names: Sequence[str], *arguments: Any
) -> tuple[dict[str, tuple[tuple[Any, ...], dict[str, Any]]], Exception | None]:
    """Positional and named arguments of each method's first call in a step, and the error that ended it."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(name, (args, kwargs))
            if len(calls) == len(names):
                raise _AllCalled
            return method(*args, **kwargs)

        return noted

    failure, trainer = None, getattr(model, "_trainer", None)
    optimizers = trainer.optimizers if trainer is not None and _is_training_thread() else ()
    # What the step counts, schedules and draws before it calls the encoders is done again in the step itself.
    states = (PlainState(model, optimizers), _StateOfEncoders(model))
    try:
        with shadowing(model, {name: noting(name, getattr(model, name)) for name in names}):
            model.training_step(*arguments)
    except _AllCalled:
        pass
    except Exception as error:
        failure = error
    finally:
        for state in states:
            state.restore()
    return calls, failure

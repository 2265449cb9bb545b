"""Ways to run a model's own `training_step` with another loss in place of the contrastive one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from ask_lightning.encoding.encoders import Encoder, encoder_name
from ask_lightning.encoding.outputs import as_encoded
from ask_lightning.interaction import Embeddings
from ask_lightning.utilities.arguments import check_choice

F = TypeVar("F", bound=Callable[..., Any])

Step = Literal["auto", "capture", "encode", "criterion"]
"""Ways to take the embeddings of a training step; `"auto"` stands for the one that fits the model."""

Objective = Callable[[Embeddings, Embeddings], Tensor]
"""Loss of audio and text embeddings."""


def outside_graphs(function: F) -> F:
    """Keep `torch.compile` from tracing a function; what it calls is traced.

    What is put in place of a model's methods changes with every step, so a graph must not hold it.

    Args:
        function: Function or method to decorate.
    """
    return cast(F, torch.compiler.disable(function, recursive=False))


def choose_step(
    step: Step, criterion: str | None, audio: Encoder, text: Encoder, model: pl.LightningModule
) -> Step:
    """Decide how the loss of a model is replaced, and check that the model allows it.

    Args:
        step: Argument `step` of `ASKModule`.
        criterion: Argument `criterion` of `ASKModule`.
        audio: The audio encoder.
        text: The text encoder.
        model: The model that is trained.

    Returns:
        `"criterion"` if one is named, else `"capture"` or `"encode"`.

    Raises:
        ValueError: The options exclude each other, or the model lacks what they need.
    """
    check_choice("step", step, get_args(Step))
    name, has_step = type(model).__name__, is_overridden("training_step", model)
    if criterion is not None:
        if step not in ("auto", "criterion"):
            raise ValueError(
                f"Arguments `step` and `criterion` exclude each other, but got {step!r} and {criterion!r}. "
                "Leave one out."
            )
        if not has_step or not callable(getattr(model, criterion, None)):
            raise ValueError(
                f"Argument `criterion` has to name something that {name}.training_step calls, but {name} has "
                f"no {'callable ' + repr(criterion) if has_step else 'training_step'}."
            )
        return "criterion"
    if step == "criterion":
        raise ValueError(
            'step="criterion" needs the name of the attribute to replace: pass `criterion="..."`, too.'
        )
    if step == "encode" or (step == "auto" and not has_step):
        return "encode"
    if not has_step:
        raise ValueError(f'step="capture" needs a training_step, but {name} has none. Use step="encode".')
    if not (isinstance(audio, str) and isinstance(text, str)):
        raise ValueError(
            'step="capture" records what methods of the model return inside its training_step, so `audio` '
            f"and `text` have to be method names, but got {encoder_name(audio)} and {encoder_name(text)}. "
            'Name methods, or use step="encode".'
        )
    if is_param_in_hook_signature(model.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"{name}.training_step takes `dataloader_iter` and fetches batches itself, which cannot be "
            'captured. Use step="encode".'
        )
    return "capture"


@outside_graphs
def step_with_capture(
    model: pl.LightningModule, audio: str, text: str, objective: Objective, *arguments: Any
) -> Any:
    """Run a training step, and replace the loss that it returns by one of the embeddings made in it.

    Args:
        model: The model whose `training_step` runs.
        audio: Name of the method that returns audio embeddings in it.
        text: Name of the method that returns text embeddings in it.
        objective: The loss of audio and text embeddings.
        *arguments: The arguments of `training_step`.

    Returns:
        The loss; or the mapping that the step returned, with this loss; or None if the step returned None,
        which is Lightning's way to skip a batch.

    Raises:
        RuntimeError: The step did not call each of the methods once.
        TypeError: A method did not return embeddings.
    """
    outputs: dict[str, list[Any]] = {audio: [], text: []}
    recorders = {name: _recording(getattr(model, name), record) for name, record in outputs.items()}
    with shadowing(model, recorders):
        result = model.training_step(*arguments)
    if result is None:
        return None
    for name, record in outputs.items():
        if len(record) != 1:
            raise RuntimeError(
                f'step="capture" needs `{type(model).__name__}.training_step` to call '
                f"`self.{name}` once, but it was called {len(record)} times. Use ASKModule(..., "
                'step="encode"), which calls both methods itself and leaves `training_step` out.'
            )
    (audio_output,), (text_output,) = outputs.values()
    loss = objective(as_encoded(audio_output, audio), as_encoded(text_output, text))
    return {**result, "loss": loss} if isinstance(result, Mapping) else loss


@outside_graphs
def step_with_criterion(
    model: pl.LightningModule, criterion: str, objective: Objective, *arguments: Any
) -> Any:
    """Run a training step with another loss in place of the one that it calls.

    Args:
        model: The model whose `training_step` runs.
        criterion: Name of the attribute that the step calls as `self.criterion(audio, text)`.
        objective: The loss of audio and text embeddings that is called instead.
        *arguments: The arguments of `training_step`.

    Returns:
        What the step returned.

    Raises:
        RuntimeError: The step did not call the attribute once.
        TypeError: The step called it with something else than two embeddings.
    """
    calls = 0

    @outside_graphs
    def replacement(*embeddings: Embeddings, **named: Embeddings) -> Tensor:
        nonlocal calls
        calls += 1
        if len(embeddings) != 2 or named:
            raise TypeError(
                f"`self.{criterion}` was called with {len(embeddings)} positional and "
                f"{sorted(named) or 'no'} named arguments, but ASKModule(..., criterion="
                f'"{criterion}") can replace only a call with (audio, text). Move the call into a method '
                "`def contrast(self, audio, text)` of the model, let the step call that, and pass "
                'criterion="contrast"; or use step="capture".'
            )
        value = objective(*embeddings)
        if not value.requires_grad:
            rank_zero_warn(
                f"`{type(model).__name__}.training_step` calls `self.{criterion}` without gradients, under "
                "`torch.no_grad` or with detached embeddings, so the loss that takes its place trains "
                "nothing. Name what the step trains with: ASKModule(..., criterion=...)."
            )
        return value

    with shadowing(model, {criterion: replacement}):
        result = model.training_step(*arguments)
    if calls != 1 and result is not None:
        raise RuntimeError(
            f"ASKModule(..., criterion={criterion!r}) needs `{type(model).__name__}."
            f"training_step` to call `self.{criterion}(audio, text)` once, but it was called "
            f'{calls} times. Use step="capture" or step="encode" without `criterion`.'
        )
    return result


class _StandIn:
    """Is called in place of a method or submodule of the model, and passes everything else on to it."""

    def __init__(self, original: Any, call: Callable[..., Any]) -> None:
        vars(self).update(_original=original, _call=call)

    @outside_graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)


def _recording(method: Callable[..., Any], record: list[Any]) -> Callable[..., Any]:
    """The method, which also appends what it returns to the record."""

    @outside_graphs
    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = method(*args, **kwargs)
        record.append(output)
        return output

    return recorded


def step_arguments(model: pl.LightningModule, *arguments: Any) -> tuple[Any, ...]:
    """The arguments after the batch that a model's training step takes.

    Args:
        model: The model.
        *arguments: What Lightning passes behind the batch, the batch's number.
    """
    takes_index = is_param_in_hook_signature(model.training_step, "batch_idx", min_args=2)
    return arguments if takes_index else ()


@contextmanager
@outside_graphs
def shadowing(model: nn.Module, replacements: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Put functions in place of a model's methods or submodules for a while.

    Entries of the instance's `__dict__` are found before methods of its class and before registered
    submodules, so nothing of the model is overwritten.

    Args:
        model: The model that has them.
        replacements: The functions by the names that they take over.
    """
    before = {name: vars(model)[name] for name in replacements if name in vars(model)}
    vars(model).update({name: _StandIn(getattr(model, name), call) for name, call in replacements.items()})
    try:
        yield
    finally:
        for name in replacements:
            del vars(model)[name]
        vars(model).update(before)

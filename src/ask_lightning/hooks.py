"""The hooks of a model that Lightning has to call on the module that wraps it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.hooks import DataHooks, ModelHooks
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info

# Hooks that the wrapper implements, because it adds to what the model's own do.
_WRAPPER_HOOKS = {"setup", "on_train_start", "on_after_backward"}
_STEPS_AND_OPTIMIZERS = {
    "validation_step",
    "test_step",
    "predict_step",
    "configure_callbacks",
    "configure_optimizers",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
    "lr_scheduler_step",
    "backward",
}


def overridden_hooks(model: pl.LightningModule, *, announce: bool = True) -> dict[str, Callable[..., Any]]:
    """The hooks that a model overrides and that a wrapper has to forward, and no others.

    Lightning calls hooks of its own module only, and decides by what is overridden how it trains. So a
    wrapper may have exactly the hooks of its model, on the instance. A method that shares its name with a
    hook, but cannot take the hook's arguments, is left out with a notice.

    Args:
        model: The wrapped model.
        announce: Whether to give the notice.

    Returns:
        Bound methods of the model by the names of their hooks.
    """
    hooks = {}
    for name in sorted(_hook_names()):
        if not is_overridden(name, model):
            continue
        hook = getattr(model, name)
        if _accepts_arguments_of(hook, getattr(pl.LightningModule, name)):
            hooks[name] = hook
        elif announce:
            rank_zero_info(
                f"{type(model).__name__}.{name}{inspect.signature(hook)} shares its name with a "
                "Lightning hook, but cannot take the hook's arguments; it stays the model's own."
            )
    return hooks


def _hook_names() -> set[str]:
    """Names of the hooks that a wrapper forwards."""
    bases = (ModelHooks, DataHooks)
    named = {name for base in bases for name, value in vars(base).items() if inspect.isfunction(value)}
    return {name for name in named | _STEPS_AND_OPTIMIZERS if not name.startswith("_")} - _WRAPPER_HOOKS


def _accepts_arguments_of(method: Callable[..., Any], hook: Callable[..., Any]) -> bool:
    """Whether a bound method can be called the way Lightning calls the unbound hook of that name."""
    expected = list(inspect.signature(hook).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in expected):
        return True
    required = [parameter for parameter in expected if parameter.default is parameter.empty]
    signature = inspect.signature(method)
    for count in {len(expected), len(required)}:
        try:
            signature.bind(*range(count))
        except TypeError:
            continue
        return True
    return False

"""A wrapper whose parameters, buffers and submodules have the names that they have in the wrapped model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from typing_extensions import Self


class NamedAsModel(pl.LightningModule):
    """A module around `self.model` that shows the model's names, so that code written for the model works.

    What goes by name (`named_parameters`, `named_modules`, `children`, …) is the model's. What has to reach
    every part (`modules`, `train`, `to`) reaches the wrapper, the model and the wrapper's loss.
    """

    model: pl.LightningModule
    loss: nn.Module

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters under the model's names."""
        return self.model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The model's buffers under the model's names."""
        return self.model.named_buffers(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """The model and its submodules under the model's names; the empty name is the model."""
        return self.model.named_modules(*args, **kwargs)  # type: ignore[no-any-return]

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The model's children under the model's names."""
        return self.model.named_children()

    def modules(self, *args: Any, **kwargs: Any) -> Iterator[nn.Module]:
        """The wrapper, the model with its submodules, and the loss, each once."""
        parts = [self, *self.model.modules(*args, **kwargs), *self.loss.modules()]
        return iter({id(part): part for part in parts}.values())

    def get_submodule(self, target: str) -> nn.Module:
        """The model's submodule of this name; the wrapper for an empty one."""
        return self.model.get_submodule(target) if target else self

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a submodule to the model, as `convert_sync_batchnorm` replaces named children."""
        self.model.add_module(name, module)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter of the model."""
        self.model.register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer of the model."""
        self.model.register_buffer(name, tensor, persistent)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's state dict, which may leave weights out."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict into the model."""
        return self.model.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
        # A module that holds this one loads it through its submodules, which are `model` and `loss`.
        stored = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        # All at once: the model may have a submodule that is called `model` as well.
        state_dict.update({f"{prefix}model.{key[len(prefix) :]}": value for key, value in stored.items()})
        for key, value in self.loss.state_dict().items():
            state_dict[f"{prefix}loss.{key}"] = value

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.model.training if "model" in self.__dict__.get("_modules", ()) else True

    @training.setter
    def training(self, mode: bool) -> None:
        # Before there is a model, a module's constructor writes its default.
        if "model" in self.__dict__.get("_modules", ()):
            self.model.training = mode

    def train(self, mode: bool = True) -> Self:
        """Put the model and the loss into training mode, or out of it."""
        self.model.train(mode)
        self._put_loss_into_mode(mode)
        return self

    def _put_loss_into_mode(self, mode: bool) -> None:
        """Put the loss into training mode, or out of it, without the parts that it shares with the model."""
        if self.loss.training != mode:
            shared = set(map(id, self.model.modules()))
            for part in self.loss.modules():
                if id(part) not in shared:
                    part.training = mode

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """Call a function with every part of the model, with the loss, and with the wrapper itself."""
        for part in (self.model, self.loss):
            part.apply(fn)
        fn(self)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        for part in (self.model, self.loss) if recurse else ():
            part._apply(fn)
        return self

    @property
    def trainer(self) -> pl.Trainer:
        """The trainer, which the model has as well."""
        return pl.LightningModule.trainer.__get__(self)  # type: ignore[no-any-return]

    @trainer.setter
    def trainer(self, trainer: pl.Trainer | None) -> None:
        # Lightning gives it to its children only, which here are the model's.
        self.model.trainer = trainer
        self._attached()
        pl.LightningModule.trainer.__set__(self, trainer)  # type: ignore[attr-defined]

    def _attached(self) -> None:
        """Called whenever the wrapper gets a trainer."""

    @property
    def fabric(self) -> Any:
        """The `Fabric`, which the model has as well."""
        return pl.LightningModule.fabric.__get__(self)

    @fabric.setter
    def fabric(self, fabric: Any) -> None:
        self.model.fabric = fabric
        pl.LightningModule.fabric.__set__(self, fabric)  # type: ignore[attr-defined]

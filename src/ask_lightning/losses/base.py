"""The protocol between a loss, `ASKModule` and `KnowledgeRefreshCallback`.

A loss computes `compute`. One with state that outlives a batch also implements `reset`, `training_state` and
`load_training_state`, by which `ASKModule` starts a run anew, writes checkpoints and resumes from them, and
`undo_batch`, for optimisers that evaluate the same batch several times. Such state is in plain attributes,
neither parameters nor buffers: those would go to the optimiser, to every forward pass of DDP and into
averages of weights.

A loss that contrasts with what another encoder than the model makes of the batch sets `needs_keys`: then
`ASKModule` calls `start` with the model before the first step, and before the loss of each training batch
`make_keys`, with the model, a function that embeds this batch with whatever copy of the model it is given,
and the number of optimiser steps so far. The loss owns the copy and decides how it follows the model.

Axes: `B` batch, `d` width.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import Self

from ask_lightning.interaction import Embeddings, TokenEmbeddings, pooled, unit_embeddings
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.utilities.arguments import check_choice, check_positive
from ask_lightning.utilities.clip_ids import integer_ids
from ask_lightning.utilities.deferred_check import DeferredCheck
from ask_lightning.utilities.distributed import Ranks, all_gather_with_gradient
from ask_lightning.utilities.dtypes import computation_dtype

Ids = Tensor | Sequence[int] | Sequence[str]
Positives = Literal["diagonal", "ids"]
SharedPositives = Literal["diagonal", "ids", "same_clip"]
Scalar = float | Tensor | str | Callable[[], Tensor] | Callable[[Any], Tensor]
Temperature = Scalar
Encode = Callable[[nn.Module], tuple[Tensor, Tensor]]
"""Function from a copy of the model to its audio and text embeddings `(B, d)` of the batch in hand."""

# On a GPU, a learnable temperature is read every so many steps.
_STEPS_PER_CHECK = 50


class RetrievalLoss(nn.Module, ABC):
    """A loss of a batch of pairs, which may use a knowledge base.

    A subclass computes `compute`; everything around it is here: checks of the batch, unit length, float32
    whatever the precision around it, clip ids, the batches of other ranks, and the terms for the log.

    Args:
        temperature: τ > 0: a number, the name of the wrapped model's attribute that *is* τ, such as a
            learnable parameter or a property, a callable `(model)` that returns τ, or the parameter itself.
            A loss without a wrapper also takes a callable without arguments. A loss without temperature
            leaves it at 1.
        positives: `"diagonal"`: each sample's own pair is its only positive. `"ids"`: other samples of the
            same clip are left out of the denominator; needs ids. `"same_clip"`: they are positives as well;
            needs ids and a loss that names it in `kinds_of_positives`.
        gather: `True`: the loss is computed over the batches of all ranks, which may be of different sizes,
            with gradients to every rank; under DDP the gradient is that of one process with the whole
            batch. `False`: it is computed over the local batch.

    Attributes:
        knowledge: The `KnowledgeBase` in use, or `None`; `KnowledgeRefreshCallback` sets it.
        last: Detached terms of the last call, by name.

    Examples:
        A loss without knowledge, which trains in an `ASKModule` like the others:

        >>> class SquaredDistance(RetrievalLoss):
        ...     needs_knowledge = False
        ...     def compute(self, audio, text, ids, knowledge):
        ...         loss = (audio - text).square().sum(dim=1).mean()
        ...         return loss, {"loss": loss}
        >>> loss = SquaredDistance()
        >>> loss(torch.eye(2), torch.eye(2))
        tensor(0.)
    """

    needs_knowledge: ClassVar[bool] = True
    """Whether training cannot start without a knowledge base."""

    reads_other_clips: ClassVar[bool] = True
    """Whether a loss with knowledge looks up other clips than those of its batch."""

    needs_keys: ClassVar[bool] = False
    """Whether the loss encodes each training batch by another encoder than the model, in `make_keys`."""

    takes_tokens: ClassVar[bool] = False
    """Whether embeddings may be `TokenEmbeddings`; otherwise they are refused."""

    contrasts_batch_only: ClassVar[bool] = True
    """Whether all negatives are of the batch, so that a single pair has none."""

    kinds_of_positives: ClassVar[tuple[str, ...]] = ("diagonal", "ids")
    """What `positives` may be."""

    scalar_names: ClassVar[tuple[str, ...]] = ("temperature",)
    """The arguments that may be numbers, parameters of the wrapped model or callables."""

    def __init__(
        self, temperature: Temperature = 1.0, *, positives: SharedPositives = "diagonal", gather: bool = False
    ) -> None:
        super().__init__()
        # In a dictionary, because a parameter set as an attribute would be registered here a second time.
        self._scalars: dict[str, Scalar] = {}
        # In a tuple, because the model is no part of the loss.
        self._model: tuple[nn.Module, ...] = ()
        self._hold_scalar("temperature", temperature)
        if isinstance(temperature, Tensor):
            check_positive("temperature", temperature.item())
        elif isinstance(temperature, int | float):
            check_positive("temperature", float(temperature))
        check_choice("positives", positives, self.kinds_of_positives)
        self.positives = positives
        self.gather = gather
        self.knowledge: KnowledgeBase | None = None
        self.last: dict[str, Tensor] = {}
        self._temperature_check = DeferredCheck()
        self._warns_of_scale = not isinstance(self._scalars["temperature"], float)

    @property
    def temperature(self) -> float | Tensor:
        """τ at present. Where it was given as a number, a schedule may set another one."""
        return self._scalar("temperature")

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_positive("temperature", float(value))
        self._set_scalar("temperature", value)

    @property
    def scalars(self) -> dict[str, float | Tensor]:
        """The present values of the arguments that may be learnable."""
        return {name: self._scalar(name) for name in self._scalars}

    def _hold_scalar(self, name: str, value: Scalar) -> None:
        """Keep one of `scalar_names`."""
        if isinstance(value, int | float):
            value = float(value)
        elif not (value.numel() == 1 if isinstance(value, Tensor) else callable(value) or is_name(value)):
            raise TypeError(
                f"Argument `{name}` has to be a number, the name of an attribute of the model, a callable "
                f"(model), or a parameter with one element, but got {value!r}."
            )
        self._scalars[name] = value

    def _set_scalar(self, name: str, value: float) -> None:
        """Replace one of `scalar_names` that is a number by another number."""
        if not isinstance(self._scalars[name], float):
            raise AttributeError(
                f"The {name} of {type(self).__name__} is that of the model. Change it in the model, or make "
                f"the loss with a number: {type(self).__name__}({name}={float(value):.4g})."
            )
        self._scalars[name] = float(value)

    def _scalar(self, name: str) -> float | Tensor:
        """The present value of one of `scalar_names`."""
        scalar: Any = self._scalars[name]
        if isinstance(scalar, str) or _needs_argument(scalar):
            return self._of_model(name, scalar)  # type: ignore[no-any-return]
        is_value = isinstance(scalar, Tensor) or not callable(scalar)
        return scalar if is_value else scalar()  # type: ignore[no-any-return]

    def _of_model(self, name: str, given: Any) -> Any:
        """An argument as the model has it, under a name or through a callable."""
        if not self._model:
            raise RuntimeError(
                f"{type(self).__name__} reads its {name} from a model and has none. Wrap the model: "
                "ASKModule(model, loss); or call `loss.bind(model)`."
            )
        (model,) = self._model
        if not isinstance(given, str):
            return given(model)
        try:
            return attrgetter(given)(model)
        except AttributeError as error:
            raise ValueError(
                f"Argument `{name}` has to name an attribute of {type(model).__name__}, but got "
                f"{given!r}, and: {error}."
            ) from error

    @property
    def is_bound(self) -> bool:
        """Whether the loss has a model to read scalars from, or needs none."""
        takes_model = (isinstance(one, str) or _needs_argument(one) for one in self._scalars.values())
        return bool(self._model) or not any(takes_model)

    def bind(self, model: nn.Module) -> None:
        """Let the loss read from a model what is given by name or as a callable `(model)`.

        Args:
            model: The model that trains with this loss. A copy of the two together is bound to the copy.
        """
        self._model = ()
        if not self.is_bound:
            self._model = (model,)

    @property
    def borrowed_parameters(self) -> dict[str, nn.Parameter]:
        """The wrapped model's parameters that were passed as scalars, by the names of the arguments."""
        return {name: value for name, value in self._scalars.items() if isinstance(value, nn.Parameter)}

    @property
    def closures(self) -> list[str]:
        """The names of scalars that are callables without arguments, which copies share with the original."""
        return [
            name
            for name, value in self._scalars.items()
            if callable(value) and not isinstance(value, Tensor) and not _needs_argument(value)
        ]

    def check_temperature(self, step: int) -> None:
        """Refuse a temperature that is out of its range; point once at one of the model that is above 1.

        Args:
            step: Number of the training step. On a GPU most are left out, and the error comes a step late, so
                that nothing waits for the device.

        Raises:
            RuntimeError: τ is not positive.
        """
        temperature = self.temperature
        self._temperature_check.finish()
        if not isinstance(temperature, Tensor):
            self._check_temperature(temperature)
        elif temperature.is_cpu or step % _STEPS_PER_CHECK == 0:
            self._temperature_check(temperature.reshape(()), self._check_temperature)

    def _check_temperature(self, value: float) -> None:
        """Refuse a value of τ that is not positive; of the model's own say once if it is above 1."""
        if not value > 0:
            raise RuntimeError(
                f"The temperature of {type(self).__name__} has become {value:.4g}, but it has to be "
                "positive. Let the model learn its logarithm, and write a function of the model: `def "
                "tau(model): return model.log_temperature.exp()`."
            )
        if value > 1 and self._warns_of_scale:
            self._warns_of_scale = False
            rank_zero_warn(
                f"The temperature that {type(self).__name__} reads from the model is {value:.4g}; that of "
                "cosines is usually below 1. If the model stores a scale, or as CLIP does its logarithm, "
                "write a function of the model: `def tau(model): return 1 / model.logit_scale.exp()`."
            )

    @property
    def needs_ids(self) -> bool:
        """Whether an option is on that compares clip ids."""
        return self.positives != "diagonal"

    @property
    def needs_training_clips(self) -> bool:
        """Whether the knowledge has to hold the training clips, whatever else it holds."""
        return False

    @property
    def needs_prototypes(self) -> bool:
        """Whether the loss looks the coarse knowledge up; a refresh makes no prototypes otherwise."""
        return self.needs_knowledge

    @property
    def against_collapse(self) -> str:
        """What helps against embeddings that become all alike, in sentences for a message."""
        lower = "a lower temperature, " if "temperature" in self.options else ""
        return f"Try {lower}a lower learning rate, larger batches, or pretrained encoders."

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments as values that a file can hold; `None` for those that it cannot."""
        # A subclass of the user's may take its arguments as it likes.
        own = next(kind for kind in type(self).__mro__ if kind.__module__.startswith(__package__))
        names = inspect.signature(own).parameters
        values = {name: getattr(self, name) for name in names if name not in self.scalar_names}
        scalars = {name: self._scalars[name] for name in self.scalar_names if name in names}
        return {name: _as_stored(value) for name, value in values.items()} | {
            name: value if isinstance(value, int | float | str) else None for name, value in scalars.items()
        }

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        """Make a loss from the `options` of another one.

        Args:
            options: The other loss's `options`.

        Returns:
            The loss.

        Raises:
            ValueError: The other loss had an option that is an object, such as a learnable temperature.
        """
        for name in cls._objects_in(options):
            raise ValueError(
                f"The loss had a {name} that a file cannot hold. Pass `loss={cls.__name__}(...)` with it."
            )
        return cls(**options)

    @classmethod
    def _objects_in(cls, options: dict[str, Any]) -> list[str]:
        """The names of options that stand for an object."""
        return [name for name in cls.scalar_names if name in options and options[name] is None]

    def forward(
        self,
        audio: Embeddings,
        text: Embeddings,
        *,
        ids: Ids | None = None,
        knowledge: KnowledgeBase | None = None,
    ) -> Tensor:
        """The loss of a batch of pairs.

        Args:
            audio: `(B, d)`, or `TokenEmbeddings` where `takes_tokens`; B ≥ 2 over all ranks that are
                gathered; normalised here.
            text: Embeddings of the same kinds; row i of both is pair i.
            ids: B clip identifiers, where `needs_ids`.
            knowledge: The base to use; default `self.knowledge`.

        Returns:
            0-d, float32 (float64 for float64 embeddings).

        Raises:
            TypeError: The loss takes no tokens and got some, or has an interaction that needs them.
            ValueError: Shapes that are not two equal `(B, d)` with B ≥ 2, or ids missing or of another
                number.
            RuntimeError: No knowledge while training, for a loss that needs it.
        """
        self._check_batch(audio, text, ids)
        knowledge = knowledge if knowledge is not None else self.knowledge
        if knowledge is None and self.training and self.needs_knowledge:
            raise RuntimeError(
                f"{type(self).__name__} has no knowledge to look up. Add KnowledgeRefreshCallback() to the "
                "Trainer's callbacks, or set `loss.knowledge = KnowledgeBase.from_embeddings(..., ids=...)`."
            )
        device = pooled(audio).device
        with torch.autocast(device.type, enabled=False):
            dtype = computation_dtype(pooled(audio))
            audio, text = (unit_embeddings(side, dtype) for side in (audio, text))
            # Without waiting for what the device has to do before.
            id_tensor = (
                None if ids is None else integer_ids(ids).to(device, non_blocking=device.type == "cuda")
            )
            if knowledge is not None and knowledge is self.knowledge and knowledge.device != device:
                self.knowledge = knowledge = knowledge.to(device)
            loss, terms = self.compute(audio, text, id_tensor, knowledge)
        self.last = {name: term.detach() for name, term in terms.items()}
        return loss

    def zero(self, audio: Embeddings, text: Embeddings) -> Tensor:
        """Zero, with a gradient of zero to the embeddings and to everything that the loss learns.

        Args:
            audio: Audio embeddings of a batch.
            text: Text embeddings of a batch.
        """
        sides = [pooled(side) for side in (audio, text)]
        sides += [side.tokens for side in (audio, text) if isinstance(side, TokenEmbeddings)]
        total: Tensor = sum((side.float().sum() for side in sides), start=sides[0].new_zeros(()).float())
        return 0.0 * (total + sum(self.scalars.values()))

    def check_knowledge(self, knowledge: KnowledgeBase) -> None:
        """Refuse a base with which the loss cannot be computed, when it is made, or prepare it for lookups.

        By default all are as good as they are.

        Args:
            knowledge: The new base.

        Raises:
            ValueError: The base cannot be used; the message says why.
        """

    @abstractmethod
    def compute(
        self, audio: Any, text: Any, ids: Tensor | None, knowledge: KnowledgeBase | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of unit embeddings and its terms for the log.

        Args:
            audio: `(B, d)` unit vectors, float32 or float64, or `TokenEmbeddings` where `takes_tokens`.
            text: Unit vectors of the same kinds.
            ids: `(B,)` int64, where they were given.
            knowledge: The base, on the embeddings' device; `None` only in evaluation mode, or where it is
                not needed.

        Returns:
            The loss, 0-d, and its terms by name.
        """

    def start(self, model: nn.Module, step: int) -> None:
        """Take what `make_keys` needs of the model; called before the first training step of a `fit`.

        Args:
            model: Model with the weights, on the device and in the dtype in which training starts.
            step: Number of optimiser steps so far; above 0 in a resumed run.
        """

    def make_keys(self, model: nn.Module, encode: Encode, step: int) -> None:
        """Encode the batch whose loss is computed next; called before it where `needs_keys` is true.

        Args:
            model: Model that is trained, with its weights after `step` optimiser steps.
            encode: Function that embeds the batch with a copy of the model, without a trace in the run's
                random streams and logs.
            step: Number of optimiser steps so far; it stays the same while gradients are accumulated.
        """

    def reset(self) -> None:
        """Forget what earlier batches left behind; called where a new run starts."""

    def training_state(self) -> dict[str, Any]:
        """What the next loss depends on beside the batch, as tensors and numbers; empty without state."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from what `training_state` returned.

        Args:
            state: The other loss's `training_state`; tensors may lie on another device.
        """

    def undo_batch(self) -> None:
        """Forget what the last training batch left behind, as it is computed once more.

        Optimisers that call their closure several times in a step (L-BFGS, SAM) do that.
        """

    @property
    def _gathers_ranks(self) -> bool:
        """Whether the loss is over the batches of several ranks."""
        return self.gather and Ranks.current().size > 1

    def _rows_of_all_ranks(self, *sides: Tensor) -> tuple[Tensor, ...]:
        """Tensors `(B, ...)` with the rows of all ranks, if `gather` asks for it; in one exchange."""
        if not self._gathers_ranks:
            return sides
        columns = [side.reshape(len(side), -1) for side in sides]
        gathered = all_gather_with_gradient(torch.cat(columns, dim=1))  # (ΣB, …)
        parts = gathered.split([column.shape[1] for column in columns], dim=1)
        return tuple(part.reshape(-1, *side.shape[1:]) for part, side in zip(parts, sides, strict=True))

    def _gathered(self, rows: Tensor) -> Tensor:
        """Rows `(b, ...)` of all ranks without gradient, if `gather` asks for them."""
        return torch.cat(Ranks.current().all_gather(rows)) if self._gathers_ranks else rows

    def _same_clip(self, ids: Tensor | None) -> Tensor | None:
        """`(B, B)`, true where two samples are of one clip, if `positives` asks for it."""
        if ids is None or self.positives == "diagonal":
            return None
        everyone = self._gathered(ids)  # (B,)
        return everyone[:, None] == everyone

    @property
    def min_pairs(self) -> int:
        """The smallest batch of a rank.

        It is 2, or 1 where negatives come from elsewhere, and on several ranks: what a rank leaves out the
        others would wait for. A single pair of a rank that has no other negatives contributes what its pair
        alone is worth, 0 for a contrast.
        """
        return 2 if self.contrasts_batch_only and Ranks.current().size == 1 else 1

    def _check_batch(self, audio: Embeddings, text: Embeddings, ids: Ids | None) -> None:
        """Refuse batches that cannot be contrasted, and missing ids."""
        if not self.takes_tokens and (
            isinstance(audio, TokenEmbeddings) or isinstance(text, TokenEmbeddings)
        ):
            raise TypeError(
                f"{type(self).__name__} compares pooled embeddings, but the encoders returned "
                "TokenEmbeddings. Have them return the pooled embeddings alone, or train with NTXentLoss, "
                "KnowledgeDistillationLoss or ReliabilityOTLoss."
            )
        audio, text = pooled(audio), pooled(text)
        if audio.ndim != 2 or audio.shape != text.shape:
            raise ValueError(
                "Arguments `audio` and `text` have to be of the same shape (batch, width), but got "
                f"{tuple(audio.shape)} and {tuple(text.shape)}. Project both to one width and pool "
                "tokens before the loss."
            )
        if len(audio) < self.min_pairs:
            raise ValueError(
                f"A batch has to hold at least 2 pairs to contrast, but got audio {tuple(audio.shape)} and "
                f"text {tuple(text.shape)}. Raise the batch size or set `drop_last=True`."
            )
        if self.needs_ids and ids is None:
            raise ValueError(
                f"Argument `ids` has to be given, because {type(self).__name__} with these options compares "
                "clips: pass `ids=` to the loss, or to ASKModule."
            )
        if ids is not None and len(ids) != len(audio):
            raise ValueError(
                f"Argument `ids` has to hold one id for each of the {len(audio)} pairs, but got {len(ids)}."
            )


def _as_stored(value: Any) -> Any:
    """An option as a file can hold it; a schedule may have made it a number of NumPy or torch."""
    if isinstance(value, tuple):
        return list(value)
    return value.item() if isinstance(value, np.generic | Tensor) else value


def is_name(value: object) -> bool:
    """Whether something is the name of an attribute, of an object itself or of its attributes.

    Args:
        value: Anything.
    """
    return isinstance(value, str) and all(part.isidentifier() for part in value.split("."))


def _needs_argument(function: object) -> bool:
    """Whether something is a callable that cannot be called without an argument."""
    if isinstance(function, Tensor) or not callable(function):
        return False
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    return False

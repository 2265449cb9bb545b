"""Two passes of an encoder over the chunks of a batch: one for embeddings, one for their gradients.

The second pass runs inside one node of autograd's graph, whose inputs are the parameters. So each parameter
gets its gradient once for each batch, in the one backward pass of Lightning's automatic optimisation: what
hangs on it, such as the buckets of DDP, hooks and gradient scaling, sees what it sees without chunks.

Axes: `c` chunk, `L` tokens, `d` width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ask_lightning.encoding.isolation import muted_logging
from ask_lightning.encoding.run_state import BufferState, RandomSource, RandomState
from ask_lightning.interaction import Embeddings, TokenEmbeddings

# Embeddings of the second pass may be off by so much of their size: reductions on a GPU have no fixed order,
# while other dropout masks change embeddings by more.
_REPEATABLE = 1e-2


class TwoPasses:
    """The first pass over the chunks, and the second one, which makes their gradients.

    Args:
        encode: Function from the number of a chunk to its embeddings.
        model: Module whose buffers, logs and random streams it may use.
        name: Name of the encoder, for messages.
    """

    def __init__(self, encode: Callable[[int], Embeddings], model: nn.Module, name: str) -> None:
        self._encode, self._model, self._name = encode, model, name
        self._sources = _random_sources(model)
        self._buffers = BufferState(model)
        self._precision = _Precision(model)
        self._random_states: list[RandomState] = []
        self._embeddings: list[Embeddings] = []
        self._is_learned: list[list[bool]] = []
        self._parameters: dict[nn.Parameter, None] = {}

    def encode(self, chunk: int) -> None:
        """Encode a chunk for the first time; chunks come in their order."""
        self._random_states.append(RandomState(self._sources))
        # With a graph, which is dropped at once: kernels are those of the second pass, and the graph says
        # which parameters have a part in the embeddings.
        embeddings = self._encode(chunk)
        tensors = _tensors(embeddings)
        self._parameters |= dict.fromkeys(_parameters_behind(tensors, self._name))
        self._is_learned.append([tensor.requires_grad for tensor in tensors])
        self._embeddings.append(embeddings.detach())

    def with_gradient(self) -> list[Embeddings]:
        """The embeddings of the chunks, whose gradient goes to the parameters by the second pass."""
        if not self._parameters:
            return self._embeddings
        learned = iter(_SecondPass.apply(self, *self._parameters))  # type: ignore[no-untyped-call]
        return [
            _replaced(
                embeddings,
                [
                    next(learned) if is_learned else tensor
                    for tensor, is_learned in zip(_tensors(embeddings), flags, strict=True)
                ],
            )
            for embeddings, flags in zip(self._embeddings, self._is_learned, strict=True)
        ]

    def learned_tensors(self) -> list[Tensor]:
        """What of all chunks' embeddings has a gradient, in order, without graph."""
        return [
            tensor
            for embeddings, flags in zip(self._embeddings, self._is_learned, strict=True)
            for tensor, is_learned in zip(_tensors(embeddings), flags, strict=True)
            if is_learned
        ]

    def parameter_gradients(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The second pass: gradients of the parameters from those of `learned_tensors`."""
        parameters, coming = list(self._parameters), iter(gradients)
        totals = _Totals(len(parameters))
        off = size = torch.zeros(())
        buffers, random_state = BufferState(self._model), RandomState(self._sources)
        try:
            with muted_logging(self._model), _without_hooks(parameters):
                self._buffers.restore()  # each chunk leaves them to the next as in the first pass
                for chunk, first in enumerate(self._embeddings):
                    self._random_states[chunk].restore()
                    with torch.enable_grad(), self._precision.as_before():
                        again = _tensors(self._encode(chunk))
                    flags = self._is_learned[chunk]
                    for before, now in zip(_tensors(first), again, strict=True):
                        off = off.to(now.device) + (now.detach() - before).float().square().sum()
                        size = size.to(now.device) + before.float().square().sum()
                    wanted = [next(coming) if is_learned else None for is_learned in flags]
                    pairs = [
                        (tensor, gradient)
                        for tensor, gradient in zip(again, wanted, strict=True)
                        if gradient is not None
                    ]
                    if pairs:
                        outputs, of_outputs = zip(*pairs, strict=True)
                        totals.add(torch.autograd.grad(outputs, parameters, of_outputs, allow_unused=True))
        finally:
            buffers.restore()
            random_state.restore()
        if off > _REPEATABLE**2 * size:
            raise RuntimeError(
                f"`{self._name}` returned other embeddings when it encoded a chunk again for the gradient, "
                "which would be wrong. It has to give the same for the same batch, apart from random numbers "
                "of the global streams of torch, NumPy and Python and of generators that are attributes of "
                "the model's modules. Leave `chunk_size` out, or let nothing else change in it."
            )
        return totals.sums


class _SecondPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: TwoPasses, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.passes = passes
        ctx.set_materialize_grads(False)
        # Other tensor objects than those that `passes` holds: these will hold the graph that holds `passes`.
        return tuple(tensor.detach() for tensor in passes.learned_tensors())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.passes.parameter_gradients(gradients)


class _Totals:
    """Sums of gradients.

    Args:
        count: Number of parameters.
    """

    def __init__(self, count: int) -> None:
        self.sums: list[Tensor | None] = [None] * count
        self._is_own = [False] * count

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of a chunk, one for each parameter, or None."""
        for i, gradient in enumerate(gradients):
            total = self.sums[i]
            if gradient is None:
                continue
            if total is None:
                self.sums[i] = gradient
            elif self._is_own[i]:
                total.add_(gradient)
            else:  # the first one may be a view, or that of another parameter as well
                self.sums[i], self._is_own[i] = total + gradient, True


class _Precision:
    """Autocast and the default dtype, as they are now.

    Args:
        model: Model whose devices count.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = {"cpu"} | {parameter.device.type for parameter in model.parameters()}
        self._dtype = torch.get_default_dtype()
        self._caches = torch.is_autocast_cache_enabled()
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds
        }

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Bring them back for a while."""
        now = torch.get_default_dtype()
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self._autocast.items():
                stack.enter_context(torch.autocast(kind, dtype, enabled, self._caches))
            torch.set_default_dtype(self._dtype)
            try:
                yield
            finally:
                torch.set_default_dtype(now)


def _tensors(embeddings: Embeddings) -> list[Tensor]:
    """The tensors of embeddings that may have a gradient."""
    if isinstance(embeddings, TokenEmbeddings):
        return [embeddings.pooled, embeddings.tokens]
    return [embeddings]


def _replaced(embeddings: Embeddings, tensors: Sequence[Tensor]) -> Embeddings:
    """The embeddings with other `_tensors`."""
    if isinstance(embeddings, TokenEmbeddings):
        return replace(embeddings, pooled=tensors[0], tokens=tensors[1])
    return tensors[0]


def _parameters_behind(tensors: Sequence[Tensor], name: str) -> list[nn.Parameter]:
    """The parameters that tensors were computed from."""
    found, seen = [], set()
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "CheckpointFunctionBackward":  # parameters inside are not in the graph
            raise RuntimeError(
                f"`{name}` uses reentrant checkpoints, which cannot be combined with `chunk_size`. Pass "
                "`use_reentrant=False` to torch.utils.checkpoint; a model of transformers takes it by "
                'gradient_checkpointing_enable({"use_reentrant": False}).'
            )
        if isinstance(leaf := getattr(node, "variable", None), nn.Parameter):
            found.append(leaf)
        waiting += [following for following, _ in node.next_functions if following is not None]
    return found


def _random_sources(model: nn.Module) -> list[RandomSource]:
    """Random streams that modules hold as attributes."""
    return [
        value for part in model.modules() for value in vars(part).values() if isinstance(value, RandomSource)
    ]


@contextmanager
def _without_hooks(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep the hooks of parameters for the gradient of the whole batch, for which they are called later."""
    kept = [(hooks, dict(hooks)) for one in parameters if (hooks := one._backward_hooks)]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, functions in kept:
            hooks.update(functions)

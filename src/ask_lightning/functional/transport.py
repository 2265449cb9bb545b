"""Optimal transport between the batch's texts and audios, Eq. 15 and 36.

Axes: `B` rows, `C` columns, of which there are as many in a batch; `G` problems of the same size.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, Literal, get_args
from warnings import warn

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from ask_lightning.utilities.arguments import check_choice, check_count, check_positive
from ask_lightning.utilities.dtypes import computation_dtype

Array = np.ndarray[Any, np.dtype[Any]]
PlanScaling = Literal["marginal", "row"]
A2TRealignment = Literal["transposed_plan", "transposed_result", "same_plan"]

# Below this ε the exponentials of similarities in [-1, 1] leave float32's comfortable range.
_SMALLEST_EXPONENTIAL_EPSILON = 0.03
# On a GPU an iteration of a small problem takes as long as the launching of its kernels: two in the log
# domain, four in the exponential one. From here on the reading and writing of the matrix counts.
_SMALLEST_EXPONENTIAL_GPU_ROWS = 256
# The registers of one multiprocessor of a GPU hold as many rows and columns.
_LARGEST_OF_ONE_KERNEL = 256
_HAS_TRITON = find_spec("triton") is not None


def sinkhorn_plan(
    similarity: Tensor, epsilon: float = 0.1, iterations: int = 50, *, bounded: bool = True
) -> Tensor:
    """The entropic transport plan that maximises similarity between uniform marginals.

    Eq. 15 of the paper:

        Q* = argmax_Q ⟨Q, S⟩ + ε H(Q)   subject to   Q 1 = 1/B,   Qᵀ 1 = 1/C

    by Sinkhorn–Knopp with a fixed number of iterations: no stopping test, so no synchronisation with
    the host. The last update is of the columns: column sums are exact, row sums converge. Leading axes hold
    problems of their own, which a GPU solves together.

    Computed in float32 (float64 for float64 input) whatever autocast is active. Differentiable through
    the iterations if `similarity` requires a gradient.

    Args:
        similarity: `(..., B, C)`, rows and columns any two sets; usually one square matrix.
        epsilon: ε > 0, the weight of the entropy. Large: uniform; small: a permutation.
        iterations: Number of row-and-column updates, at least 1.
        bounded: Whether all similarities lie in [-1, 1], as cosines do. Then ε ≥ 0.03 may run in the
            exponential domain, which is several times faster on a CPU; otherwise the log domain is used.

    Returns:
        `(..., B, C)`, non-negative, each matrix of total mass 1, in float32 or float64.

    Raises:
        ValueError: `epsilon` is not positive or `iterations` is below 1.

    Examples:
        >>> plan = sinkhorn_plan(torch.eye(3), epsilon=0.1)
        >>> plan.diagonal()
        tensor([0.3333, 0.3333, 0.3333])
    """
    check_positive("epsilon", epsilon)
    check_count("iterations", iterations)
    similarity = similarity.to(computation_dtype(similarity))  # (..., B, C)
    differentiated = torch.is_grad_enabled() and similarity.requires_grad
    # The exponential domain's gradient squares scalings that may themselves be near float32's limit.
    if differentiated or not bounded or epsilon < _SMALLEST_EXPONENTIAL_EPSILON:
        return _log_domain(similarity / epsilon, iterations)
    similarity = similarity.detach()
    if similarity.is_cpu and not torch.compiler.is_compiling():
        return _exponential_domain_on_cpu(similarity, epsilon, iterations)
    if similarity.is_cpu or _fits_one_kernel(similarity):
        plan: Tensor = _operator(similarity, epsilon, iterations)
        return plan
    if similarity.shape[-2] < _SMALLEST_EXPONENTIAL_GPU_ROWS:
        return _log_domain(similarity / epsilon, iterations)
    return _exponential_domain(similarity, epsilon, iterations)


def balance_scores(scores: Tensor, epsilon: float = 0.1, iterations: int = 5) -> Tensor:
    """Shift the scores of each row and column so that no row or column is everybody's best.

    With the transport plan Q of `sinkhorn_plan`, log Q_ij = S_ij / ε + f_i + g_j + const; the result is
    S + ε (f + g), whose exponentials at temperature ε sum to the same in each row and in each column. The
    shifts are constants for the gradient. Computed in float32 (float64 for float64 input), as that plan is.

    Args:
        scores: `(B, C)`, rows and columns any two sets.
        epsilon: ε > 0, in the unit of the scores. Small: strong shifts of what is everybody's best.
        iterations: Number of row-and-column updates, at least 1. Column sums are exact, row sums converge.

    Returns:
        `(B, C)`, in float32 or float64.

    Raises:
        ValueError: `epsilon` is not positive or `iterations` is below 1.

    Examples:
        The second column is everybody's best:

        >>> balanced = balance_scores(torch.tensor([[0.5, 0.9], [0.1, 0.9]]), epsilon=0.1, iterations=50)
        >>> (balanced / 0.1).softmax(dim=1).sum(dim=0).round(decimals=4)
        tensor([1., 1.])
    """
    check_positive("epsilon", epsilon)
    check_count("iterations", iterations)
    scores = scores.to(computation_dtype(scores))
    constant = scores.detach()
    num_rows, num_columns = scores.shape
    balanced = _log_scaled(constant / epsilon, iterations) + math.log(num_rows / num_columns)  # (B, C)
    return scores + (epsilon * balanced - constant)


def realign_similarity(
    similarity: Tensor,
    plan: Tensor,
    ot_factor: float = 0.2,
    *,
    plan_scaling: PlanScaling = "marginal",
) -> Tensor:
    """Mix each query's similarities with those of the items that the plan transports it to.

    Eq. 15 of the paper: `S* = ((1 - β) I + β Q̂) S`.

    With `"marginal"`, the paper's text, the plan's rows sum to 1/B, so the transport term shrinks as 1/B
    and S* is close to (1 - β) S: mostly a higher temperature. With `"row"` the plan is scaled by B,
    its rows sum to 1, and β is the share of transport.

    Args:
        similarity: `(B, B)`, S.
        plan: `(B, B)`, Q* of total mass 1.
        ot_factor: β in [0, 1]. At 0 the similarity comes back unchanged.
        plan_scaling: `"marginal"` for Q̂ = Q*, `"row"` for Q̂ = B Q*.

    Returns:
        `(B, B)`.

    Raises:
        ValueError: An unknown `plan_scaling`.

    Examples:
        >>> realign_similarity(torch.eye(2), torch.full((2, 2), 0.25), 0.5, plan_scaling="row")
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """
    check_choice("plan_scaling", plan_scaling, get_args(PlanScaling))
    if ot_factor == 0:
        return similarity
    scale = len(plan) if plan_scaling == "row" else 1
    return torch.addmm(similarity, plan, similarity, beta=1 - ot_factor, alpha=ot_factor * scale)


def realign_both_directions(
    similarity: Tensor,
    plan: Tensor,
    ot_factor: float = 0.2,
    *,
    plan_scaling: PlanScaling = "marginal",
    a2t_realignment: A2TRealignment = "transposed_plan",
) -> tuple[Tensor, Tensor]:
    """Realign the similarities of both directions, Eq. 15, by one plan.

    Text-to-audio is `S* = ((1 - β) I + β Q̂) S`. The paper does not write audio-to-text out:

    * `"transposed_plan"`: `((1 - β) I + β Q̂ᵀ) Sᵀ`, the same with the roles of both modalities exchanged.
      Each audio mixes with the audios whose texts the plan transports it to.
    * `"transposed_result"`: `(S*)ᵀ = (1 - β) Sᵀ + β Sᵀ Q̂ᵀ`, so that both directions contrast one matrix.
    * `"same_plan"`: `((1 - β) I + β Q̂) Sᵀ`, the formula with S replaced and Q̂ left as it is.

    Args:
        similarity: `(B, B)`, S, rows text, columns audio.
        plan: `(B, B)`, Q* of S.
        ot_factor: β in [0, 1]. At 0 both come back unchanged.
        plan_scaling: `"marginal"` or `"row"`, see `realign_similarity`.
        a2t_realignment: Which matrix audio-to-text contrasts, see above.

    Returns:
        `(B, B)` of text-to-audio, rows text, and `(B, B)` of audio-to-text, rows audio.

    Raises:
        ValueError: An unknown `plan_scaling` or `a2t_realignment`.

    Examples:
        >>> similarity, plan = torch.tensor([[1.0, 0.2], [0.0, 1.0]]), torch.full((2, 2), 0.25)
        >>> t2a, a2t = realign_both_directions(similarity, plan, a2t_realignment="transposed_result")
        >>> torch.equal(t2a, a2t.T)
        True
    """
    check_choice("a2t_realignment", a2t_realignment, get_args(A2TRealignment))
    t2a = realign_similarity(similarity, plan, ot_factor, plan_scaling=plan_scaling)
    if a2t_realignment == "transposed_result":
        return t2a, t2a.T
    own_plan = plan if a2t_realignment == "same_plan" else plan.T
    return t2a, realign_similarity(similarity.T, own_plan, ot_factor, plan_scaling=plan_scaling)


def _log_domain(scaled: Tensor, iterations: int) -> Tensor:
    """The plan on logarithms: for any ε, any similarities, and for gradients."""
    return _log_scaled(scaled, iterations).exp() / scaled.shape[-1]


def _log_scaled(scaled: Tensor, iterations: int) -> Tensor:
    """Logarithms shifted by row and by column so that the exponentials of each row, then column, sum to 1."""
    for _ in range(iterations):
        scaled = scaled.log_softmax(dim=-1).log_softmax(dim=-2)
    return scaled


def _kernel(similarity: Tensor, epsilon: float) -> Tensor:
    """The logarithm of a kernel whose scaled form is the plan, with entries of at most 0."""
    # The shift scales whole rows, which the first row update undoes.
    shift = similarity.amax(dim=-1, keepdim=True).div_(-epsilon)  # (..., B, 1)
    return torch.add(shift, similarity, alpha=1 / epsilon)


def _exponential_domain(similarity: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Scale rows to sum to 1 and columns to B/C in turn, without a graph."""
    num_rows, num_columns = similarity.shape[-2:]
    kernel = _kernel(similarity, epsilon).exp_().reshape(-1, num_rows, num_columns)  # (G, B, C)
    rows, columns = kernel.new_empty(len(kernel), num_rows, 1), kernel.new_ones(len(kernel), num_columns, 1)
    with torch.autocast(kernel.device.type, enabled=False):
        for _ in range(iterations):
            torch.bmm(kernel, columns, out=rows).reciprocal_()
            torch.bmm(kernel.mT, rows, out=columns).reciprocal_().mul_(num_rows / num_columns)
    return kernel.mul_(rows).mul_(columns.mT / num_rows).reshape(similarity.shape)


def _exponential_domain_on_cpu(similarity: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The same in NumPy, whose calls have a fraction of the overhead of torch's: at B = 32 that is all."""
    num_rows, num_columns = similarity.shape[-2:]
    kernel = _kernel(similarity, epsilon).reshape(-1, num_rows, num_columns)  # (G, B, C)
    # What is no number stays none in the plan, without a warning beside it.
    with _one_blas_thread(), np.errstate(all="ignore"):
        for scaled in kernel:
            matrix = scaled.numpy()
            np.exp(matrix, matrix)
            rows, columns = _scale(matrix, iterations)
            columns *= 1 / num_rows
            scaled.mul_(torch.from_numpy(rows)[:, None]).mul_(torch.from_numpy(columns))
    return kernel.reshape(similarity.shape)


def _fits_one_kernel(similarity: Tensor) -> bool:
    """Whether a multiprocessor of a GPU can hold each problem as a whole."""
    rows, columns = similarity.shape[-2:]
    is_small = rows <= _LARGEST_OF_ONE_KERNEL and columns <= _LARGEST_OF_ONE_KERNEL
    return _HAS_TRITON and is_small and similarity.is_cuda and similarity.dtype == torch.float32


@torch.library.custom_op("ask_lightning::exponential_plan", mutates_args=(), device_types="cpu")
def _operator(similarity: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The same as one operator, of which `torch.compile` sees the result alone."""
    return _exponential_domain_on_cpu(similarity, epsilon, iterations).contiguous()


@_operator.register_kernel("cuda")
def _operator_on_gpu(similarity: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The operator on a GPU, for what fits one kernel."""
    if not _builds_kernels(similarity.device):
        return _log_domain(similarity / epsilon, iterations).contiguous()
    from ask_lightning.functional.transport_kernel import plan_in_one_kernel  # needs Triton

    return plan_in_one_kernel(similarity, epsilon, iterations)


@cache
def _builds_kernels(device: torch.device) -> bool:
    """Whether Triton, which may be installed without what it needs, can build a kernel; else warn, once."""
    try:
        from ask_lightning.functional.transport_kernel import plan_in_one_kernel

        plan_in_one_kernel(torch.eye(2, device=device), 0.1, 1)
    except torch.OutOfMemoryError:  # of the step, which says nothing about Triton
        raise
    except Exception as error:
        warn(
            f"Triton cannot build the kernel of the transport plan, which takes longer without it: {error} "
            "Triton needs a C compiler and Python's headers: apt install gcc python3-dev.",
            stacklevel=2,
        )
        return False
    return True


@_operator.register_fake
def _operator_without_numbers(similarity: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The shape of the operator's result, which is contiguous whatever the layout of its argument."""
    return similarity.new_empty(similarity.shape)


def _scale(kernel: Array, iterations: int) -> tuple[Array, Array]:
    """Find the factors of the rows and of the columns of a kernel `(B, C)`."""
    num_rows, num_columns = kernel.shape
    rows, columns = np.empty(num_rows, kernel.dtype), np.ones(num_columns, kernel.dtype)
    row_sums, column_sums, invert = kernel.dot, kernel.T.dot, np.reciprocal
    invert_columns: Any = invert if num_rows == num_columns else partial(np.divide, num_rows / num_columns)
    for _ in range(iterations):
        invert(row_sums(columns, rows), rows)
        invert_columns(column_sums(rows, columns), columns)
    return rows, columns


def _one_blas_thread() -> AbstractContextManager[object]:
    """A context that keeps NumPy to one thread.

    Products this small gain less from a second thread than they wait for it while torch's own threads are
    running (benchmarks/sinkhorn.py).
    """
    threads = _blas_threads()
    # Setting the number takes as long as several iterations, asking for it does not.
    if all(library.num_threads == 1 for library in threads.lib_controllers):
        return nullcontext()
    limit: AbstractContextManager[object] = threads.limit(limits=1)
    return limit


@cache
def _blas_threads() -> ThreadpoolController:
    """The controller of NumPy's BLAS threads."""
    # Finding the libraries takes milliseconds, so once; limiting them takes microseconds.
    return ThreadpoolController().select(user_api="blas")

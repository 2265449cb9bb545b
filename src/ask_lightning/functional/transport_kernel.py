"""Sinkhorn–Knopp as one kernel of a GPU, whose iterations are two to four launches each otherwise.

It needs Triton, which comes with torch where torch can use it. Axes: `G` problems, `B` rows, `C` columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A warp scales this many entries without waiting longer for others than they would save it, and fewer than
# so many warps leave a multiprocessor idle (benchmarks/sinkhorn.py --device cuda).
_ENTRIES_PER_WARP = 8192
_FEWEST_WARPS = 4


def plan_in_one_kernel(similarity: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The transport plans of problems of which a multiprocessor holds one in its registers.

    They are scaled in the exponential domain, see `ask_lightning.functional.sinkhorn_plan`.

    Args:
        similarity: `(..., B, C)`, float32, on a GPU.
        epsilon: ε > 0, the weight of the entropy.
        iterations: Number of row-and-column updates, at least 1.

    Returns:
        `(..., B, C)`, contiguous.
    """
    rows, columns = similarity.shape[-2:]
    problems = similarity.reshape(-1, rows, columns).contiguous()  # (G, B, C)
    plans = torch.empty_like(problems)
    height, width = triton.next_power_of_2(rows), triton.next_power_of_2(columns)
    warps = max(_FEWEST_WARPS, height * width // _ENTRIES_PER_WARP)
    with torch.cuda.device_of(problems):  # Triton launches on the current device, wherever the tensors lie
        _scale[(len(problems),)](
            problems, plans, rows, columns, 1 / epsilon, iterations, height, width, num_warps=warps
        )
    return plans.reshape(similarity.shape)


@triton.jit  # type: ignore[untyped-decorator]
def _scale(similarity, plan, rows, columns, sharpness, iterations, height: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale one problem: rows to sum to 1 and columns to B/C in turn, then both to a plan."""
    row, column = tl.arange(0, height), tl.arange(0, width)
    is_row, is_column = row < rows, column < columns
    is_entry = is_row[:, None] & is_column[None, :]
    place = tl.program_id(0).to(tl.int64) * rows * columns + row[:, None] * columns + column[None, :]
    scaled = sharpness * tl.load(similarity + place, mask=is_entry, other=-float("inf"))  # (B, C)
    # The shift scales whole rows, which the first row update undoes.
    largest = tl.where(is_row, tl.max(scaled, axis=1), 0.0)
    kernel = tl.where(is_entry, tl.exp(scaled - largest[:, None]), 0.0)
    row_factors = tl.full((height,), 0.0, tl.float32)
    column_factors = tl.full((width,), 1.0, tl.float32)
    ratio = rows * 1.0 / columns
    for _ in range(iterations):
        row_factors = tl.where(is_row, 1.0 / tl.sum(kernel * column_factors[None, :], axis=1), 0.0)
        column_sums = tl.sum(kernel * row_factors[:, None], axis=0)
        column_factors = tl.where(is_column, ratio / column_sums, 0.0)
    scaled = kernel * row_factors[:, None] * (column_factors[None, :] / rows)
    tl.store(plan + place, scaled, mask=is_entry)

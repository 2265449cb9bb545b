"""The transport plan of a batch against POT and geomloss: time, and how far their plans are from ours.

    python benchmarks/sinkhorn.py --batch 32 256 1024 4096 --json docs/benchmarks/sinkhorn.json

prints a Markdown table of milliseconds. All run the same number of iterations in float32 with the same ε and
no stopping test, taking turns; medians over rounds, and ratios of medians. POT updates columns before rows,
so it gets the transposed problem: then its iterates are ours. geomloss anneals ε and averages both updates,
so its plan is another one until it has converged; it is left out where it is not installed, as are solvers
that would take minutes. "Products" are the matrix–vector products of all iterations alone, two each, by
NumPy: what a solver that reads the matrix twice cannot get below.
"""

import argparse
import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ot
import torch
from measuring import machine, medians, write
from threadpoolctl import threadpool_limits
from torch.nn.functional import normalize

from ask_lightning.functional import sinkhorn_plan
from ask_lightning.utilities.text_tables import markdown_table

# Log-domain solvers, and those that make matrices of each iteration, up to this batch size.
LARGEST_OF_SLOW = 1024


def solvers(scores: torch.Tensor, options: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    """Functions that return the plan `(B, B)`."""
    size, cost = len(scores), (1 - scores).T.contiguous()
    mass = torch.full((size,), 1 / size, device=scores.device)
    pot = functools.partial(
        ot.sinkhorn, reg=options.epsilon, numItermax=options.iterations, stopThr=0.0, warn=False
    )
    found = {
        "sinkhorn_plan": lambda: sinkhorn_plan(scores, options.epsilon, options.iterations),
        "POT (torch)": lambda: pot(mass, mass, cost).T,
    }
    if scores.is_cpu:
        arrays = mass.numpy(), mass.numpy(), cost.numpy()
        found["POT (numpy)"] = lambda: torch.from_numpy(pot(*arrays).T)
    if size > LARGEST_OF_SLOW:
        return found
    found["POT log (torch)"] = lambda: pot(mass, mass, cost, method="sinkhorn_log").T
    if scores.is_cpu:
        found["POT log (numpy)"] = lambda: torch.from_numpy(pot(*arrays, method="sinkhorn_log").T)
    project = getattr(getattr(ot, "batch", None), "bregman_projection_batch", None)
    if project is not None and scores.is_cpu:  # it makes its scalings on the CPU
        rows = mass[None]
        found["POT batch"] = lambda: project(
            (scores / options.epsilon).exp()[None], rows, rows, max_iter=options.iterations, tol=0.0
        )["T"][0]
    try:
        from geomloss import ot as geomloss

        found["geomloss"] = lambda: (
            geomloss.solve(cost.T, reg=options.epsilon, max_iter=options.iterations).plan
        )
    except ImportError:
        pass
    return found


def products(scores: torch.Tensor, iterations: int) -> None:
    kernel = scores.numpy()
    rows, columns = np.ones((2, len(kernel)), dtype=kernel.dtype)
    for _ in range(iterations):
        kernel.dot(columns, rows)
        kernel.T.dot(rows, columns)
        columns.fill(1)  # so that nothing overflows


def measure(size: int, options: argparse.Namespace) -> list[dict]:
    """Rows of one batch size, the fastest of the others first."""
    text, audio = normalize(torch.randn(2, size, options.width, device=options.device), dim=2)
    scores = text @ audio.T
    found = solvers(scores, options)
    plans = {name: solve().double() for name, solve in found.items()}
    expected = plans["sinkhorn_plan"]
    tasks: dict[str, Callable[[], object]] = dict(found)
    if scores.is_cpu:
        tasks["products"] = functools.partial(products, scores, options.iterations)
    took = medians(options.rounds, options.device, **tasks)
    differences = {
        name: float((plan - expected).abs().max() / expected.max()) for name, plan in plans.items()
    }
    return [
        {
            "B": size,
            "solver": name,
            "ms": took[name],
            "ours / solver": took["sinkhorn_plan"] / took[name],
            "difference": differences.get(name),
        }
        for name in sorted(took, key=lambda name: took[name])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256, 1024, 4096], help="B")
    parser.add_argument("--width", type=int, default=64, help="d of the unit vectors that are compared")
    parser.add_argument("--epsilon", type=float, default=0.1, help="ε")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=15, help="rounds, of which the median counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and NumPy")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="file to keep the results in")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rows = []
    with threadpool_limits(options.threads, user_api="blas"):
        for size in options.batch:
            rows += measure(size, options)
    print(f"{machine(options.device)}, POT {ot.__version__}")
    print(f"\nTransport plan, {options.iterations} iterations, ε = {options.epsilon}, float32\n")
    columns = ["B", "solver", "ms", "ours / it", "largest difference, share of the largest entry"]
    table = [
        [
            row["B"],
            row["solver"],
            f"{row['ms']:.2f}",
            f"{row['ours / solver']:.2f}",
            "" if row["difference"] is None else f"{row['difference']:.0e}",
        ]
        for row in rows
    ]
    print(markdown_table(columns, table))
    write(options.json, options.device, rows)


if __name__ == "__main__":
    main()

"""What an ASK step costs, next to an NT-Xent step and to other ways of doing its parts.

    python benchmarks/step.py --threads 1 2

prints Markdown tables. All ratios are of times taken in one run, alternating, as minima over repetitions:
the machine's noise only ever adds.
"""

import argparse
import functools
import time
from collections.abc import Callable

import torch
from threadpoolctl import threadpool_limits
from torch.nn.functional import normalize

from ask_lightning import KnowledgeBase, ReliabilityOTLoss
from ask_lightning.functional import nt_xent, sinkhorn_plan
from ask_lightning.utilities.text_tables import markdown_table


def fastest(repetitions: int, **tasks: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each task: the minimum over rounds in which all of them run once."""
    best = dict.fromkeys(tasks, float("inf"))
    for task in tasks.values():
        task()
    for _ in range(repetitions):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - started))
    return best


def unit(*shape: int) -> torch.Tensor:
    return normalize(torch.randn(*shape), dim=-1)


def step_table(pairs: int, width: int, repetitions: int) -> None:
    """An ASK step against an NT-Xent step: loss, lookup and backward, encoders left out."""
    base = KnowledgeBase.from_embeddings(unit(pairs, width), unit(pairs, width), num_prototypes=512)
    print(f"\nStep without encoders, N = {pairs:,}, d = {width}, milliseconds\n")
    columns = ["B", "threads", "NT-Xent", "ASK", "ratio", "lookup", "transport", "rest of loss", "backward"]
    rows = []
    for batch in (32, 256):
        audio, text = unit(batch, width).requires_grad_(), unit(batch, width).requires_grad_()
        loss = ReliabilityOTLoss()
        loss.knowledge = base

        def plain(audio: torch.Tensor = audio, text: torch.Tensor = text) -> None:
            scores = normalize(text, dim=1) @ normalize(audio, dim=1).T
            (0.5 * (nt_xent(scores) + nt_xent(scores.T))).backward()

        scores = (text @ audio.T).detach()
        took = fastest(
            repetitions,
            plain=plain,
            lookup=lambda a=audio, t=text: base.lookup(a.detach(), t.detach(), 10),
            transport=lambda s=scores: [sinkhorn_plan(s) for _ in range(2)],
            forward=lambda a=audio, t=text, f=loss: f(a, t),
            step=lambda a=audio, t=text, f=loss: f(a, t).backward(),
        )
        rest = took["forward"] - took["lookup"] - took["transport"]
        backward = took["step"] - took["forward"]
        shares = (took["lookup"], took["transport"], rest, backward)
        rows.append(
            [
                batch,
                torch.get_num_threads(),
                f"{took['plain']:.2f}",
                f"{took['step']:.1f}",
                f"{took['step'] / took['plain']:.0f}",
                *(f"{part:.1f} ({part / took['step']:.0%})" for part in shares),
            ]
        )
    print(markdown_table(columns, rows))


def lookup_table(pairs: int, width: int, repetitions: int) -> None:
    """The fine lookup against its two bare score products and against Faiss."""
    audio, text = unit(pairs, width), unit(pairs, width)
    exact = KnowledgeBase.from_embeddings(audio, text, num_prototypes=1)
    flat = KnowledgeBase.from_embeddings(audio, text, num_prototypes=1, index="Flat")
    print(f"\nLookup of the fine base, N = {pairs:,}, d = {width}, K = 10, milliseconds\n")
    columns = ["B", "threads", "u Uᵀ and v Vᵀ", "exact (auto)", "ratio", "Faiss Flat", "ratio"]
    rows = []
    for batch in (32, 256):
        u, v = unit(batch, width), unit(batch, width)
        took = fastest(
            repetitions,
            products=lambda u=u, v=v: (u @ audio.T, v @ text.T),
            exact=lambda u=u, v=v: exact.lookup(u, v, 10, granularities=("fine",)),
            flat=lambda u=u, v=v: flat.lookup(u, v, 10, granularities=("fine",)),
        )
        rows.append(
            [
                batch,
                torch.get_num_threads(),
                f"{took['products']:.0f}",
                f"{took['exact']:.0f}",
                f"{took['exact'] / took['products']:.2f}",
                f"{took['flat']:.0f}",
                f"{took['flat'] / took['products']:.2f}",
            ]
        )
    print(markdown_table(columns, rows))


def transport_table(repetitions: int) -> None:
    """`sinkhorn_plan` against POT's `ot.sinkhorn` with the same number of iterations."""
    import ot

    print("\nTransport plan, 50 iterations, ε = 0.1, float32, milliseconds\n")
    columns = [
        "B",
        "threads",
        "POT (torch)",
        "POT (numpy)",
        "sinkhorn_plan",
        "ratio to torch",
        "ratio to numpy",
    ]
    rows = []
    for batch in (32, 256, 1024):
        scores = unit(batch, 64) @ unit(batch, 64).T
        mass = torch.full((batch,), 1 / batch)
        solve = functools.partial(ot.sinkhorn, reg=0.1, numItermax=50, stopThr=0.0, warn=False)
        took = fastest(
            3 * repetitions,
            torch=functools.partial(solve, mass, mass, -scores),
            numpy=functools.partial(solve, mass.numpy(), mass.numpy(), -scores.numpy()),
            ours=functools.partial(sinkhorn_plan, scores, 0.1, 50),
        )
        times = (took["torch"], took["numpy"], took["ours"])
        ratios = (took["ours"] / took["torch"], took["ours"] / took["numpy"])
        rows.append([batch, torch.get_num_threads(), *times, *ratios])
    print(markdown_table(columns, rows, float_format=".2f"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts to measure")
    parser.add_argument("--pairs", type=int, default=50_000, help="N, pairs in the knowledge base")
    parser.add_argument("--repetitions", type=int, default=9, help="rounds, of which the best counts")
    arguments = parser.parse_args()
    import faiss

    torch.manual_seed(0)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        with threadpool_limits(threads, user_api="blas"):  # NumPy's, which POT works with
            step_table(arguments.pairs, 512, arguments.repetitions)
            lookup_table(arguments.pairs, 1024, arguments.repetitions)
            transport_table(arguments.repetitions)


if __name__ == "__main__":
    main()

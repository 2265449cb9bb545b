"""What an ASK step costs beside an NT-Xent step, and its lookup beside other ways of doing it.

    python benchmarks/step.py --batch 32 256 --json docs/benchmarks/step.json
    python benchmarks/step.py --device cuda --batch 32 256 1024 4096 --pairs 50000 --width 1024 --compile
    python benchmarks/step.py --device cuda --pairs 50000 --width 1024 --encoder

prints Markdown tables of milliseconds. All are taken in turn in one process, as medians over rounds; on a GPU
by its own events, from an idle device. A step is forward and backward; the encoders are left out, unless
`--encoder` asks for the steps of the paper's model with random weights on clips of noise. `--compile` takes
the same losses also after `loss.compile(mode="reduce-overhead")`, which a GPU replays as recorded graphs.
"Products" are the matrix products of the loss alone, and its readings of the neighbours: what it cannot get
below.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import machine, medians, write
from threadpoolctl import threadpool_limits
from torch.nn.functional import normalize

from ask_lightning import KnowledgeBase, KnowledgeDistillationLoss, NTXentLoss, ReliabilityOTLoss
from ask_lightning.knowledge.pairs import Neighborhood, StoredPairs
from ask_lightning.losses.base import RetrievalLoss
from ask_lightning.utilities.text_tables import markdown_table

K = 10


def unit(*shape: int, device: str = "cpu") -> torch.Tensor:
    return normalize(torch.randn(*shape, device=device), dim=-1)


def make_base(pairs: int, prototypes: int, width: int, device: str) -> KnowledgeBase:
    """A base of random rows and prototypes: clustering a million pairs would take long."""
    fine, coarse = (
        StoredPairs(unit(rows, width, device=device), unit(rows, width, device=device), index)
        for rows, index in ((pairs, "auto"), (prototypes, "exact"))
    )
    return KnowledgeBase(fine, coarse, torch.arange(pairs, device=device))


def products_of(hoods: list[Neighborhood], audio: torch.Tensor, text: torch.Tensor) -> Callable[[], None]:
    """A function that computes the products of the loss of both granularities, forwards and backwards."""
    u, v = audio.detach(), text.detach()
    scores, shares = v @ u.T, torch.full((len(u), 1, K), 1 / K, device=u.device)

    def compute() -> None:
        for hood in hoods:
            v @ u.T
            for _ in range(4):  # the realignment of two directions, and its gradient
                scores @ scores
            scores @ u, scores.T @ v
            for own, crossed in (
                (hood.audio_by_audio, hood.audio_by_text),
                (hood.text_by_text, hood.text_by_audio),
            ):
                own.mean(dim=1)
                torch.bmm(crossed, torch.stack([u, v], dim=1).mT)
                torch.bmm(shares, crossed)

    return compute


def encoder_steps(
    batch: int, seconds: float, device: str, **objectives: Callable[..., torch.Tensor]
) -> dict[str, Callable[[], None]]:
    """Steps of the paper's model, with each objective `(audio, text)`."""
    from ask_lightning.models import ResNet38BERT  # needs packages that the core does not

    model = ResNet38BERT(None, None, tokenizer="hashed").to(device).train()
    data = {
        "waveform": 0.1 * torch.randn(batch, int(32_000 * seconds), device=device),
        "caption": [f"a dog barks {i} times while rain falls on a tin roof" for i in range(batch)],
        "clip_id": torch.arange(batch),
    }

    def step(objective: Callable[..., torch.Tensor]) -> None:
        model.zero_grad()
        objective(model.encode_audio(data), model.encode_text(data)).backward()

    return {name: lambda objective=objective: step(objective) for name, objective in objectives.items()}


def compiled_copy(loss: RetrievalLoss) -> RetrievalLoss:
    copy = type(loss)(**loss.options)
    copy.knowledge = loss.knowledge
    copy.compile(mode="reduce-overhead")
    return copy


def warmed_up(step: Callable[[], object]) -> Callable[[], object]:
    """A step of a compiled loss after it has been compiled, and on a GPU recorded."""
    for _ in range(3):
        step()
    return step


def step_rows(batch: int, base: KnowledgeBase, options: argparse.Namespace) -> dict:
    """Milliseconds of one batch size."""
    audio, text = (unit(batch, base.width, device=options.device).requires_grad_() for _ in range(2))
    ids = torch.arange(batch, device=options.device)
    plain, ask, teacher = NTXentLoss(), ReliabilityOTLoss(K), KnowledgeDistillationLoss()
    ask.knowledge = teacher.knowledge = base
    ask.check_knowledge(base), teacher.check_knowledge(base)
    looked_up = base.lookup(audio.detach(), text.detach(), K)
    gradients = functools.partial(torch.autograd.grad, inputs=(audio, text))
    tasks = {
        "NT-Xent": lambda: gradients(plain(audio, text)),
        "ASK": lambda: gradients(ask(audio, text)),
        "lookup": lambda: base.lookup(audio.detach(), text.detach(), K),
        "loss": lambda: gradients(ask.from_neighborhoods(audio, text, looked_up)[0]),
        "products": products_of(list(looked_up.values()), audio, text),
        "teacher": lambda: gradients(teacher(audio, text, ids=ids)),
    }
    losses: dict[str, RetrievalLoss] = {"NT-Xent": plain, "ASK": ask, "teacher": teacher}
    if options.compile:
        torch.compiler.reset()  # what was compiled for another size would be compiled for any size now
        losses |= {f"{name}, compiled": compiled_copy(loss) for name, loss in losses.items()}
        for name in list(losses)[3:]:
            tasks[name] = warmed_up(lambda loss=losses[name]: gradients(loss(audio, text, ids=ids)))
    took = medians(options.rounds, options.device, **tasks)
    row = {"B": batch, "N": len(base.fine), "d": base.width, **took}
    if options.encoder:
        objectives = {"NT-Xent": plain, "ASK": ask}
        if options.compile:
            objectives["ASK, compiled"] = losses["ASK, compiled"]
        steps = encoder_steps(batch, options.seconds, options.device, **objectives)
        steps = {name: warmed_up(step) for name, step in steps.items()}
        took = medians(options.encoder_rounds, options.device, **steps)
        row |= {f"encoder step with {name}": time for name, time in took.items()}
    return row


def print_encoder_steps(rows: list[dict], seconds: float) -> None:
    """The steps of `--encoder`."""
    columns = [name for name in rows[0] if name.startswith("encoder step")]
    table = [[row["B"], *(f"{row[name]:.1f}" for name in columns)] for row in rows]
    print(f"\nA step of ResNet-38 + BERT on clips of {seconds:g} s, milliseconds\n")
    print(markdown_table(["B", *columns], table))


def print_compiled(rows: list[dict], threads: str) -> None:
    """The steps of `--compile`, against plain NT-Xent and against the compiled one."""
    columns = ["B", "N", "d", "NT-Xent", "NT-Xent, compiled", "ASK, compiled", "added by ASK"]
    columns += ["… to compiled NT-Xent", "teacher, compiled"]
    table = []
    for row in rows:
        ask, plain, compiled = (row[name] for name in ("ASK, compiled", "NT-Xent", "NT-Xent, compiled"))
        cells = [row["B"], f"{row['N']:,}", row["d"]]
        times = (plain, compiled, ask, ask - plain, ask - compiled, row["teacher, compiled"])
        table.append(cells + [f"{time:.2f}" for time in times])
    print(f"\nA step by loss.compile(mode='reduce-overhead'), K = {K}, {threads}, milliseconds\n")
    print(markdown_table(columns, table))


def print_steps(rows: list[dict], threads: str) -> None:
    columns = ["B", "N", "d", "NT-Xent", "ASK", "added by ASK", "lookup", "loss without lookup"]
    columns += ["… / NT-Xent", "products", "teacher / NT-Xent"]
    table = []
    for row in rows:
        added = row["ASK"] - row["NT-Xent"]
        cells = [row["B"], f"{row['N']:,}", row["d"], f"{row['NT-Xent']:.2f}", f"{row['ASK']:.2f}"]
        cells += [f"{added:.2f}", f"{row['lookup']:.2f}", f"{row['loss']:.2f}"]
        cells += [f"{row['loss'] / row['NT-Xent']:.1f}", f"{row['products']:.2f}"]
        cells += [f"{row['teacher'] / row['NT-Xent']:.1f}"]
        table.append(cells)
    print(f"\nA step, K = {K}, 512 prototypes, {threads}, milliseconds\n")
    print(markdown_table(columns, table))


def lookup_table(pairs: int, width: int, rounds: int) -> None:
    """The fine lookup against its two bare score products and against Faiss."""
    audio, text = unit(pairs, width), unit(pairs, width)
    exact = KnowledgeBase.from_embeddings(audio, text, num_prototypes=1)
    flat = KnowledgeBase.from_embeddings(audio, text, num_prototypes=1, index="Flat")
    print(f"\nLookup of the fine base, N = {pairs:,}, d = {width}, K = 10, milliseconds\n")
    columns = ["B", "threads", "u Uᵀ and v Vᵀ", "exact (auto)", "ratio", "Faiss Flat", "ratio"]
    rows = []
    for batch in (32, 256):
        u, v = unit(batch, width), unit(batch, width)
        took = medians(
            rounds,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256], help="B")
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=[50_000], help="N, pairs in the knowledge base"
    )
    parser.add_argument("--width", type=int, nargs="+", default=[512], help="d")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, NumPy and Faiss")
    parser.add_argument("--rounds", type=int, default=11, help="rounds, of which the median counts")
    parser.add_argument("--lookup", action="store_true", help="also the lookup against Faiss, on a CPU")
    parser.add_argument("--compile", action="store_true", help="also compiled losses")
    parser.add_argument("--encoder", action="store_true", help="also whole steps of the paper's model")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip of these steps")
    parser.add_argument("--encoder-rounds", type=int, default=3, help="rounds of these steps")
    parser.add_argument("--json", type=Path, help="file to keep the results in")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rows = []
    with threadpool_limits(options.threads):
        for width in options.width:
            for pairs in options.pairs:
                base = make_base(pairs, 512, width, options.device)
                rows += [step_rows(batch, base, options) for batch in options.batch]
        print(machine(options.device))
        where = f"{options.threads} threads" if options.device == "cpu" else options.device
        print_steps(rows, where)
        if options.compile:
            print_compiled(rows, where)
        if options.encoder:
            print_encoder_steps(rows, options.seconds)
        if options.lookup:
            import faiss

            faiss.omp_set_num_threads(options.threads)
            lookup_table(options.pairs[0], 1024, options.rounds)
    write(options.json, options.device, rows)


if __name__ == "__main__":
    main()

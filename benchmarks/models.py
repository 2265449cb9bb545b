"""A training step of the paper's model at its batch, and the share of it that ASK adds.

    python benchmarks/models.py --batch 32 --seconds 10

prints a Markdown table: seconds of a step with NT-Xent and with ASK (forward, backward, Adam), what ASK's
lookup and loss take by themselves, and the peak of the process's memory. Weights are random and the clips
noise; neither changes the time. On a GPU if there is one.
"""

import argparse
import resource
import time

import torch
from torch.nn.functional import normalize

from ask_lightning import KnowledgeBase, ReliabilityOTLoss
from ask_lightning.functional import nt_xent
from ask_lightning.models import ResNet38BERT
from ask_lightning.utilities.text_tables import markdown_table


def seconds_of(rounds: int, device: torch.device, *tasks) -> list[float]:
    """Of tasks that take turns, each the best of its rounds: noise only ever adds."""
    best = [float("inf")] * len(tasks)
    for _ in range(rounds):
        for number, task in enumerate(tasks):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            task()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best[number] = min(best[number], time.perf_counter() - started)
    return best


def peak_gigabytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="pairs in a batch")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip")
    parser.add_argument("--pairs", type=int, default=49_274, help="N, pairs in the knowledge base")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the best counts")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    model = ResNet38BERT(None, None, tokenizer="hashed").to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-5)
    batch = {
        "waveform": 0.1 * torch.randn(options.batch, int(32_000 * options.seconds), device=device),
        "caption": [
            f"a dog barks {i} times while rain falls on a tin roof and wind blows"
            for i in range(options.batch)
        ],
        "clip_id": torch.arange(options.batch),
    }
    sides = normalize(torch.randn(2, options.pairs, 1024, device=device), dim=2)
    loss = ReliabilityOTLoss()
    loss.knowledge = KnowledgeBase.from_embeddings(*sides, num_prototypes=512, prototype_pairing="audio")

    def plain(audio: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        scores = text @ audio.T
        return 0.5 * (nt_xent(scores) + nt_xent(scores.T))

    def step(objective) -> None:
        optimizer.zero_grad()
        objective(model.encode_audio(batch), model.encode_text(batch)).backward()
        optimizer.step()

    u, v = (side[: options.batch].clone().requires_grad_() for side in sides)
    alone, nt_xent_alone = seconds_of(
        10, device, lambda: loss(u, v).backward(), lambda: plain(u, v).backward()
    )
    with_ask, without = seconds_of(options.rounds, device, lambda: step(loss), lambda: step(plain))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {options.threads} threads"
    print(
        f"ResNet-38 + BERT, {where}, batch {options.batch} × {options.seconds:g} s, N = {options.pairs:,}\n"
    )
    columns = ["NT-Xent step (s)", "ASK step (s)", "lookup and loss (s)", "added by ASK", "peak memory (GiB)"]
    row = [
        f"{without:.2f}",
        f"{with_ask:.2f}",
        f"{alone:.3f} (NT-Xent {nt_xent_alone:.3f})",
        f"{(alone - nt_xent_alone) / with_ask:.1%}",
        f"{peak_gigabytes(device):.1f}",
    ]
    print(markdown_table(columns, [row]))


if __name__ == "__main__":
    main()

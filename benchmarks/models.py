"""A training step of the paper's model at its batch, and the share of it that ASK adds.

    python benchmarks/models.py --batch 32 --seconds 10

prints a Markdown table: seconds of a step with NT-Xent and with ASK (forward, backward, Adam), the mean of
the differences of the steps of a round with its 95 % interval, what the lookup and the loss take alone, and
the peak of the process's memory. Steps take turns, every other round the other way around. Weights are random
and the clips noise; neither changes the time. On a GPU if there is one.
"""

import argparse
import math
import resource
import statistics

import torch
from measuring import machine, seconds_of_rounds
from scipy.stats import t as student
from torch.nn.functional import normalize

from ask_lightning import KnowledgeBase, ReliabilityOTLoss
from ask_lightning.functional import nt_xent
from ask_lightning.models import ResNet38BERT
from ask_lightning.utilities.text_tables import markdown_table


def mean_with_interval(differences: list[float]) -> tuple[float, float]:
    """The mean of the differences, and the half width of its 95 % interval by Student's t."""
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), float(student.ppf(0.975, len(differences) - 1)) * spread


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
    parser.add_argument("--rounds", type=int, default=8, help="rounds, at least 2")
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
    alone = seconds_of_rounds(
        10, device, ask=lambda: loss(u, v).backward(), plain=lambda: plain(u, v).backward()
    )
    ask_alone, plain_alone = (statistics.median(alone[name]) for name in ("ask", "plain"))
    whole = seconds_of_rounds(options.rounds, device, ask=lambda: step(loss), plain=lambda: step(plain))
    ask_step, plain_step = (statistics.median(whole[name]) for name in ("ask", "plain"))
    added, half_width = mean_with_interval(
        [ask - plain for ask, plain in zip(whole["ask"], whole["plain"], strict=True)]
    )
    print(f"{machine(device)}\n")
    print(f"ResNet-38 + BERT, batch {options.batch} × {options.seconds:g} s, N = {options.pairs:,}\n")
    columns = ["NT-Xent step (s)", "ASK step (s)", "difference (s)", "lookup and loss (s)"]
    columns += ["… / NT-Xent step", "peak memory (GiB)"]
    row = [
        f"{plain_step:.2f}",
        f"{ask_step:.2f}",
        f"{added:.2f} ± {half_width:.2f}",
        f"{ask_alone:.3f} (NT-Xent {plain_alone:.3f})",
        f"{(ask_alone - plain_alone) / plain_step:.1%}",
        f"{peak_gigabytes(device):.1f}",
    ]
    print(markdown_table(columns, [row]))


if __name__ == "__main__":
    main()

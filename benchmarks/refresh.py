"""What a refresh of the knowledge costs next to the bare encoders over the same data, on one rank and on two.

    python benchmarks/refresh.py --ranks 1 2

prints a Markdown table. Each rank has one thread and a log-mel front end and encoders that run on a CPU.
Bare encoders and refresh take turns; the best of their rounds counts, since noise only ever adds.
"""

import argparse
import os
import socket
import time
import warnings

import lightning as L
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import Dataset

from ask_lightning import ASKModule, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.data import RetrievalData
from ask_lightning.models import TinyRetriever


class Clips(Dataset):
    """Noise of a few seconds with captions: what is measured does not depend on what is heard."""

    def __init__(self, size: int, seconds: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sound = 0.1 * torch.randn(64, int(16000 * seconds), generator=generator)
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> dict:
        caption = f"sound {row} of a kind {row % 7} in a place {row % 31} with another sound"
        return {"waveform": self.sound[row % len(self.sound)], "caption": caption, "clip_id": row}


class TimedRefresh(KnowledgeRefreshCallback):
    """Times each refresh and, before it, the bare encoders over the same batches."""

    def __init__(self, **settings) -> None:
        super().__init__(T=1, **settings)
        self.bare: list[float] = []
        self.whole: list[float] = []

    def refresh(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The bare encoders, then the refresh."""
        trainer.strategy.barrier()
        started = time.perf_counter()
        pl_module.eval()
        with torch.no_grad():
            for batch in self.loader(trainer):
                pl_module.model.forward_audio(batch), pl_module.model.forward_text(batch)
        pl_module.train()
        trainer.strategy.barrier()
        self.bare.append(time.perf_counter() - started)
        started = time.perf_counter()
        super().refresh(trainer, pl_module)
        trainer.strategy.barrier()
        self.whole.append(time.perf_counter() - started)


def work(rank: int, size: int, port: int, options: argparse.Namespace, results) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "benchmark",
    }
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    L.seed_everything(0, verbose=False)
    data = RetrievalData(Clips(options.pairs, options.seconds), Clips(8, options.seconds), batch_size=32)
    callback = TimedRefresh(num_prototypes=options.prototypes, save_knowledge=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=size,
        strategy="ddp",
        max_epochs=options.rounds,
        limit_train_batches=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    module = ASKModule(
        TinyRetriever(width=512), ReliabilityOTLoss(), audio="forward_audio", text="forward_text"
    )
    trainer.fit(module, datamodule=data)
    if rank == 0:
        results.put((min(callback.bare), min(callback.whole)))
    dist.barrier()


def measure(size: int, options: argparse.Namespace) -> tuple[float, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (size, port, options, results), nprocs=size)
    return results.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks to measure")
    parser.add_argument("--pairs", type=int, default=2048, help="N, pairs in the knowledge source")
    parser.add_argument("--prototypes", type=int, default=128, help="M, coarse prototypes")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a clip")
    parser.add_argument("--rounds", type=int, default=4, help="rounds, of which the best counts")
    options = parser.parse_args()
    clips = f"clips of {options.seconds:g} s, one thread a rank"
    print(f"N = {options.pairs:,}, M = {options.prototypes}, {clips}\n")
    print("| ranks | bare encoders (s) | refresh (s) | refresh / bare | pairs/s | times first row |")
    print("|---|---|---|---|---|---|")
    first = None
    for size in options.ranks:
        bare, whole = measure(size, options)
        first = first or whole
        print(
            f"| {size} | {bare:.2f} | {whole:.2f} | {whole / bare:.3f} | {options.pairs / whole:.0f} "
            f"| {first / whole:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

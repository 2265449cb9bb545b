"""What a refresh of the knowledge costs next to the bare encoders over the same data, on one rank and on two.

    python benchmarks/refresh.py --ranks 1 2

prints a Markdown table. Each rank has one thread and encodes its part of the pairs on a CPU, from waveforms,
with encoders of the size of CED-Tiny, the smallest that are published: the larger they are, the less the rest
counts. Bare encoders and refresh take turns; the best of their rounds counts, since noise only ever adds.
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
from ask_lightning.data import DatasetsDataModule
from ask_lightning.models import CEDSonar, Retriever
from ask_lightning.utilities.text_tables import markdown_table


class Clips(Dataset):
    """Pieces of one long sweep, each at a pitch of its own, and captions that differ."""

    def __init__(self, size: int, seconds: float) -> None:
        self.samples = int(16000 * seconds)
        self.step = 800
        time_axis = torch.arange(self.samples + self.step * size) / 16000
        self.sweep = 0.1 * torch.sin(torch.pi * 7000 * time_axis**2 / time_axis[-1])
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> dict:
        waveform = self.sweep[self.step * row :][: self.samples]
        caption = f"sound {row} of kind {row % 7} in place {row % 31} with sound {row % 97} behind it"
        return {"waveform": waveform, "caption": caption, "clip_id": row}


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
                pl_module.model.encode_audio(batch), pl_module.model.encode_text(batch)
        pl_module.train()
        trainer.strategy.barrier()
        self.bare.append(time.perf_counter() - started)
        started = time.perf_counter()
        super().refresh(trainer, pl_module)
        trainer.strategy.barrier()
        self.whole.append(time.perf_counter() - started)


def encoders() -> Retriever:
    text = {"d_model": 256, "encoder_layers": 4, "encoder_attention_heads": 4, "vocab_size": 4000}
    return CEDSonar(
        None,
        None,
        text_config=text,
        tokenizer="hashed",
        width=512,
        head_width=512,
        audio_width=192,
        audio_heads=3,
    )


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
        "OMP_NUM_THREADS": "1",  # otherwise Lightning gives a single rank all cores
    }
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    L.seed_everything(0, verbose=False)
    data = DatasetsDataModule(Clips(options.pairs, options.seconds), Clips(8, options.seconds), batch_size=32)
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
    module = ASKModule(encoders(), ReliabilityOTLoss())
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
    parser.add_argument("--pairs", type=int, default=512, help="N, pairs in the knowledge source")
    parser.add_argument("--prototypes", type=int, default=32, help="M, coarse prototypes")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the best counts")
    options = parser.parse_args()
    clips = f"clips of {options.seconds:g} s, one thread a rank"
    print(f"CED-Tiny, N = {options.pairs:,}, M = {options.prototypes}, {clips}\n")
    columns = ["ranks", "bare encoders (s)", "refresh (s)", "refresh / bare", "pairs/s", "times first row"]
    rows = []
    first = None
    for size in options.ranks:
        bare, whole = measure(size, options)
        first = first or whole
        rows.append(
            [
                size,
                f"{bare:.2f}",
                f"{whole:.2f}",
                f"{whole / bare:.3f}",
                f"{options.pairs / whole:.0f}",
                f"{first / whole:.2f}",
            ]
        )
    print(markdown_table(columns, rows))


if __name__ == "__main__":
    main()

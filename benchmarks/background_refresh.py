"""How long an epoch takes without a refresh, with one in the foreground, and with one in the background.

    python benchmarks/background_refresh.py --device cuda --model base --pairs 4096

prints each run as it ends, and then JSON: the median of the epochs of all repeats in seconds, each epoch, and
the share of a refresh's time that the background hides: 1 where an epoch with a refresh in the background
takes no longer than one without. Encoders of the size of CED-Tiny or CED-Base take waveforms and captions of
a few words. The training data are the source, and each epoch has its refresh. Kinds take turns; the first two
epochs and the last one of a run are left out. On a CPU both share the cores, so that little can be hidden.
"""

import argparse
import json
import statistics
import sys
import time
import warnings

import lightning as L
import torch
from refresh import Clips

from ask_lightning import ASKModule, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.data import DatasetsDataModule
from ask_lightning.models import CEDSonar, Retriever

KINDS = {
    "none": {"T": 1000},
    "foreground": {"T": 1},
    "background": {"T": 1, "in_background": True},
}
SIZES = {
    "tiny": ({"audio_width": 192, "audio_heads": 3}, {"d_model": 256, "encoder_layers": 4}),
    "base": ({"audio_width": 768, "audio_heads": 12}, {"d_model": 768, "encoder_layers": 6}),
}


class Clock(L.Callback):
    """The moments at which epochs begin, before anything of them is done."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note when the epoch begins."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())


def encoders(size: str) -> Retriever:
    audio, text = SIZES[size]
    text_config = {"encoder_attention_heads": 4, "vocab_size": 4000, **text}
    return CEDSonar(
        None, None, text_config=text_config, tokenizer="hashed", width=512, head_width=512, **audio
    )


def epochs_of(kind: str, options: argparse.Namespace) -> tuple[list[float], dict[str, float]]:
    """The duration of each epoch of a run that counts, in seconds, and what the last refresh has logged."""
    L.seed_everything(0, verbose=False)
    clips, few = Clips(options.pairs, options.seconds), Clips(8, options.seconds)
    data = DatasetsDataModule(clips, few, batch_size=options.batch_size, num_workers=options.workers)
    clock = Clock()
    refresh = KnowledgeRefreshCallback(
        num_prototypes=options.prototypes,
        save_knowledge=False,
        num_workers=options.workers or None,
        **KINDS[kind],
    )
    trainer = L.Trainer(
        accelerator=options.device,
        devices=1,
        precision=options.precision,
        max_epochs=options.epochs + 3,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, refresh],
    )
    trainer.fit(ASKModule(encoders(options.model), ReliabilityOTLoss()), datamodule=data)
    durations = [end - start for start, end in zip(clock.moments, clock.moments[1:], strict=False)]
    names = ("ask/refresh_seconds", "ask/refresh_wait_seconds", "ask/refresh_lag")
    told = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
    return durations[2:], told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train and encode")
    parser.add_argument("--model", choices=list(SIZES), default="tiny", help="size of the encoders")
    parser.add_argument("--pairs", type=int, default=128, help="N, training pairs, which are the knowledge")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a clip")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs in a batch")
    parser.add_argument("--prototypes", type=int, default=32, help="M, coarse prototypes")
    parser.add_argument("--workers", type=int, default=0, help="worker processes of each loader")
    parser.add_argument("--precision", default="32-true", help="32-true, bf16-mixed or 16-mixed")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of a run that count")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.device = "gpu" if options.device == "cuda" else "cpu"
    durations: dict[str, list[float]] = {kind: [] for kind in KINDS}
    told: dict[str, dict[str, float]] = {}
    for _ in range(options.repeats):
        for kind in KINDS:
            seconds, told[kind] = epochs_of(kind, options)
            durations[kind] += seconds
            print(f"{kind}: {seconds} s an epoch, {told[kind]}", file=sys.stderr, flush=True)
    median = {kind: statistics.median(seconds) for kind, seconds in durations.items()}
    hidden = (median["foreground"] - median["background"]) / (median["foreground"] - median["none"])
    device = (
        torch.cuda.get_device_name() if options.device == "gpu" else f"CPU, {torch.get_num_threads()} threads"
    )
    result = {
        "device": device,
        "torch": torch.__version__,
        "options": vars(options),
        "median_epoch_seconds": median,
        "hidden_share": hidden,
        "last_refresh": told,
        "epoch_seconds": durations,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

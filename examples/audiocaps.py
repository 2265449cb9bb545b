"""Train ResNet-38 + BERT with ASK on AudioCaps, test it, and print the recalls.

    python examples/audiocaps.py --root /data/AudioCaps --weights /weights/ResNet38_mAP=0.434.pth
    python examples/audiocaps.py --demo                  # synthetic data, a small model, seconds on a CPU

`--baseline` leaves ASK out. `ask-lightning fit --config audiocaps_resnet38_bert_ask` does the same.
"""

import argparse
import tempfile
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from ask_lightning import ASKModule, DriftMonitor, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.callbacks import QueryTable, RecallTable
from ask_lightning.data import AudioCapsData, write_audiocaps
from ask_lightning.models import ResNet38BERT

# What the demo shrinks; the classes are the same.
SMALL_MODEL: dict[str, Any] = {
    "text_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "tokenizer": "hashed",
    "width": 16,
    "head_width": 16,
    "channels": (4, 4, 8, 8),
    "blocks": (1, 1, 1, 1),
    "audio_width": 16,
    "learning_rate": 1e-3,
}
SHORT_CLIPS: dict[str, Any] = {"seconds": 0.7, "batch_size": 8, "check_counts": False}
# As in ML-ACT's public code: what its tokenizer and its audio encoder are given, and which epoch is kept.
CAPTIONS: dict[str, Any] = {"caption_style": "plain"}
PADDING: dict[str, Any] = {"padding": "heard"}
MONITOR = "val/t2a/mean_recall"


def main() -> None:
    """Train and test."""
    options = parse_arguments()
    L.seed_everything(options.seed, verbose=False)
    if options.demo:
        root = write_audiocaps(tempfile.mkdtemp(), seconds=0.7)
        data = AudioCapsData(root, **SHORT_CLIPS, **CAPTIONS)
        model = ResNet38BERT(None, None, **SMALL_MODEL, **PADDING)
    else:
        data = AudioCapsData(options.root, batch_size=32, num_workers=options.workers, **CAPTIONS)
        model = ResNet38BERT(options.weights, options.bert, **PADDING)

    module: L.LightningModule = model
    callbacks: list[L.Callback] = [RecallTable(MONITOR)]
    if not options.baseline:
        module = ASKModule(
            model,
            ReliabilityOTLoss(temperature=model.temperature),
            ids="clip_id",
            caption_ids="caption_id",
        )
        refresh = KnowledgeRefreshCallback(T=1 if options.demo else 15, source=data.knowledge_dataset)
        callbacks += [refresh, DriftMonitor(), QueryTable()]

    best = ModelCheckpoint(monitor=MONITOR, mode="max")
    trainer = L.Trainer(
        accelerator="cpu" if options.demo else "auto",
        devices=1,
        max_epochs=2 if options.demo else 50,
        gradient_clip_val=2.0,
        callbacks=[*callbacks, best],
        default_root_dir=options.output,
        log_every_n_steps=1 if options.demo else 50,
    )
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, ckpt_path=best.best_model_path, verbose=False)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--root", default="data/AudioCaps", help="folder of AudioCaps, see docs/data.md")
    add("--weights", default="weights/ResNet38_mAP=0.434.pth", help="checkpoint of PANNs")
    add("--bert", default="bert-base-uncased", help="folder or hub name of BERT")
    add("--baseline", action="store_true", help="plain NT-Xent, without ASK")
    add("--demo", action="store_true", help="synthetic data and a small model")
    add("--workers", type=int, default=4, help="processes that load audio")
    add("--seed", type=int, default=0, help="seed of weights and dropout")
    add("--output", default="runs/audiocaps", help="where logs and checkpoints go")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Fine-tune a CLAP checkpoint with ASK on recordings of your own; recalls before and after.

    python examples/wrap_clap.py --root recordings --annotations clips.csv
    python examples/wrap_clap.py --demo          # synthetic data, a small random CLAP, seconds on a CPU

The CSV has the columns `filename` and `caption`.
"""

import argparse
import sys
from typing import Any

import lightning as L

from ask_lightning import ASKModule, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.callbacks import RecallTable
from ask_lightning.data import FolderData, RetrievalDataModule, SoundscapeData
from ask_lightning.models import CLAPRetriever

RATE = 16000  # of the waveforms; the model resamples them
# A CLAP whose weights are random and few; the classes are the same.
SMALL: dict[str, Any] = {
    "projection_dim": 16,
    "text_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "audio_config": {
        "num_mel_bins": 16,
        "spec_size": 64,
        "window_size": 4,
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
    },
}


def main() -> None:
    """Test, fine-tune, test again."""
    options = parse_arguments()
    L.seed_everything(0, verbose=False)
    if options.demo:
        data: RetrievalDataModule = SoundscapeData(64, 16, 16, seconds=1, batch_size=16)
        model = CLAPRetriever(
            None, config=SMALL, tokenizer="hashed", max_seconds=1, sample_rate=RATE, learning_rate=1e-3
        )
    else:
        if options.root is None or options.annotations is None:
            sys.exit("Pass --root (the folder of audio files) and --annotations (the CSV), or --demo.")
        data = FolderData(options.root, options.annotations, sample_rate=RATE, batch_size=options.batch_size)
        model = CLAPRetriever(options.weights, sample_rate=RATE)

    # ASK's temperature is the model's own, so that what differs from plain fine-tuning is ASK alone.
    loss = ReliabilityOTLoss(temperature=model.temperature)
    module = ASKModule(model, loss, ids="clip_id", caption_ids="caption_id")
    refresh = KnowledgeRefreshCallback(T=1 if options.demo else 5, source=data.knowledge_dataset)
    trainer = L.Trainer(
        accelerator="cpu" if options.demo else "auto",
        devices=1,
        max_epochs=2 if options.demo else options.epochs,
        callbacks=[refresh, RecallTable()],
        default_root_dir=options.output,
        log_every_n_steps=1 if options.demo else 50,
    )
    print("As it was pretrained:")
    trainer.test(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    print("Fine-tuned with ASK:")
    trainer.test(module, datamodule=data, verbose=False)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--root", help="folder of audio files")
    add("--annotations", help="CSV with a row for each audio–caption pair")
    add("--weights", default="laion/clap-htsat-unfused", help="folder or hub name of a CLAP checkpoint")
    add("--epochs", type=int, default=10, help="epochs of fine-tuning")
    add("--batch-size", type=int, default=32, help="pairs in a batch")
    add("--demo", action="store_true", help="synthetic data and a small random CLAP")
    add("--output", default="runs/clap", help="where logs and checkpoints go")
    return parser.parse_args()


if __name__ == "__main__":
    main()

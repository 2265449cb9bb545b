"""Train CED + SONAR on Clotho with WavCaps as knowledge, and test it on Clotho and, zero-shot, on AudioCaps.

    python examples/clotho.py --datasets /data           # with Clotho, WavCaps and AudioCaps in it
    python examples/clotho.py --demo                     # synthetic data, a small model, seconds on a CPU

`ask-lightning transfer --config clotho_ced_sonar_ask_wavcaps --target audiocaps` does the same.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lightning as L

from ask_lightning import ASKModule, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.callbacks import RecallTable
from ask_lightning.data import (
    AudioCapsData,
    ClothoData,
    KnowledgeSource,
    write_audiocaps,
    write_clotho,
    write_wavcaps,
)
from ask_lightning.models import CEDSonar

RATE = 16000  # of CED
# As in ML-CLAP's public code: what its tokenizer and its audio encoder are given, and SONAR's dropout.
CAPTIONS: dict[str, Any] = {"caption_style": "plain"}
LIKE_ML_CLAP: dict[str, Any] = {"padding": "heard", "activation_dropout": 0.1}
# What the demo shrinks; the classes are the same.
SMALL_MODEL: dict[str, Any] = {
    "text_config": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16},
    "tokenizer": "hashed",
    "width": 16,
    "head_width": 16,
    "audio_width": 16,
    "audio_depth": 2,
    "audio_heads": 2,
    "learning_rate": 1e-3,
}


def main() -> None:
    """Train on one dataset, test on both."""
    options = parse_arguments()
    L.seed_everything(options.seed, verbose=False)
    folder = write_demo() if options.demo else options.datasets
    short: dict[str, Any] = {"batch_size": 8, "check_counts": False} if options.demo else {}
    knowledge = KnowledgeSource(wavcaps=folder / "WavCaps")
    clotho = ClothoData(folder / "Clotho", knowledge=knowledge, sample_rate=RATE, **CAPTIONS, **short)
    audiocaps = AudioCapsData(folder / "AudioCaps", sample_rate=RATE, **CAPTIONS, **short)
    if options.demo:
        model = CEDSonar(None, None, **LIKE_ML_CLAP, **SMALL_MODEL)
    else:
        model = CEDSonar("mispeech/ced-base", "cointegrated/SONAR_200_text_encoder", **LIKE_ML_CLAP)

    module = ASKModule(
        model,
        ReliabilityOTLoss(temperature=model.temperature),
        ids="clip_id",
        caption_ids="caption_id",
    )
    # WavCaps holds most of Clotho; `knowledge_dataset` leaves the evaluation clips out and says how many.
    refresh = KnowledgeRefreshCallback(T=1 if options.demo else 5, source=clotho.knowledge_dataset)
    trainer = L.Trainer(
        accelerator="cpu" if options.demo else "auto",
        devices=1,
        max_epochs=2 if options.demo else 10,
        callbacks=[refresh, RecallTable()],
        default_root_dir=options.output,
        log_every_n_steps=1 if options.demo else 50,
    )
    trainer.fit(module, datamodule=clotho)
    for data in (clotho, audiocaps):
        print(f"\nTrained on Clotho, tested on {data.dataset_name}:")
        trainer.test(module, datamodule=data, verbose=False)


def write_demo() -> Path:
    """Synthetic copies of the three datasets."""
    folder = Path(tempfile.mkdtemp())
    write_clotho(folder / "Clotho", num_train=6, seconds=0.7)
    write_wavcaps(folder / "WavCaps", seconds=0.7)
    write_audiocaps(folder / "AudioCaps", seconds=0.7)
    return folder


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--datasets", type=Path, default=Path("data"), help="folder of the datasets, see docs/data.md")
    add("--demo", action="store_true", help="synthetic data and a small model")
    add("--seed", type=int, default=0, help="seed of weights and dropout")
    add("--output", default="runs/clotho", help="where logs and checkpoints go")
    return parser.parse_args()


if __name__ == "__main__":
    main()

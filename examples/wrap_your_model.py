"""A retrieval model of your own, before and after: what ASK changes in a script, and what comes out.

    python examples/wrap_your_model.py

`Towers` below knows nothing of ASK and stays as it is. `before` and `after` are the two scripts; the program
prints their difference, runs both on synthetic soundscapes from the same weights and batches, and loads the
result in `Towers`. On a task as small as this ASK is not the better one; see docs/results.md.
"""

import argparse
import difflib
import inspect
import logging

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ask_lightning import ASKModule, KnowledgeRefreshCallback
from ask_lightning.data import SoundscapeData
from ask_lightning.metrics import AudioTextRetrieval

WORDS, WIDTH = 4096, 64


class Towers(L.LightningModule):
    """A plain LightningModule: two small encoders, InfoNCE, Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.audio = nn.Sequential(nn.Conv1d(64, 128, 5, stride=2), nn.ReLU(), nn.Conv1d(128, WIDTH, 5))
        self.text = nn.EmbeddingBag(WORDS, WIDTH, mode="mean")
        self.metrics = AudioTextRetrieval()

    def encode_audio(self, batch: dict) -> Tensor:
        frames = self.audio(batch["log_mel"].transpose(1, 2))  # (B, width, frames)
        return F.normalize(frames.amax(dim=2), dim=1)

    def encode_text(self, batch: dict) -> Tensor:
        tokens = [[sum(map(ord, word)) % WORDS for word in caption.split()] for caption in batch["caption"]]
        lengths = torch.tensor([len(caption) for caption in tokens])
        words = torch.tensor([word for caption in tokens for word in caption], device=self.device)
        return F.normalize(self.text(words, (lengths.cumsum(0) - lengths).to(self.device)), dim=1)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        logits = self.encode_audio(batch) @ self.encode_text(batch).T / 0.07
        labels = torch.arange(len(logits), device=self.device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.metrics.update(self.encode_audio(batch), self.encode_text(batch), batch["clip_id"])

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": score for name, score in self.metrics.compute().items()})
        self.metrics.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def before(data: L.LightningDataModule, settings: dict) -> L.Trainer:
    """The script as it was."""
    model = Towers()
    trainer = L.Trainer(**settings)
    trainer.fit(model, datamodule=data)
    return trainer


def after(data: L.LightningDataModule, settings: dict) -> L.Trainer:
    """The script with ASK."""
    model = ASKModule(Towers())
    trainer = L.Trainer(**settings, callbacks=[KnowledgeRefreshCallback(T=2, num_prototypes=64)])
    trainer.fit(model, datamodule=data)
    return trainer


def main() -> None:
    """Show the difference, run both, load what comes out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each run")
    parser.add_argument("--clips", type=int, default=384, help="soundscapes to train on")
    parser.add_argument("--output", default="runs/wrap", help="where logs and checkpoints go")
    options = parser.parse_args()
    print(difference(), flush=True)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = SoundscapeData(options.clips, 64, 64, features="log_mel", batch_size=32)
    settings = {
        "max_epochs": options.epochs,
        "accelerator": "cpu",
        "default_root_dir": options.output,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 5,
    }
    for script in (before, after):
        L.seed_everything(0, verbose=False)
        trainer = script(data, settings)
        both = [f"{way} {trainer.callback_metrics[f'val/{way}/recall_at_10']:.3f}" for way in ("a2t", "t2a")]
        print(f"{script.__name__:6}  validation R@10: {', '.join(both)}")

    # The checkpoint of the run with ASK is one of `Towers`: no trace of ASK is needed to use it.
    path = f"{options.output}/with_ask.ckpt"
    trainer.save_checkpoint(path)
    model = Towers.load_from_checkpoint(path)
    print(f"{path} loads in {type(model).__name__}.")


def difference() -> str:
    """The lines that ASK adds and replaces."""
    scripts = [inspect.getsource(script).splitlines()[2:] for script in (before, after)]
    lines = difflib.unified_diff(*scripts, "before", "after", lineterm="")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

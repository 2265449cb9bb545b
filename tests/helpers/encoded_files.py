"""Encoded files of random rows, and the model that is said to have encoded them."""

from pathlib import Path

import lightning as L
import torch
from torch.nn.functional import normalize

from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.metrics import Calibration, HubCalibration
from ask_lightning.models import TinyRetriever
from ask_lightning.utilities.weights import weights_fingerprint

WIDTH = 16


def random_pairs(
    clips: int = 300, captions: int = 2, *, calibrated: bool = False, gate: bool = False, seed: int = 0
) -> EncodedPairs:
    """Clips in a few groups, each with some captions near to it; every tenth clip is a bell."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(12, WIDTH, generator=generator)
    audio = centers[torch.arange(clips) % 12] + 0.5 * torch.randn(clips, WIDTH, generator=generator)
    # Captions do not stand clip by clip.
    clip_of = torch.arange(clips).repeat(captions)
    text = audio[clip_of] + 0.3 * torch.randn(len(clip_of), WIDTH, generator=generator)
    calibration = None
    if calibrated:
        calibration = HubCalibration(
            Calibration("nearest_neighbors", gate_top_k=1 if gate else None),
            0.3 * torch.rand(clips, generator=generator),
            0.3 * torch.rand(len(clip_of), generator=generator),
            torch.rand(clips, generator=generator) < 0.5 if gate else None,
            torch.rand(len(clip_of), generator=generator) < 0.5 if gate else None,
        )
    sounds = ["Bell" if clip % 10 == 0 else "wind" for clip in range(clips)]
    return EncodedPairs(
        audio=normalize(audio, dim=1),
        text=normalize(text, dim=1),
        clip_ids=torch.arange(clips),
        clip_of=clip_of,
        names=[f"file:{clip}.wav" for clip in range(clips)],
        captions=[f"{sounds[clip]} {clip}, {row}" for row, clip in enumerate(clip_of.tolist())],
        files=[f"folder/{clip}.wav" for clip in range(clips)],
        model={"class_path": "ask_lightning.models.TinyRetriever", "checkpoint": None, "fingerprint": ""},
        sample_rate=16000,
        calibration=calibration,
    )


def save_with_model(pairs: EncodedPairs, path: Path) -> None:
    """Write pairs to a file, and beside it the checkpoint of a model of their width."""
    torch.manual_seed(0)
    model = TinyRetriever(width=WIDTH)
    checkpoint = path.with_suffix(".ckpt").absolute()
    save_checkpoint(model, checkpoint)
    pairs.model |= {"checkpoint": str(checkpoint), "fingerprint": weights_fingerprint(model)}
    pairs.save(path)


def save_checkpoint(model: L.LightningModule, path: Path) -> None:
    """Write a checkpoint of a model that no trainer has trained."""
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)

"""A few sounds and a collection of them, whose searches compare words."""

from pathlib import Path

import numpy as np
import soundfile
import torch

from ask_lightning.data.audio.decoding import open_audio
from ask_lightning.page import Collection, Match, QueryError, Refinement

HOSTILE = "<img src=x onerror=\"document.title='taken'\"> & ${1+1} {{x}}"
CAPTIONS = [["a low tone", "humming"], ["a high tone"], ["noise"], [HOSTILE]]
RATE = 16000
CALIBRATION = Refinement("Calibrated scores", "softmax", "calibrated score")
TOKENS = Refinement("Compare frames and words", "The 2 best clips", "score of Late", finds_all=False)


def write_sounds(folder: Path) -> list[Path]:
    """A low tone, a high tone and noise of a second each."""
    time = np.arange(RATE) / RATE
    sounds = {
        "low.wav": np.sin(2 * np.pi * 200 * time),
        "high.flac": np.sin(2 * np.pi * 4000 * time),
        "noise.wav": np.random.default_rng(0).uniform(-1, 1, RATE),
    }
    for name, samples in sounds.items():
        soundfile.write(folder / name, 0.5 * samples, RATE)
    return [folder / name for name in sounds]


def make_collection(files: list[Path | None], refinement: Refinement | None = None) -> Collection:
    """Clips that are found by shared words; a sound finds the clips in reverse."""

    def by_text(text: str, refined: bool, words: str) -> list[Match]:
        if text == "?!":
            raise QueryError("No words.")
        wanted = set(text.split())
        scores = [len(wanted & set(" ".join(texts).split())) / len(wanted) for texts in CAPTIONS]
        order = sorted(range(len(CAPTIONS)), key=lambda row: -scores[row])
        shift = 0.5 if refined else 0.0
        return [
            Match(row, scores[row] - shift, scores[row], CAPTIONS[row][0])
            for row in order
            if words in " ".join(CAPTIONS[row])
        ]

    def by_sound(path: Path, refined: bool, words: str) -> list[Match]:
        with open_audio(str(path), path):
            pass
        pairs = [(row, text) for row, texts in enumerate(CAPTIONS) for text in texts][::-1]
        return [Match(row, 1 - 0.1 * place, 0.5, text) for place, (row, text) in enumerate(pairs)]

    return Collection(
        title="four clips",
        names=["low", "high", "noise", "hostile"],
        captions=CAPTIONS,
        files=files,
        file_names=["" if file is None else file.name for file in files],
        embeddings=torch.eye(4),
        by_text=by_text,
        by_sound=by_sound,
        refinement=refinement,
        key="these",
    )

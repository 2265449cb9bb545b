"""Inputs and weights by formula, the same in every version of torch, for the public code and for ours.

Axes: `B` batch, `T` samples, `d` width.
"""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

RESNET38 = {"channels": (64, 128, 256, 512), "blocks": (1, 1, 1, 1), "width": 12}
"""Sizes of the ResNet-38 that is compared. The public code has its channels fixed."""

CED = {"width": 16, "depth": 2, "heads": 2}
"""Sizes of the CED that is compared."""

CED_SECONDS = (3.0, 10.11, 20.23, 25.0)
"""Lengths of clips for CED: one piece, just one piece, just two, and two and a half."""

SENTENCES = (
    "A man is speaking, then a dog barks.",
    "wind blows , and stops .",
    '"Hello!" - someone said: it\'s half-open; why?',
    "Rain  falls   on a TIN roof",
    "An engine (or a fan) hums | loudly*",
)
"""Captions to rewrite."""


def uniform(name: str, *shape: int) -> Tensor:
    """Numbers in [0, 1), float64, which depend on the name and on their place alone."""
    count = int(torch.tensor(shape).prod())
    bits = (torch.arange(count) + zlib.crc32(name.encode())) & 0xFFFFFFFF
    for factor, shift in ((2654435761, 15), (2246822519, 13), (3266489917, 16)):
        bits = (bits * factor) & 0xFFFFFFFF
        bits = bits ^ (bits >> shift)
    return (bits.double() / 2**32).reshape(shape)


def fill(module: nn.Module, published_name: Callable[[str], str] = str) -> None:
    """Give each weight of a module a value by formula, which depends on its published name."""
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        drawn = uniform(published_name(name), *value.shape)
        if name.endswith("running_var"):
            drawn = 0.5 + drawn
        elif value.ndim > 1:
            drawn = (2 * drawn - 1) * (6 / value[0].numel()) ** 0.5
        elif name.endswith("weight"):
            drawn = 0.8 + 0.4 * drawn
        else:
            drawn = 0.4 * drawn - 0.2
        value.copy_(drawn)


def waveforms(rate: int, *seconds: float) -> Tensor:
    """Clips of noise and tones `(B, T)`, each of which falls silent after its seconds."""
    length = round(max(seconds) * rate)
    time = torch.arange(length).double() / rate
    rows = []
    for row, end in enumerate(seconds):
        tone = torch.sin(2 * torch.pi * (220 * (row + 1)) * time * (1 + 0.1 * time))
        sound = 0.3 * tone + 0.2 * (2 * uniform(f"noise {row}", length) - 1)
        rows.append(sound * (time < end))
    return torch.stack(rows).float()


def embeddings(clips: int = 60, captions: int = 5, width: int = 16) -> tuple[Tensor, Tensor]:
    """Unit embeddings of pairs, `(clips * captions, width)` each; the audio of a clip is repeated."""
    audio = (2 * uniform("audio", clips, width) - 1).repeat_interleave(captions, dim=0)
    text = audio + 2.4 * uniform("text", clips * captions, width) - 1.2
    return nn.functional.normalize(audio).float(), nn.functional.normalize(text).float()


def tokens() -> tuple[Tensor, list[int]]:
    """States of tokens `(B, L, d)`, and the number of tokens of each row."""
    return (2 * uniform("tokens", 3, 7, 8) - 1).float(), [7, 3, 1]

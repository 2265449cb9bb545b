"""Pairs of which some clips are near to every caption."""

import torch
from torch.nn.functional import normalize


def hubby_pairs(num_clips=40, captions=3, *, seed=0, hub=0.0, noise=0.4):
    """Unit vectors of clips and captions, and the clips' ids.

    With `hub`, all captions lean towards the first axis, and every tenth part of the clips does.
    """
    generator = torch.Generator().manual_seed(seed)
    clip_ids = torch.arange(num_clips).repeat_interleave(captions)
    clips = torch.randn(num_clips, 16, generator=generator)
    text = clips[clip_ids] + noise * torch.randn(len(clip_ids), 16, generator=generator)
    text[:, 0] += hub
    clips[:: max(1, num_clips // 10), 0] += hub
    return normalize(clips)[clip_ids], normalize(text), clip_ids

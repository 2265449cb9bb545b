"""Pairs to rank, and the scores once more, slowly: float64 NumPy, one sorted list a query."""

import numpy as np
import torch


def noisy_pairs(num_rows=90, num_clips=23, width=16, noise=1.5, crop_noise=0.0, seed=0):
    """Clips with ragged numbers of captions, in a random order of rows.

    With `crop_noise`, the audio embeddings of one clip differ, as those of random crops do.
    """
    generator = torch.Generator().manual_seed(seed)
    clip_ids = torch.cat(
        [torch.arange(num_clips), torch.randint(num_clips, (num_rows - num_clips,), generator=generator)]
    )[torch.randperm(num_rows, generator=generator)]
    audio = torch.randn(num_clips, width, generator=generator)[clip_ids]
    text = audio + noise * torch.randn(num_rows, width, generator=generator)
    audio = audio + crop_noise * torch.randn(num_rows, width, generator=generator)
    return audio, text, 1000 - 7 * clip_ids


def unit(rows):
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(length == 0, 1, length)


def positions_of_own(scores, own):
    """Positions of the own candidates in the sorted list, others first where scores tie."""
    listed = sorted(range(len(scores)), key=lambda i: (-round(float(scores[i]), 10), own[i]))
    return [position for position, i in enumerate(listed, start=1) if own[i]]


def reference_scores(audio, text, clip_ids, top_k=(1, 5, 10), map_k=10):
    audio, text = unit(np.asarray(audio, np.float64)), unit(np.asarray(text, np.float64))
    clip_ids = list(clip_ids)
    clips = sorted(set(clip_ids))
    clip_audio = np.stack(
        [
            unit(np.mean([audio[i] for i in range(len(audio)) if clip_ids[i] == clip], axis=0))
            for clip in clips
        ]
    )

    found = {"a2t": [], "t2a": []}
    for clip, query in zip(clips, clip_audio, strict=True):
        found["a2t"].append(positions_of_own(text @ query, [other == clip for other in clip_ids]))
    for clip, query in zip(clip_ids, text, strict=True):
        found["t2a"].append(positions_of_own(clip_audio @ query, [other == clip for other in clips]))

    scores = {}
    for direction, queries in found.items():
        for k in top_k:
            scores[f"{direction}/recall_at_{k}"] = np.mean([own[0] <= k for own in queries])
        precisions = [
            sum(n / position for n, position in enumerate(own, start=1) if position <= map_k) / len(own)
            for own in queries
        ]
        scores[f"{direction}/map_at_{map_k}"] = np.mean(precisions)
        scores[f"{direction}/median_rank"] = np.median([own[0] for own in queries])
    return scores

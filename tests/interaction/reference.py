"""The interactions pair by pair and token by token, in NumPy and float64."""

import numpy as np


def late(words, frames, reduction="mean"):
    """Both directions for one pair without padding."""
    reduce = np.mean if reduction == "mean" else np.sum
    if not len(words) or not len(frames):
        return 0.0, 0.0
    to_audio = reduce([max(float(w @ f) for f in frames) for w in words])
    to_text = reduce([max(float(w @ f) for w in words) for f in frames])
    return to_audio, to_text


def attended(words, frames, attention_scale, pooling, pooling_scale):
    """SCAN with the attended vectors themselves."""
    if not len(words):
        return 0.0
    relevance = []
    clipped = np.array([[max(float(w @ f), 0) for f in frames] for w in words]).reshape(len(words), -1)
    for number, word in enumerate(words):
        if not len(frames):
            relevance.append(0.0)
            continue
        normal = [
            clipped[number, f] / np.sqrt((clipped[:, f] ** 2).sum()) if clipped[:, f].any() else 0.0
            for f in range(len(frames))
        ]
        weight = np.exp(attention_scale * np.array(normal))
        vector = sum(a * f for a, f in zip(weight / weight.sum(), frames, strict=True))
        relevance.append(float(word @ vector) / (np.linalg.norm(word) * np.linalg.norm(vector)))
    if pooling == "mean":
        return float(np.mean(relevance))
    return float(np.log(np.sum(np.exp(pooling_scale * np.array(relevance)))) / pooling_scale)


def framewise(caption, frames, scale, bias, pooling):
    if not len(frames):
        return bias
    return float(getattr(np, pooling)([scale * float(caption @ f) + bias for f in frames]))


def softmax(logits):
    weight = np.exp(logits - np.max(logits))
    return weight / weight.sum()


def at_prototypes(tokens, prototypes, temperature):
    rows = []
    for prototype in prototypes:
        if not len(tokens):
            rows.append(np.zeros(len(prototype)))
            continue
        weight = softmax(np.array([float(t @ prototype) for t in tokens]) / temperature)
        vector = sum(a * t for a, t in zip(weight, tokens, strict=True))
        rows.append(vector / np.linalg.norm(vector))
    return np.array(rows)


def prototype(words, frames, prototypes, inner, outer, temperature):
    table = at_prototypes(words, prototypes, temperature) @ at_prototypes(frames, prototypes, temperature).T

    def one_way(scores):
        rest = np.array([softmax(inner @ row) @ row for row in scores])
        return float(softmax(outer @ rest) @ rest)

    return (one_way(table) + one_way(table.T)) / 2


def balanced(scores, epsilon, iterations):
    """Sinkhorn–Knopp on the exponentials; the shifts of the logarithms."""
    kernel = np.exp(scores / epsilon)
    rows, columns = np.ones(len(scores)), np.ones(scores.shape[1])
    for _ in range(iterations):
        rows = 1 / (kernel @ columns)
        columns = len(scores) / scores.shape[1] / (kernel.T @ rows)
    return scores + epsilon * (np.log(rows)[:, None] + np.log(columns))

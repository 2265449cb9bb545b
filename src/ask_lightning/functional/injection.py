"""Knowledge injection, Eq. 9. Axes: `B` batch, `K` neighbours, `L` tokens, `d` width."""

import torch
from torch import Tensor

# Rows within this distance of length one count as unit vectors: a few float32 roundings of a norm.
_UNIT_TOLERANCE = 1e-6


def unit_length(embeddings: Tensor) -> Tensor:
    """L2-normalise the rows; unit rows pass through bit for bit and zero rows stay zero.

    A model that normalises its embeddings itself therefore trains with exactly the gradients that it had: its
    own normalisation removes the radial part, and a second one would only add rounding. A zero row has no
    direction; it stays zero and receives a finite gradient.

    Args:
        embeddings: `(..., d)`, any floating dtype.

    Returns:
        `(..., d)`, same dtype (under autocast float32), every row of length one or zero.

    Examples:
        >>> unit_length(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    length = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)  # (..., 1)
    dtype = length.dtype  # under autocast float32
    if dtype == torch.float16:  # in which the length of a row may overflow that is itself finite
        length = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True, dtype=torch.float32)
    rounded = length.to(dtype)
    is_unchanged = (rounded == 0) | ((rounded - 1).abs() <= _UNIT_TOLERANCE)
    unit: Tensor = embeddings / length.masked_fill(is_unchanged, 1.0)
    return unit.to(dtype)


def inject_knowledge(
    embeddings: Tensor, neighbors: Tensor, injection_ratio: float = 0.2, *, renormalize: bool = False
) -> Tensor:
    """Mix the mean of the retrieved neighbours into each embedding.

    Eq. 9 of the paper (version 2): `u' = (1 - ρ) u + ρ ū` with `ū = mean_k U[R_a]_k`.

    The tokens of a clip or caption all get the knowledge that its pooled embedding retrieved.

    Args:
        embeddings: `(B, d)`, the batch's embeddings of one modality, or `(B, L, d)`, those of its tokens.
        neighbors: `(B, K, d)`, the knowledge that each embedding retrieved in its own modality, or `(B, d)`,
            its mean over K.
        injection_ratio: ρ in [0, 1], the share of knowledge. At 0 the embeddings come back unchanged.
        renormalize: Whether to bring the result back to unit length. The paper does not.

    Returns:
        The injected embeddings, in the shape of `embeddings`.

    Examples:
        >>> inject_knowledge(torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]), 0.25)
        tensor([[0.7500, 0.2500]])
    """
    if injection_ratio == 0:
        return embeddings
    knowledge = neighbors.mean(dim=1) if neighbors.ndim == 3 else neighbors  # (B, d)
    if embeddings.ndim == 3:
        knowledge = knowledge[:, None]  # (B, 1, d)
    mixed = torch.add((1 - injection_ratio) * embeddings, knowledge, alpha=injection_ratio)  # as embeddings
    return unit_length(mixed) if renormalize else mixed

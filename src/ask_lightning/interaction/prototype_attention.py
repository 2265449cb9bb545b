"""Prototype attention: frames and words meet in learned prototypes.

Axes: `T` texts, `A` audios, `B` either of them, `L` tokens, `P` prototypes, `d` width.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ask_lightning.functional.injection import unit_length
from ask_lightning.functional.transport import balance_scores
from ask_lightning.interaction.base import MAX_ELEMENTS, Interaction, Similarities, as_similarities
from ask_lightning.interaction.blocks import blockwise
from ask_lightning.interaction.late import token_scores
from ask_lightning.interaction.masked import masked_softmax
from ask_lightning.interaction.token_embeddings import TokenEmbeddings
from ask_lightning.utilities.arguments import check_count, check_positive
from ask_lightning.utilities.dtypes import computation_dtype


def gather_at_prototypes(embeddings: TokenEmbeddings, prototypes: Tensor, temperature: float = 0.1) -> Tensor:
    """What the tokens of each row say about each prototype.

    With the tokens x_l of a row and the prototypes p_m: `h_m = unit( Σ_l softmax_l(x_l · p_m / τ_p) x_l )`.

    Args:
        embeddings: Tokens of B rows.
        prototypes: Prototypes `(P, d)`, unit vectors.
        temperature: τ_p > 0.

    Returns:
        `(B, P, d)`, unit vectors, or zeros for a row without tokens.

    Examples:
        >>> clip = TokenEmbeddings(torch.eye(2)[:1], torch.eye(2)[None])
        >>> gather_at_prototypes(clip, torch.eye(2), temperature=0.001)
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    tokens = embeddings.tokens.to(prototypes.dtype)
    attention = masked_softmax(
        (tokens @ prototypes.T).transpose(1, 2) / temperature, embeddings.valid[:, None]
    )  # (B, P, L)
    return unit_length(attention @ tokens.masked_fill(~embeddings.valid[..., None], 0))


def prototype_similarity(
    text: Tensor, audio: Tensor, inner: Tensor, outer: Tensor, *, max_elements: int = MAX_ELEMENTS
) -> Tensor:
    """An attention over the similarities of all prototypes of a text with all prototypes of an audio.

    With A_mn = h_m · g_n for a text's h and an audio's g:

        r_m = Σ_n softmax_n( Σ_k V_nk A_mk ) A_mn        s(A) = Σ_m softmax_m( Σ_k W_mk r_k ) r_m
        S = ½ [ s(A) + s(Aᵀ) ]

    Args:
        text: What T texts say about each prototype, `(T, P, d)`.
        audio: What A audios say about each prototype, `(A, P, d)`.
        inner: V, `(P, P)`.
        outer: W, `(P, P)`.
        max_elements: Number of prototype–prototype similarities that are held at a time.

    Returns:
        `(T, A)`, in [-1, 1] for unit vectors.

    Examples:
        >>> same = torch.eye(2)[None]
        >>> prototype_similarity(same, same, 100 * torch.eye(2), torch.eye(2))
        tensor([[1.]])
    """
    (scores,) = blockwise(
        partial(_score, inner=inner, outer=outer),
        (text,),
        (audio,),
        elements_per_pair=text.shape[1] * audio.shape[1],
        max_elements=max_elements,
    )
    return scores


def _score(text: Tensor, audio: Tensor, *, inner: Tensor, outer: Tensor) -> tuple[Tensor]:
    """The similarities of a block, `(T, A)`."""
    scores = token_scores(text, audio)  # (T, A, P, P)
    sides = (_attend(_attend(side, inner), outer) for side in (scores, scores.transpose(2, 3)))
    return (sum(sides, start=scores.new_zeros(())) / 2,)


def _attend(scores: Tensor, weight: Tensor) -> Tensor:
    """Scores `(..., P)` averaged by a softmax of a linear function of themselves, `(...)`."""
    return ((scores @ weight.T).softmax(dim=-1) * scores).sum(dim=-1)


class PrototypeAttention(Interaction):
    """Prototypes that frames and words share, and an attention over their similarities, as GPA has them.

    Published, in words: frames and words are gathered into prototypes; the prototypes of a text and of an
    audio give a matrix of similarities; a learned attention over that matrix gives the score; the
    Sinkhorn–Knopp algorithm modifies the scores.

    Ours, since the text leaves the formulas open: prototypes are learned vectors, one set for both sides, and
    a token counts for a prototype by a softmax over the tokens of its clip or caption
    (`gather_at_prototypes`). The attention is two linear layers, over rows and then over what remains, shared
    by both ways through the matrix (`prototype_similarity`), and starts as a softmax at the prototypes'
    temperature. Scores of a batch are balanced by Sinkhorn–Knopp (`balance_scores`) in training mode only: at
    retrieval, a score then depends on its own text and audio alone, and test queries do not see each other.

    Args:
        width: d, width of the embeddings.
        num_prototypes: P, number of prototypes.
        temperature: τ_p > 0, temperature of the softmax over tokens.
        sinkhorn_epsilon: ε > 0 of the balancing, in the unit of the scores, which lie in [-1, 1].
        sinkhorn_iterations: Number of updates of the balancing. 0: scores are not balanced.
        max_elements: Number of prototype–prototype similarities that are held at a time, at least 1. It
            changes speed and memory, not results.

    References:
        GPA (Xie et al., "GPA: Global and Prototype Alignment for Audio-Text Retrieval", Interspeech 2024).

    Examples:
        >>> clips = TokenEmbeddings(torch.randn(3, 8), torch.randn(3, 5, 8)).unit_length()
        >>> PrototypeAttention(8, num_prototypes=4)(clips, clips).to_audio.shape
        torch.Size([3, 3])
    """

    def __init__(
        self,
        width: int,
        num_prototypes: int = 16,
        *,
        temperature: float = 0.1,
        sinkhorn_epsilon: float = 0.1,
        sinkhorn_iterations: int = 5,
        max_elements: int = MAX_ELEMENTS,
    ) -> None:
        super().__init__()
        check_count("width", width)
        check_count("num_prototypes", num_prototypes)
        check_positive("temperature", temperature)
        check_positive("sinkhorn_epsilon", sinkhorn_epsilon)
        check_count("sinkhorn_iterations", sinkhorn_iterations, least=0)
        check_count("max_elements", max_elements)
        self.temperature = temperature
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_iterations = sinkhorn_iterations
        self.max_elements = max_elements
        self.prototypes = nn.Parameter(unit_length(torch.randn(num_prototypes, width)))
        self.inner, self.outer = (nn.Parameter(torch.eye(num_prototypes) / temperature) for _ in range(2))

    def extra_repr(self) -> str:
        """The sizes, and the options that change results."""
        names = ("temperature", "sinkhorn_epsilon", "sinkhorn_iterations")
        return ", ".join(
            [str(tuple(self.prototypes.shape)), *(f"{name}={getattr(self, name)}" for name in names)]
        )

    def similarities(self, text: TokenEmbeddings, audio: TokenEmbeddings) -> Similarities:
        """One matrix for both directions, in training balanced over the batch."""
        dtype = computation_dtype(text.tokens)
        prototypes = unit_length(self.prototypes.to(dtype))  # (P, d)
        of_text, of_audio = (
            gather_at_prototypes(side, prototypes, self.temperature) for side in (text, audio)
        )
        scores = prototype_similarity(
            of_text, of_audio, self.inner.to(dtype), self.outer.to(dtype), max_elements=self.max_elements
        )
        if self.training and self.sinkhorn_iterations:
            scores = balance_scores(scores, self.sinkhorn_epsilon, self.sinkhorn_iterations)
        return as_similarities(scores)

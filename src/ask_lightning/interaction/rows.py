"""Rows of `TokenEmbeddings`, which may have different numbers of tokens. Axes: `N` rows, `d` width."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ask_lightning.interaction.token_embeddings import TokenEmbeddings


def rows_of(embeddings: TokenEmbeddings, rows: Tensor) -> TokenEmbeddings:
    """Some rows of embeddings.

    Args:
        embeddings: Embeddings of N rows.
        rows: Numbers of the rows, `(n,)` integers.

    Examples:
        >>> clips = TokenEmbeddings(torch.eye(3), torch.eye(3)[:, None])
        >>> rows_of(clips, torch.tensor([2])).pooled
        tensor([[0., 0., 1.]])
    """
    return TokenEmbeddings(embeddings.pooled[rows], embeddings.tokens[rows], embeddings.valid[rows])


def without_padding(embeddings: TokenEmbeddings) -> tuple[Tensor, Tensor]:
    """The tokens of all rows one after another, and how many each row has.

    Args:
        embeddings: Embeddings of N rows.

    Returns:
        `(tokens of all rows, d)` and `(N,)` int64.

    Examples:
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> tokens, lengths = without_padding(TokenEmbeddings(torch.ones(2, 3), torch.ones(2, 2, 3), mask))
        >>> tokens.shape, lengths
        (torch.Size([3, 3]), tensor([1, 2]))
    """
    return embeddings.tokens[embeddings.valid], embeddings.valid.sum(dim=1)


def with_padding(pooled: Tensor, tokens: Tensor, lengths: Tensor) -> TokenEmbeddings:
    """What `without_padding` was made of, with tokens before padding.

    Args:
        pooled: Embeddings `(N, d)`.
        tokens: Tokens of all rows one after another.
        lengths: Number of tokens of each row, `(N,)`.

    Examples:
        >>> with_padding(torch.ones(2, 3), torch.ones(3, 3), torch.tensor([1, 2])).mask
        tensor([[ True, False],
                [ True,  True]])
    """
    longest = max(1, int(lengths.max()) if len(lengths) else 1)
    parts = tokens.split(lengths.tolist())
    padded = pad_sequence([*parts, tokens.new_zeros(longest, tokens.shape[1])], batch_first=True)[:-1]
    return TokenEmbeddings(pooled, padded, torch.arange(longest, device=lengths.device) < lengths[:, None])


def joined(parts: Sequence[TokenEmbeddings]) -> TokenEmbeddings:
    """The rows of several embeddings one after another, padded to the longest.

    Args:
        parts: At least one, of the same width.

    Examples:
        >>> short, long = (TokenEmbeddings(torch.ones(1, 2), torch.ones(1, length, 2)) for length in (1, 3))
        >>> joined([short, long]).mask
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    tokens, lengths = zip(*(without_padding(part) for part in parts), strict=True)
    return with_padding(torch.cat([part.pooled for part in parts]), torch.cat(tokens), torch.cat(lengths))

"""A large batch in bounded memory."""

import resource

import pytest
import torch

from ask_lightning.interaction import TokenEmbeddings
from tests.helpers.ranks import on_ranks
from tests.interaction.pairs import TOKEN_LEVEL


def peak_of_step(name: str, pairs: int) -> tuple[int, int]:
    """Bytes of the process before and at the peak of a forward and a backward pass."""
    generator = torch.Generator().manual_seed(0)
    text, audio = (
        TokenEmbeddings(
            torch.randn(pairs, 64, generator=generator).requires_grad_(),
            torch.randn(pairs, length, 64, generator=generator).requires_grad_(),
        )
        for length in (32, 64)
    )
    interaction = TOKEN_LEVEL[name]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = interaction(text, audio)
    (found.to_audio.logsumexp(dim=1).mean() + found.to_text.logsumexp(dim=1).mean()).backward()
    assert text.tokens.grad.isfinite().all()
    return before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pairs"), [("filip", 512), ("scan", 128)])
def test_512_pairs_of_64_frames_and_32_words_take_less_than_4_gb(name, pairs):
    """One matrix of all token similarities of 512 pairs would take 2 GiB, and a graph holds several.

    With fewer pairs there are fewer blocks of the same size.
    """
    ((before, peak),) = on_ranks(1, peak_of_step, name, pairs)
    assert peak - before < 1.5 * 2**30
    assert peak < 4e9

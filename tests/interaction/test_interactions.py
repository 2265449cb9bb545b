"""What all interactions have in common, and each of them against loops over pairs."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ask_lightning.functional import balance_scores
from ask_lightning.interaction import (
    DotProductInteraction,
    FrameWiseInteraction,
    LateInteraction,
    PrototypeAttention,
    Similarities,
    StackedCrossAttention,
    TokenEmbeddings,
    as_similarities,
)
from tests.interaction import reference
from tests.interaction.pairs import ALL, TOKEN_LEVEL, expected, leaves, make, make_side

TEXT, AUDIO = make_side(4, 3, seed=1), make_side(6, 7, seed=2)


@pytest.mark.parametrize("name", ALL)
def test_against_loops_over_pairs(name):
    interaction = make(name).eval()
    found = interaction(TEXT, AUDIO)
    for ours, theirs in zip(found[:2], expected(name, interaction, TEXT, AUDIO), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=1e-12)
    assert found.are_symmetric == torch.equal(found.to_audio, found.to_text.T)
    assert found.are_symmetric == (name not in ("filip", "colbert"))


@pytest.mark.parametrize("max_elements", [1, 30, 100, 400])
@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_blocks_change_neither_values_nor_gradients(name, max_elements):
    results = []
    weight = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for limit in (10**9, max_elements):
        interaction = make(name, max_elements=limit)
        (text, of_text), (audio, of_audio) = leaves(TEXT), leaves(AUDIO)
        found = interaction(text, audio)
        loss = (weight[0] * found.to_audio + weight[1] * found.to_text.T).sum()
        wanted = [*of_text, *of_audio, *interaction.parameters()]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        results.append([*found[:2], *(g for g in gradients if g is not None)])
    assert len(results[0]) == len(results[1]) > 3
    for whole, blocks in zip(*results, strict=True):
        assert whole.detach().any()
        torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_gradients_by_finite_differences(name):
    interaction = make(name).eval()
    text, audio = make_side(2, 2, seed=4, empty=False), make_side(2, 3, seed=5, empty=False)

    def scores(words, frames, captions):
        return interaction(
            TokenEmbeddings(captions, words, text.mask), TokenEmbeddings(audio.pooled, frames, audio.mask)
        )[:2]

    inputs = [side.clone().requires_grad_() for side in (text.tokens, audio.tokens, text.pooled)]
    assert torch.autograd.gradcheck(scores, inputs)


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_padding_has_no_influence(name):
    """Neither its values nor its amount, and rows without tokens have finite gradients."""
    interaction = make(name).eval()
    longer = torch.nn.functional.pad(AUDIO.tokens, (0, 0, 0, 5), value=7.0)
    other = TokenEmbeddings(
        AUDIO.pooled,
        longer.masked_fill(~torch.nn.functional.pad(AUDIO.valid, (0, 5))[..., None], 7.0),
        torch.nn.functional.pad(AUDIO.valid, (0, 5)),
    )
    for ours, theirs in zip(interaction(TEXT, AUDIO)[:2], interaction(TEXT, other)[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    (text, of_text), (audio, of_audio) = leaves(TEXT), leaves(other)
    found = interaction(text, audio)
    (found.to_audio.square().sum() + found.to_text.square().sum()).backward()
    for tokens, side in ((of_text[1], TEXT), (of_audio[1], other)):
        if tokens.grad is None:
            assert name.startswith("frame-wise")
            continue
        assert tokens.grad.isfinite().all()
        assert not tokens.grad[~side.valid].any(), "padding gets no gradient"
        assert tokens.grad[side.valid].any()


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_padding_may_be_no_number(name):
    interaction = make(name).eval()
    text, audio = (
        TokenEmbeddings(side.pooled, side.tokens.masked_fill(~side.valid[..., None], torch.nan), side.mask)
        for side in (TEXT, AUDIO)
    )
    for ours, theirs in zip(interaction(TEXT, AUDIO)[:2], interaction(text, audio)[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_rows_without_tokens(name):
    found = make(name).eval()(TEXT, AUDIO)
    for scores in found[:2]:
        assert scores.isfinite().all()
    if name in ("filip", "colbert", "scan mean", "prototypes"):
        assert not found.to_audio[-1].any()
        assert not found.to_audio[:, -1].any()
        assert not found.to_text[-1].any()


@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_computed_in_float32(name):
    interaction = make(name, torch.float32).eval()
    text, audio = make_side(4, 3, 1, dtype=torch.bfloat16), make_side(6, 7, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = interaction(text, audio)
    exact = interaction(text.to(torch.float64), audio.to(torch.float64))
    for ours, theirs in zip(found[:2], exact[:2], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_very_long_clip_beside_a_short_one(name):
    long = make_side(2, 3000, seed=6, dtype=torch.float32)
    short = TokenEmbeddings(long.pooled[:1], long.tokens[:1, :4], long.valid[:1, :4])
    cut = TokenEmbeddings(long.pooled[:1], long.tokens[:1], long.valid[:1] & (torch.arange(3000) < 4))
    interaction = make(name, torch.float32, max_elements=5000).eval()
    text = TEXT.to(torch.float32)
    torch.testing.assert_close(interaction(text, cut).to_audio, interaction(text, short).to_audio)
    assert interaction(text, long).to_audio.isfinite().all()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_no_tensor_exceeds_the_limit(name):
    """Forward and backward; without blocks the largest would have 24 × 30 × 7 × 11 elements."""
    interaction = make(name, max_elements=4000)
    (text, _), (audio, _) = leaves(make_side(24, 7, 1)), leaves(make_side(30, 11, 2))
    with Largest() as largest:
        found = interaction(text, audio)
        (found.to_audio.sum() + found.to_text.square().sum()).backward()
    assert largest.elements <= 4000


@pytest.mark.parametrize("name", ["filip", "scan", "prototypes"])
def test_blocks_go_in_a_graph_with_learned_embeddings_once(name):
    """A second backward pass through the same graph gives the same gradients."""
    interaction = make(name, max_elements=50)
    (text, of_text), (audio, _) = leaves(TEXT), leaves(AUDIO)
    loss = interaction(text, audio).to_audio.square().sum()
    first, second = (torch.autograd.grad(loss, of_text[1], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_one_sided_injection_never_changes_the_best_frame():
    """(1-ρ) w·y + ρ w·k has the order of w·y; with renormalised frames it has not."""
    neighbors = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    injected = AUDIO.inject(neighbors, 0.6)
    before = torch.einsum("twd,afd->tawf", TEXT.tokens, AUDIO.tokens)
    after = torch.einsum("twd,afd->tawf", TEXT.tokens, injected.tokens)
    assert torch.equal(before.argmax(dim=3), after.argmax(dim=3))
    shift = 0.6 * torch.einsum("twd,ad->taw", TEXT.tokens, neighbors.mean(dim=1))
    torch.testing.assert_close(after.amax(dim=3), 0.4 * before.amax(dim=3) + shift)
    renormalized = AUDIO.inject(neighbors, 0.6, renormalize=True)
    again = torch.einsum("twd,afd->tawf", TEXT.tokens, renormalized.tokens)
    assert not torch.equal(before.argmax(dim=3), again.argmax(dim=3))
    assert AUDIO.inject(neighbors, 0.0) is AUDIO


def test_injection_into_tokens_by_hand():
    neighbors = torch.tensor([[[0.0, 1.0], [0.0, 3.0]]])
    side = TokenEmbeddings(torch.tensor([[1.0, 0.0]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    injected = side.inject(neighbors, 0.25)
    assert injected.pooled.tolist() == [[0.75, 0.5]]
    assert injected.tokens.tolist() == [[[0.75, 0.5], [0.0, 1.25]]]


def test_prototype_scores_are_balanced_in_training_only():
    interaction = make("prototypes", sinkhorn_epsilon=0.2, sinkhorn_iterations=7)
    plain = interaction.eval()(TEXT, AUDIO).to_audio.detach()
    training = interaction.train()(TEXT, AUDIO).to_audio.detach()
    np.testing.assert_allclose(training.numpy(), reference.balanced(plain.numpy(), 0.2, 7), atol=1e-12)
    off = make("prototypes", sinkhorn_iterations=0).train()(TEXT, AUDIO).to_audio.detach()
    torch.testing.assert_close(off, plain)


def test_retrieval_score_depends_on_its_pair_alone():
    interaction = make("prototypes").eval()
    alone = interaction(
        TokenEmbeddings(TEXT.pooled[1:2], TEXT.tokens[1:2], TEXT.valid[1:2]),
        TokenEmbeddings(AUDIO.pooled[2:3], AUDIO.tokens[2:3], AUDIO.valid[2:3]),
    )
    torch.testing.assert_close(alone.to_audio[0, 0], interaction(TEXT, AUDIO).to_audio[1, 2])


def test_balanced_scores_have_equal_sums():
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mass = (balance_scores(scores, 0.3, 200) / 0.3).exp()
    torch.testing.assert_close(mass.sum(dim=0), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(mass.sum(dim=1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_scores_in_half_precision_are_balanced_in_float32(half):
    scores = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).to(half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        balanced = balance_scores(scores, 0.1, 50)
    for found in (balanced, balance_scores(scores, 0.1, 50)):
        assert torch.equal(found, balance_scores(scores.float(), 0.1, 50))


def test_gradient_of_balanced_scores_is_that_of_scores():
    scores = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(3, 4)
    (gradient,) = torch.autograd.grad((weight * balance_scores(scores, 0.3, 20)).sum(), scores)
    assert torch.equal(gradient, weight)


def test_frame_wise_starts_as_the_mean_dot_product():
    found = FrameWiseInteraction(5, initial_scale=2.0)(TEXT.to(torch.float32), AUDIO.to(torch.float32))
    mean = (AUDIO.tokens * AUDIO.valid[..., None]).sum(dim=1) / AUDIO.valid.sum(
        dim=1, keepdim=True
    ).clamp_min(1)
    torch.testing.assert_close(found.to_audio.detach(), (2 * TEXT.pooled @ mean.T).float())


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_refuses_pooled_embeddings(name):
    with pytest.raises(TypeError, match=r"tokens, but the audio embeddings are pooled, \(6, 5\)\. Have"):
        make(name)(TEXT, AUDIO.pooled)


def test_dot_product_takes_either():
    interaction = DotProductInteraction()
    torch.testing.assert_close(
        interaction(TEXT, AUDIO).to_audio, interaction(TEXT.pooled, AUDIO.pooled).to_audio
    )


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: LateInteraction("max"), r"`reduction` has to be one of \('mean', 'sum'\), but got 'max'"),
        (lambda: LateInteraction(max_elements=0), "`max_elements` has to be an integer of at least 1"),
        (lambda: StackedCrossAttention(0.0), "`attention_scale` has to be positive, but got 0.0"),
        (lambda: StackedCrossAttention(pooling="max"), "`pooling` has to be one of"),
        (lambda: StackedCrossAttention(pooling_scale=-1.0), "`pooling_scale` has to be positive"),
        (lambda: PrototypeAttention(0), "`width` has to be an integer of at least 1"),
        (lambda: PrototypeAttention(4, 0), "`num_prototypes` has to be an integer of at least 1"),
        (lambda: PrototypeAttention(4, temperature=0.0), "`temperature` has to be positive"),
        (lambda: PrototypeAttention(4, sinkhorn_epsilon=0.0), "`sinkhorn_epsilon` has to be positive"),
        (
            lambda: PrototypeAttention(4, sinkhorn_iterations=-1),
            "`sinkhorn_iterations` has to be an int",
        ),
        (lambda: FrameWiseInteraction(4, pooling="sum"), "`pooling` has to be one of"),
        (lambda: FrameWiseInteraction(4, initial_scale=0.0), "`initial_scale` has to be positive"),
    ],
)
def test_refused_options(make_one, message):
    with pytest.raises(ValueError, match=message):
        make_one()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 4, 5)), r"but got \(2, 3\) and \(2, 4, 5\)\. Project tokens"),
        ((torch.ones(2, 3), torch.ones(3, 4, 3)), r"but got \(2, 3\) and \(3, 4, 3\)"),
        ((torch.ones(2, 3), torch.ones(2, 0, 3)), "with at least one token"),
        ((torch.ones(2, 3), torch.ones(2, 4, 3), torch.ones(2, 4)), r"boolean of shape \(2, 4\)"),
        ((torch.ones(2, 3), torch.ones(2, 4, 3), torch.ones(2, 3) > 0), r"boolean of shape \(2, 4\)"),
    ],
)
def test_refused_token_embeddings(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenEmbeddings(*arguments)


def test_what_an_interaction_may_return():
    scores = torch.arange(6.0).view(2, 3)
    found = as_similarities(scores)
    assert found.are_symmetric
    assert torch.equal(found.to_text, scores.T)
    assert as_similarities(Similarities(scores, scores.T)).are_symmetric is False
    with pytest.raises(TypeError, match=r"or Similarities, but got a list\."):
        as_similarities([scores])
    with pytest.raises(ValueError, match=r"but got \(2, 3\) and \(2, 3\)"):
        as_similarities(Similarities(scores, scores))

"""`out_of_batch_influence`, Eq. 2, and what Eq. 3 and 10 say about NT-Xent and injection."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_lightning.functional import (
    inject_knowledge,
    nt_xent,
    out_of_batch_influence,
    realign_similarity,
    reliability_potential,
    sinkhorn_plan,
    unit_length,
)
from tests.helpers import reference

PROPERTY = settings(max_examples=15, deadline=None, derandomize=True)
PAIRS, NEIGHBORS, TEMPERATURE = 11, 3, 0.2


def sample(seed: int, batch: int = 4, width: int = 5) -> list[torch.Tensor]:
    """Audio and text of a batch, audio and text of the base."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [batch, batch, PAIRS, PAIRS]
    return [unit_length(torch.randn(n, width, generator=generator, dtype=torch.float64)) for n in sizes]


def top_rows(queries: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(reference.top_k(queries.numpy(), base.numpy(), NEIGHBORS))


def contrastive(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    similarity = v @ u.T
    return (nt_xent(similarity, TEMPERATURE) + nt_xent(similarity.T, TEMPERATURE)) / 2


def fine_loss(u, v, by_audio, by_text, ratio=0.3, ot_factor=0.4, strength=0.5) -> torch.Tensor:
    """Eq. 9–19 with one granularity, on looked-up `(audio, text)` copies of each modality's rows."""
    u_injected = inject_knowledge(u, by_audio[0], ratio)
    v_injected = inject_knowledge(v, by_text[1], ratio)
    similarity = v_injected @ u_injected.T
    plan = sinkhorn_plan(similarity)
    total = 0
    for s, q, e, crossed, own in (
        (similarity, plan, u, by_text[0], by_audio[0]),
        (similarity.T, plan.T, v, by_audio[1], by_text[1]),
    ):
        unreliable = -reliability_potential(e, crossed, own).log().mean()
        total = total + (1 + strength * unreliable) * nt_xent(
            realign_similarity(s, q, ot_factor, plan_scaling="row"), TEMPERATURE
        )
    return total / 2


def look_up(base_audio, base_text, rows):
    """Copies of the looked-up rows with a gradient of their own."""
    return tuple(side[rows].detach().requires_grad_() for side in (base_audio, base_text))


def test_zero_for_nt_xent_exactly():
    audio, text, base_audio, base_text = sample(0)
    rows = top_rows(audio, base_audio)
    found = look_up(base_audio, base_text, rows)
    loss = contrastive(audio.requires_grad_(), text.requires_grad_())
    influence = out_of_batch_influence(loss, [(rows, found[0])], [(rows, found[1])], PAIRS)
    assert influence.shape == ()
    assert influence.item() == 0


def test_zero_without_injection_although_knowledge_is_looked_up():
    audio, text, base_audio, base_text = sample(0)
    rows = top_rows(audio, base_audio)
    found = look_up(base_audio, base_text, rows)
    u = inject_knowledge(audio.requires_grad_(), found[0], 0.0)
    v = inject_knowledge(text.requires_grad_(), found[1], 0.0)
    influence = out_of_batch_influence(
        contrastive(u, v), [(rows, found[0])], [(rows, found[1])], num_rows=PAIRS
    )
    assert influence.item() == 0


def test_zero_for_a_constant_loss_and_for_nothing_looked_up():
    found = torch.ones(1, 1, 2, requires_grad=True)
    row = torch.zeros(1, 1, dtype=torch.long)
    assert out_of_batch_influence(torch.tensor(1.0), [(row, found)], [], 3).item() == 0
    assert out_of_batch_influence(found.sum(), [], [], 3).item() == 0


@PROPERTY
@given(seed=st.integers(0, 10_000), ratio=st.floats(0.01, 1))
def test_positive_with_injection(seed, ratio):
    audio, text, base_audio, base_text = sample(seed)
    by_audio, by_text = top_rows(audio, base_audio), top_rows(text, base_text)
    found_audio = base_audio[by_audio].requires_grad_()
    found_text = base_text[by_text].requires_grad_()
    loss = contrastive(inject_knowledge(audio, found_audio, ratio), inject_knowledge(text, found_text, ratio))
    assert out_of_batch_influence(loss, [(by_audio, found_audio)], [(by_text, found_text)], PAIRS).item() > 0


def influence_of_fine_loss(audio, text, base_audio, base_text) -> torch.Tensor:
    rows_audio, rows_text = top_rows(audio, base_audio), top_rows(text, base_text)
    by_audio = look_up(base_audio, base_text, rows_audio)
    by_text = look_up(base_audio, base_text, rows_text)
    return out_of_batch_influence(
        fine_loss(audio, text, by_audio, by_text),
        [(rows_audio, by_audio[0]), (rows_text, by_text[0])],
        [(rows_audio, by_audio[1]), (rows_text, by_text[1])],
        PAIRS,
    )


@PROPERTY
@given(seed=st.integers(0, 10_000))
def test_equals_dense_gradient_of_the_whole_base(seed):
    audio, text, base_audio, base_text = sample(seed)
    rows_audio, rows_text = top_rows(audio, base_audio), top_rows(text, base_text)
    influence = influence_of_fine_loss(audio, text, base_audio, base_text)
    base_audio.requires_grad_(), base_text.requires_grad_()
    fine_loss(
        audio,
        text,
        (base_audio[rows_audio], base_text[rows_audio]),
        (base_audio[rows_text], base_text[rows_text]),
    ).backward()
    norms = [torch.linalg.vector_norm(base.grad, dim=1) for base in (base_audio, base_text)]
    torch.testing.assert_close(influence, (norms[0] + norms[1]).mean(), rtol=1e-12, atol=0)
    assert influence > 0


def test_equals_brute_force_of_the_reference():
    audio, text, base_audio, base_text = (x.numpy() for x in sample(0))
    options = {
        "num_neighbors": NEIGHBORS,
        "injection_ratio": 0.3,
        "ot_factor": 0.4,
        "lambda_fine": 0.5,
        "temperature": TEMPERATURE,
        "plan_scaling": "row",
    }
    start = reference.ask_loss(audio, text, {"fine": (base_audio, base_text)}, **options)
    expected = reference.out_of_batch_influence(
        lambda u, v: (
            reference.ask_loss(audio, text, {"fine": (u, v)}, held=start, hold=("rows",), **options).loss
        ),
        (base_audio, base_text),
    )
    influence = influence_of_fine_loss(*sample(0))
    np.testing.assert_allclose(influence.item(), expected, rtol=1e-7)


def test_a_row_found_several_times_counts_the_norm_of_its_summed_gradient():
    found = torch.ones(2, 2, 3, requires_grad=True)
    weights = torch.tensor([[1.0, 1.0], [-1.0, 2.0]])  # row 4 is found twice with opposite gradients
    loss = (found * weights[..., None]).sum()
    rows = torch.tensor([[4, 1], [4, 0]])
    influence = out_of_batch_influence(loss, [(rows, found)], [], num_rows=5)
    assert influence.item() == pytest.approx((0 + 1 + 2) * 3**0.5 / 5, rel=1e-6)


@PROPERTY
@given(seed=st.integers(0, 10_000))
def test_renumbering_the_base_and_permuting_the_batch_change_nothing(seed):
    audio, text, base_audio, base_text = sample(seed)
    generator = torch.Generator().manual_seed(seed)
    base, batch = torch.randperm(PAIRS, generator=generator), torch.randperm(4, generator=generator)
    expected = influence_of_fine_loss(audio, text, base_audio, base_text)
    permuted = influence_of_fine_loss(audio[batch], text[batch], base_audio[base], base_text[base])
    torch.testing.assert_close(permuted, expected, rtol=1e-10, atol=0)


def test_graph_of_the_loss_is_kept_and_no_gradient_is_left_behind():
    audio, text, base_audio, base_text = sample(0)
    rows = top_rows(audio, base_audio)
    found = look_up(base_audio, base_text, rows)
    loss = contrastive(inject_knowledge(audio.requires_grad_(), found[0], 0.5), text)
    influence = out_of_batch_influence(loss, [(rows, found[0])], [], PAIRS)
    assert not influence.requires_grad
    assert found[0].grad is None
    assert audio.grad is None
    loss.backward()
    assert audio.grad.abs().sum() > 0

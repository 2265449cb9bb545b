"""Losses of token-level similarities against NumPy, over ranks, and what they refuse."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ask_lightning import KnowledgeBase, KnowledgeDistillationLoss, NTXentLoss, ReliabilityOTLoss
from ask_lightning.callbacks.monitors import influence_of_knowledge
from ask_lightning.functional.distillation import teacher_targets
from ask_lightning.interaction import (
    DotProductInteraction,
    FrameWiseInteraction,
    LateInteraction,
    PrototypeAttention,
    TokenEmbeddings,
)
from ask_lightning.losses import HardNegativeLoss, MomentumContrastLoss, SigmoidLoss, TripletLoss
from tests.helpers import reference
from tests.helpers.ranks import on_ranks
from tests.interaction.pairs import TOKEN_LEVEL, WIDTH, expected, leaves, make, make_side

BATCH = 5
TEXT, AUDIO = (
    TokenEmbeddings(3 * side.pooled, 2 * side.tokens, side.mask)
    for side in (make_side(BATCH, 3, seed=1), make_side(BATCH, 4, seed=2))
)
IDS = torch.arange(BATCH)


def base() -> KnowledgeBase:
    generator = torch.Generator().manual_seed(7)
    pairs = torch.randn(2, 13, WIDTH, generator=generator, dtype=torch.float64)
    return KnowledgeBase.from_embeddings(*pairs, ids=torch.arange(13), num_prototypes=4)


def unit(side: TokenEmbeddings) -> TokenEmbeddings:
    return side.unit_length()


def contrast(matrices, temperature, targets=(None, None)) -> float:
    total = 0.0
    for matrix, target in zip(matrices, targets, strict=True):
        logits = matrix / temperature
        log_share = logits - reference.log_sum_exp(logits, 1)
        total -= float(((np.eye(len(matrix)) if target is None else target) * log_share).sum(axis=1).mean())
    return total / 2


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_nt_xent(name):
    interaction = make(name).eval()
    loss = NTXentLoss(0.3, interaction=interaction)(AUDIO, TEXT)
    matrices = expected(name, interaction, unit(TEXT), unit(AUDIO))
    assert loss.item() == pytest.approx(contrast(matrices, 0.3), rel=1e-10)


@pytest.mark.parametrize("name", ["filip", "prototypes"])
def test_distillation(name):
    interaction, knowledge = make(name).eval(), base()
    loss = KnowledgeDistillationLoss(0.3, 0.6, interaction=interaction)(
        AUDIO, TEXT, ids=IDS, knowledge=knowledge
    )
    stored = knowledge.find_clips(IDS)
    targets = teacher_targets(
        stored.audio.double(), stored.text.double(), stored.known, distillation_weight=0.6
    )
    matrices = expected(name, interaction, unit(TEXT), unit(AUDIO))
    wanted = contrast(matrices, 0.3, [target.numpy() for target in targets])
    assert loss.item() == pytest.approx(wanted, rel=1e-6)


def injected(side: TokenEmbeddings, rows: np.ndarray, ratio: float) -> TokenEmbeddings:
    knowledge = torch.from_numpy(rows.mean(axis=1))
    return TokenEmbeddings(
        (1 - ratio) * side.pooled + ratio * knowledge,
        (1 - ratio) * side.tokens + ratio * knowledge[:, None],
        side.mask,
    )


@pytest.mark.parametrize("plan_scaling", ["marginal", "row"])
@pytest.mark.parametrize("name", ["filip", "scan mean", "prototypes", "frame-wise"])
def test_reliability_ot(name, plan_scaling):
    """Injection reaches tokens; reliability is that of pooled embeddings; each direction has its plan."""
    interaction, knowledge = make(name).eval(), base()
    options = {"injection_ratio": 0.3, "ot_factor": 0.4, "plan_scaling": plan_scaling}
    loss = ReliabilityOTLoss(3, temperature=0.3, interaction=interaction, **options)
    value = loss(AUDIO, TEXT, knowledge=knowledge)

    u, v = unit(AUDIO), unit(TEXT)
    entropies, factors = np.zeros(2), np.ones(2)
    for granularity, strength in (("fine", 0.2), ("coarse", 0.3)):
        stored = getattr(knowledge, granularity)
        of_audio, of_text = stored.audio.double().numpy(), stored.text.double().numpy()
        queries = u.pooled.numpy(), v.pooled.numpy()
        by_audio, by_text = (
            reference.top_k(side, rows, 3) for side, rows in zip(queries, (of_audio, of_text), strict=True)
        )
        potentials = (
            reference.reliability_potential(queries[0], of_audio[by_text], of_audio[by_audio]),
            reference.reliability_potential(queries[1], of_text[by_audio], of_text[by_text]),
        )
        matrices = expected(
            name, interaction, injected(v, of_text[by_text], 0.3), injected(u, of_audio[by_audio], 0.3)
        )
        for way, matrix in enumerate(matrices):
            plan = reference.sinkhorn_plan(matrix, 0.1)
            realigned = reference.realign_similarity(matrix, plan, 0.4, plan_scaling)
            entropies[way] += reference.cross_entropy(realigned / 0.3).mean()
            factors[way] += strength * -np.log(potentials[way]).mean()
    assert value.item() == pytest.approx(float((factors * entropies).mean()), rel=1e-5)


def test_one_matrix_for_both_directions_needs_one_similarity():
    loss = ReliabilityOTLoss(3, a2t_realignment="same_plan", interaction=LateInteraction())
    with pytest.raises(ValueError, match='`a2t_realignment` has to be "transposed_plan" with an interaction'):
        loss(AUDIO, TEXT, knowledge=base())


def test_tokens_without_interaction_play_no_part():
    (text, of_text), (audio, of_audio) = leaves(TEXT), leaves(AUDIO)
    for loss in (NTXentLoss(), ReliabilityOTLoss(3)):
        value = loss(audio, text, knowledge=base())
        pooled = loss(audio.pooled, text.pooled, knowledge=base())
        assert torch.equal(value, pooled)
        value.backward()
        assert of_text[1].grad is None
        assert of_audio[1].grad is None


@pytest.mark.parametrize("kind", [NTXentLoss, ReliabilityOTLoss])
def test_dot_product_is_the_default(kind):
    options = {"num_neighbors": 3} if kind is ReliabilityOTLoss else {}
    plain = kind(**options)(AUDIO.pooled, TEXT.pooled, knowledge=base())
    named = kind(interaction=DotProductInteraction(), **options)(AUDIO, TEXT, knowledge=base())
    torch.testing.assert_close(named, plain, rtol=1e-6, atol=0)


def test_half_precision_tokens():
    sides = [side.to(torch.bfloat16) for side in (AUDIO, TEXT)]
    loss = ReliabilityOTLoss(3, interaction=LateInteraction())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*sides, knowledge=base())
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(), loss(*(side.to(torch.float64) for side in sides), knowledge=base()), rtol=1e-3, atol=0
    )


def test_without_knowledge_in_evaluation():
    loss = ReliabilityOTLoss(3, granularities=["fine"], interaction=LateInteraction()).eval()
    with pytest.warns(UserWarning, match="evaluates without knowledge"):
        value = loss(AUDIO, TEXT)
    torch.testing.assert_close(value, NTXentLoss(interaction=LateInteraction())(AUDIO, TEXT))


@pytest.mark.parametrize("name", ["filip", "prototypes"])
def test_influence_of_knowledge_through_tokens(name):
    """OBI is positive where knowledge is injected into tokens, and 0 without injection and reliability."""
    options = {"lambda_fine": 0.0, "lambda_coarse": 0.0, "interaction": make(name).eval()}
    for ratio, positive in ((0.2, True), (0.0, False)):
        loss = ReliabilityOTLoss(3, ratio, **options)
        influences = influence_of_knowledge(loss, AUDIO, TEXT, knowledge=base())
        assert all((float(value) > 0) == positive for value in influences.values())


class Towers(nn.Module):
    """Linear encoders of frames and words, and interactions that learn, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.audio, self.text = (nn.Linear(4, WIDTH, dtype=torch.float64) for _ in range(2))
        self.prototypes = PrototypeAttention(WIDTH, 3, max_elements=40).double()
        self.frames = FrameWiseInteraction(WIDTH).double()
        self.late = LateInteraction(max_elements=40)

    def forward(self, audio: Tensor, text: Tensor) -> tuple[TokenEmbeddings, TokenEmbeddings]:
        return tuple(
            TokenEmbeddings(encoder(side.masked_fill(~mask[..., None], 0).sum(dim=1)), encoder(side), mask)
            for encoder, side, mask in (
                (self.audio, audio, audio[..., 0] > -1),
                (self.text, text, text[..., 0] > -1),
            )
        )


LOSSES = {
    f"{kind} {name}": (kind, name)
    for kind in ("contrast", "ask", "teacher")
    for name in ("late", "prototypes")
} | {"ask frames": ("ask", "frames")}


def make_loss(kind: str, interaction: str) -> NTXentLoss | ReliabilityOTLoss | KnowledgeDistillationLoss:
    options = {"interaction": interaction, "gather": True}
    if kind == "contrast":
        return NTXentLoss(0.2, **options)
    if kind == "teacher":
        return KnowledgeDistillationLoss(0.2, **options)
    return ReliabilityOTLoss(3, plan_scaling="row", temperature=0.2, **options)


def step(rows: slice, lengths: tuple[int, int], name: str, ddp: bool) -> dict[str, Tensor]:
    """The loss of some rows and all gradients; a rank pads its rows to its own lengths."""
    generator = torch.Generator().manual_seed(2)
    audio = torch.full((8, 6, 4), -9.0, dtype=torch.float64)
    text = torch.full((8, 5, 4), -9.0, dtype=torch.float64)
    audio[:, :4], text[:, :3] = (
        torch.rand(8, length, 4, generator=generator, dtype=torch.float64) for length in (4, 3)
    )
    towers = Towers()
    kind, interaction = LOSSES[name]
    used = {"audio", "text", interaction}
    for part, module in towers.named_children():
        module.requires_grad_(part in used)
    loss = make_loss(kind, interaction)
    loss.bind(towers)
    model = DistributedDataParallel(towers) if ddp else towers
    value = loss(
        *model(audio[rows, : lengths[0]], text[rows, : lengths[1]]),
        ids=torch.arange(8)[rows],
        knowledge=base(),
    )
    value.backward()
    gradients = {key: part.grad for key, part in towers.named_parameters() if part.requires_grad}
    return {f"term {key}": term for key, term in loss.last.items()} | gradients


def own_steps() -> dict[str, dict[str, Tensor]]:
    rows, lengths = [(slice(0, 3), (4, 5)), (slice(3, 8), (6, 3))][torch.distributed.get_rank()]
    return {name: step(rows, lengths, name, ddp=True) for name in LOSSES}


def test_gradient_over_two_ranks_is_that_of_one_process():
    """The ranks have batches of different sizes with different numbers of frames and words."""
    for rank, found in enumerate(on_ranks(2, own_steps)):
        for name in LOSSES:
            whole = step(slice(None), (6, 5), name, ddp=False)
            assert found[name].keys() == whole.keys()
            assert any(key.startswith(LOSSES[name][1]) for key in whole) == (LOSSES[name][1] != "late")
            for key, value in whole.items():
                torch.testing.assert_close(
                    found[name][key],
                    value,
                    rtol=1e-10,
                    atol=1e-10,
                    msg=lambda text, about=(name, rank, key): f"{about}: {text}",
                )


@pytest.mark.parametrize(
    "loss",
    [TripletLoss(), SigmoidLoss(), HardNegativeLoss(), MomentumContrastLoss()],
    ids=lambda x: type(x).__name__,
)
def test_other_losses_refuse_tokens(loss):
    message = rf"{type(loss).__name__} compares pooled embeddings, but the encoders returned TokenEmbeddings"
    with pytest.raises(TypeError, match=message):
        loss(AUDIO, TEXT)


def test_interaction_of_tokens_refuses_pooled_embeddings():
    with pytest.raises(TypeError, match="LateInteraction compares tokens, but the text embeddings are"):
        NTXentLoss(interaction=LateInteraction())(AUDIO, TEXT.pooled)


@pytest.mark.parametrize("wrong", [3, "not a name"])
def test_interaction_that_is_none(wrong):
    with pytest.raises(TypeError, match="`interaction` has to be None, the name of an attribute of the"):
        NTXentLoss(interaction=wrong)


def test_interaction_by_name():
    towers, loss = Towers(), NTXentLoss(0.2, interaction="late")
    assert not loss.is_bound
    with pytest.raises(RuntimeError, match="NTXentLoss reads its interaction from a model and has none"):
        loss(AUDIO, TEXT)
    loss.bind(towers)
    assert loss.is_bound
    assert torch.equal(loss(AUDIO, TEXT), NTXentLoss(0.2, interaction=LateInteraction())(AUDIO, TEXT))
    assert loss.options["interaction"] == "late"
    assert NTXentLoss.from_options(loss.options).interaction == "late"
    other, its_loss = copy.deepcopy((towers, loss))
    other.late = DotProductInteraction()
    assert not torch.equal(its_loss(AUDIO, TEXT), loss(AUDIO, TEXT)), "the copy reads from the copy"


def test_interaction_by_a_wrong_name():
    loss = NTXentLoss(interaction="early")
    with pytest.raises(ValueError, match="`interaction` has to name an attribute of Towers, but got 'early'"):
        loss.bind(Towers())
    with pytest.raises(ValueError, match="something callable of Towers, but 'training' is a bool"):
        NTXentLoss(interaction="training").bind(Towers())


def test_object_that_a_file_cannot_hold():
    options = NTXentLoss(interaction=LateInteraction()).options
    assert options["interaction"] == "LateInteraction(reduction='mean')"
    with pytest.raises(ValueError, match="The loss had a interaction that a file cannot hold"):
        NTXentLoss.from_options(options)

"""Ranks by token-level similarity against sorted lists of scores made pair by pair."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ask_lightning.interaction import (
    DotProductInteraction,
    LateInteraction,
    Similarities,
    TokenEmbeddings,
    rows_of,
)
from ask_lightning.metrics import AudioTextRetrieval, QueryBank, interaction_ranks, retrieval_ranks
from tests.helpers.ranks import on_ranks
from tests.helpers.retrieval_reference import noisy_pairs, positions_of_own
from tests.interaction.pairs import expected, make, make_side


def rows_of_captions() -> tuple[TokenEmbeddings, TokenEmbeddings, torch.Tensor]:
    """24 captions of 9 clips, in a random order; the texts resemble their clips."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.cat([torch.arange(9), torch.randint(9, (15,), generator=generator)])
    clips = clips[torch.randperm(24, generator=generator)]
    audio = rows_of(make_side(9, 6, seed=1, empty=False), clips)
    text = make_side(24, 4, seed=2, empty=False)
    text = TokenEmbeddings(text.pooled + audio.pooled, text.tokens + 0.8 * audio.tokens[:, :4], text.valid)
    return audio, text, 100 - 3 * clips


AUDIO, TEXT, CLIPS = rows_of_captions()


def reference_ranks(name, interaction):
    to_audio, to_text = expected(name, interaction, TEXT.unit_length(), AUDIO.unit_length())
    ids, ranks = CLIPS.tolist(), (np.zeros(24), np.zeros(24))
    firsts = [ids.index(clip) for clip in sorted(set(ids))]
    for row in range(24):
        own = [ids[first] == ids[row] for first in firsts]
        (ranks[1][row],) = positions_of_own(to_audio[row, firsts], own)
        others = [number for number in range(24) if ids[number] != ids[row] or number == row]
        before = sum(
            to_text[row, number] > to_text[row, row]
            for number in range(24)
            if ids[number] == ids[row] and number != row
        )
        (position,) = positions_of_own(to_text[row, others], [number == row for number in others])
        ranks[0][row] = position + before
    return ranks


@pytest.mark.parametrize("block_size", [5, 256])
@pytest.mark.parametrize("name", ["dot product", "filip", "scan", "prototypes", "frame-wise"])
def test_ranks_against_sorted_lists(name, block_size):
    interaction = make(name).train()
    found = interaction_ranks(AUDIO, TEXT, CLIPS, interaction, block_size=block_size)
    for ours, theirs in zip(found[:2], reference_ranks(name, interaction), strict=True):
        assert ours.tolist() == theirs.tolist()
    assert interaction.training, "as it was"


def test_dot_product_ranks_as_cosine_similarity_does():
    audio, text, clip_ids = noisy_pairs()
    sides = [TokenEmbeddings(side, side[:, None]) for side in (audio, text)]
    wanted = retrieval_ranks(audio, text, clip_ids)
    for interaction in (DotProductInteraction(), LateInteraction()):
        for ours, theirs in zip(interaction_ranks(*sides, clip_ids, interaction), wanted, strict=True):
            assert torch.equal(ours, theirs)


def test_ties_count_against_the_model():
    """A model that maps everything to one point ranks last, captions of one clip one after another."""
    same = TokenEmbeddings(torch.ones(5, 2), torch.ones(5, 3, 2))
    ranks = interaction_ranks(same, same, torch.tensor([0, 0, 1, 2, 2]), LateInteraction())
    assert ranks.text_to_audio.tolist() == [3] * 5
    assert sorted(ranks.audio_to_text[:2].tolist()) == [4, 5]
    assert ranks.audio_to_text[2] == 5


@pytest.mark.parametrize("name", ["filip", "prototypes"])
def test_metric_in_updates_of_other_lengths(name):
    interaction = make(name, torch.float32).eval()
    metric = AudioTextRetrieval(top_k=[1, 3], interaction=interaction)
    audio, text = AUDIO.to(torch.float32), TEXT.to(torch.float32)
    longer = torch.nn.functional.pad(text.tokens, (0, 0, 0, 3)), torch.nn.functional.pad(text.valid, (0, 3))
    metric.update(rows_of(audio, torch.arange(10)), rows_of(text, torch.arange(10)), CLIPS[:10])
    rest = torch.arange(10, 24)
    metric.update(
        rows_of(audio, rest), TokenEmbeddings(text.pooled[rest], longer[0][rest], longer[1][rest]), CLIPS[10:]
    )
    scores = metric.compute()
    to_text, to_audio = reference_ranks(name, interaction)
    assert scores["t2a/recall_at_1"] == pytest.approx(np.mean(to_audio <= 1))
    assert scores["t2a/median_rank"] == np.median(to_audio)
    best = [min(to_text[clip == CLIPS]) for clip in CLIPS.unique()]
    assert scores["a2t/recall_at_3"] == pytest.approx(np.mean(np.array(best) <= 3))
    assert set(scores) == set(metric.score_names)
    metric.reset()
    with pytest.warns(UserWarning, match="before"), pytest.raises(ValueError, match="no rows to rank"):
        metric.compute()


def test_repeated_captions_count_once():
    metric, once = (AudioTextRetrieval(interaction=LateInteraction()) for _ in range(2))
    once.update(AUDIO, TEXT, CLIPS)
    repeated = torch.cat([torch.arange(24), torch.tensor([3, 3, 7])])
    metric.update(rows_of(AUDIO, repeated), rows_of(TEXT, repeated), CLIPS[repeated], repeated)
    assert metric.compute() == once.compute()


def test_without_interaction_tokens_play_no_part():
    tokens, vectors = AudioTextRetrieval(), AudioTextRetrieval()
    tokens.update(AUDIO, TEXT, CLIPS)
    vectors.update(AUDIO.pooled, TEXT.pooled, CLIPS)
    assert tokens.compute() == vectors.compute()


def test_interaction_stays_the_models():
    interaction = make("prototypes", torch.float32)
    model = nn.Module()
    model.interaction, model.metrics = interaction, AudioTextRetrieval(interaction=interaction)
    assert {name.split(".")[0] for name in model.state_dict()} == {"interaction"}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.metrics._interaction[0] is other.interaction
        other.metrics.update(AUDIO, TEXT, CLIPS)
        assert other.metrics.compute()["t2a/median_rank"] >= 1


def test_half_precision():
    metric = AudioTextRetrieval(interaction=LateInteraction())
    metric.update(AUDIO.to(torch.bfloat16), TEXT.to(torch.bfloat16), CLIPS)
    assert metric.audio_tokens[0].dtype == torch.float32
    assert metric.compute()["t2a/median_rank"] >= 1


def own_scores() -> dict:
    """Rank 0 has 7 rows, rank 1 the others with fewer words and frames beyond its own; then none."""
    results = {}
    for name, parts in {"uneven": (range(7), range(7, 24)), "empty": (range(24), range(0))}.items():
        rows = torch.tensor(parts[dist.get_rank()], dtype=torch.int64)
        metric = AudioTextRetrieval(interaction=LateInteraction())
        text = rows_of(TEXT, rows)
        if dist.get_rank():
            text = TokenEmbeddings(
                text.pooled,
                nn.functional.pad(text.tokens, (0, 0, 0, 2)),
                nn.functional.pad(text.valid, (0, 2)),
            )
        metric.update(rows_of(AUDIO, rows), text, CLIPS[rows])
        results[name] = metric.compute()
    return results


def test_two_processes_give_what_one_gives():
    metric = AudioTextRetrieval(interaction=LateInteraction())
    metric.update(AUDIO, TEXT, CLIPS)
    alone = metric.compute()
    for results in on_ranks(2, own_scores):
        assert all(scores == alone for scores in results.values())


def test_refused_updates():
    metric = AudioTextRetrieval(interaction=LateInteraction())
    with pytest.raises(TypeError, match="TokenEmbeddings of both sides, but got a Tensor and a TokenEmb"):
        metric.update(AUDIO.pooled, TEXT, CLIPS)
    with pytest.raises(ValueError, match="is of cosine similarities, but this metric ranks"):
        metric.calibrate(QueryBank.from_pairs(torch.eye(3), torch.eye(3), torch.arange(3)))


def test_refused_rows():
    broken = TokenEmbeddings(AUDIO.pooled, AUDIO.tokens.clone(), AUDIO.mask)
    broken.tokens[2, 0] = torch.nan
    with pytest.raises(ValueError, match="`audio` has to be finite, but got NaN or Inf in 1 of 24 rows"):
        interaction_ranks(broken, TEXT, CLIPS, LateInteraction())
    nothing = torch.arange(0)
    with pytest.raises(ValueError, match="at least one row, but got none"):
        interaction_ranks(rows_of(AUDIO, nothing), rows_of(TEXT, nothing), CLIPS[:0], LateInteraction())
    with pytest.raises(ValueError, match="`block_size` has to be an integer of at least 1"):
        interaction_ranks(AUDIO, TEXT, CLIPS, LateInteraction(), block_size=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("direction", [0, 1])
def test_scores_that_are_no_numbers_are_refused(value, direction):
    """NaN is neither above nor below another score, so that it would rank first."""

    def broken(text, audio):
        scores = [torch.eye(len(text), len(audio)), torch.eye(len(audio), len(text))]
        scores[direction][0, 0] = value
        return Similarities(*scores)

    metric = AudioTextRetrieval(interaction=broken)
    metric.update(AUDIO, TEXT, CLIPS)
    with pytest.raises(ValueError, match="finite scores, but returned NaN or Inf"):
        metric.compute()

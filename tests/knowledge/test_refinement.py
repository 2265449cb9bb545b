"""Graph refinement: against a float64 reference, over ranks, and at the edges."""

import pytest
import torch

from ask_lightning.functional import unit_length
from ask_lightning.knowledge import refinement
from ask_lightning.knowledge.refinement import GraphRefinement
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.utilities.distributed import Ranks
from tests.helpers.ranks import on_ranks


def embeddings(count, width=6, seed=0):
    return torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(audio, text, num_neighbors, share, temperature):
    """The definition, pair by pair."""
    audio, text = (side / side.norm(dim=1, keepdim=True) for side in (audio, text))
    sides = [], []
    for own in range(len(audio)):
        similarity = (audio @ audio[own] + text @ text[own]) / 2
        similarity[own] = -torch.inf
        nearest = similarity.topk(num_neighbors).indices
        weights = torch.exp(similarity[nearest] / temperature)
        weights = weights / weights.sum()
        for side, refined in zip((audio, text), sides, strict=True):
            mixed = (1 - share) * side[own] + share * weights @ side[nearest]
            refined.append(mixed / mixed.norm())
    return tuple(torch.stack(rows) for rows in sides)


@pytest.mark.parametrize("block", [4096, 7])
def test_equals_the_definition_whatever_the_block(monkeypatch, block):
    monkeypatch.setattr(refinement, "_ROWS_PER_BLOCK", block)
    audio, text = embeddings(30)
    refined = GraphRefinement(4, 0.6, 0.2)(3 * audio, text, RowShard.unsharded(30))
    torch.testing.assert_close(refined, reference(audio, text, 4, 0.6, 0.2))


def test_no_share_changes_nothing_and_lengths_are_one():
    audio, text = embeddings(10)
    shard = RowShard.unsharded(10)
    torch.testing.assert_close(
        GraphRefinement(share=0.0)(audio, text, shard), (unit_length(audio), unit_length(text))
    )
    for side in GraphRefinement(share=1.0)(audio.float(), text.float(), shard):
        torch.testing.assert_close(side.norm(dim=1), torch.ones(10))


def test_fewer_pairs_than_neighbors():
    audio, text = embeddings(3)
    refined = GraphRefinement(9)(audio, text, RowShard.unsharded(3))
    torch.testing.assert_close(refined, reference(audio, text, 2, 0.3, 0.1))
    alone = GraphRefinement()(audio[:1], text[:1], RowShard.unsharded(1))
    torch.testing.assert_close(alone, (unit_length(audio[:1]), unit_length(text[:1])))


def test_equal_pairs_are_neighbors_of_each_other_not_of_themselves():
    audio, text = embeddings(1)[:, [0, 0, 0, 0]]
    refined = GraphRefinement(2, 1.0)(audio, text, RowShard.unsharded(4))
    torch.testing.assert_close(refined, (unit_length(audio), unit_length(text)))


def refine_on_ranks():
    audio, text = embeddings(11)
    ranks = Ranks.current()
    shard = RowShard.interleaved(11, ranks)
    mine = GraphRefinement(3, 0.5)(shard.select(audio), shard.select(text), shard)
    return [shard.gather(side).tolist() for side in mine]


def test_two_ranks_equal_one_process():
    expected = [side.tolist() for side in reference(*embeddings(11), 3, 0.5, 0.1)]
    for refined in on_ranks(2, refine_on_ranks):
        torch.testing.assert_close(torch.tensor(refined), torch.tensor(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_neighbors": 0}, "`num_neighbors`"),
        ({"share": 1.5}, "`share`"),
        ({"temperature": 0.0}, "`temperature`"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        GraphRefinement(**options)

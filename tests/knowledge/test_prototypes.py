"""`build_prototypes`, `match_clusters` and `max_pool`: Eq. 8 and the pairing."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_lightning.knowledge import prototypes
from ask_lightning.knowledge.kmeans import kmeans
from ask_lightning.knowledge.pairs import StoredPairs
from ask_lightning.knowledge.prototypes import PAIRINGS, match_clusters, max_pool
from ask_lightning.knowledge.prototypes import build_prototypes as build_from_pairs
from ask_lightning.knowledge.row_shard import ShardedRows
from tests.helpers.vectors import cluster, directions, generator, needs_gpu, planted, same_partition

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


def build_prototypes(
    audio: torch.Tensor, text: torch.Tensor, num_prototypes: int, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    prototypes = build_from_pairs(StoredPairs(audio, text), num_prototypes, **options)
    return prototypes.audio, prototypes.text


def pool_by_loop(vectors: torch.Tensor, assignment: torch.Tensor, num_clusters: int) -> np.ndarray:
    pooled = np.full((num_clusters, vectors.shape[1]), -np.inf)
    for row, m in zip(vectors.double().numpy(), assignment.tolist(), strict=True):
        pooled[m] = [max(old, new) for old, new in zip(pooled[m], row, strict=True)]
    return pooled


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def shared_pairs(by_audio: torch.Tensor, by_text: torch.Tensor) -> int:
    return int((by_audio == by_text).sum())


@PROPERTY
@given(rows=st.integers(1, 40), num_clusters=st.integers(1, 6), seed=st.integers(0, 1000))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_max_pool_agrees_with_a_loop(dtype, rows, num_clusters, seed):
    num_clusters = min(num_clusters, rows)
    drawn = torch.randint(num_clusters, (rows,), generator=generator(seed))
    assignment = torch.cat([torch.arange(num_clusters), drawn])[:rows]
    vectors = -directions(rows, 5, seed, dtype).abs()  # a maximum that began at zero would show
    pooled = max_pool(ShardedRows.unsharded(vectors), assignment, num_clusters)
    assert pooled.dtype == dtype
    np.testing.assert_array_equal(pooled.double().numpy(), pool_by_loop(vectors, assignment, num_clusters))


@PROPERTY
@given(rows=st.integers(1, 30), num_clusters=st.integers(1, 6), seed=st.integers(0, 1000))
def test_matching_shares_as_many_pairs_as_the_best_permutation(rows, num_clusters, seed):
    by_audio, by_text = torch.randint(num_clusters, (2, rows), generator=generator(seed))
    matched = match_clusters(by_audio, by_text, num_clusters)
    assert same_partition(matched, by_text)
    assert 0 <= int(matched.min()) <= int(matched.max()) < num_clusters
    best = max(shared_pairs(by_audio, torch.tensor(p)[by_text]) for p in permutations(range(num_clusters)))
    assert shared_pairs(by_audio, matched) == best


def test_matching_is_not_greedy():
    """The largest overlap first (4) would leave 0 for the other pair; together 3 + 3 is more."""
    counts = {(0, 0): 4, (0, 1): 3, (1, 0): 3, (1, 1): 0}
    pairs = [pair for pair, number in counts.items() for _ in range(number)]
    by_audio, by_text = torch.tensor(pairs).T
    assert shared_pairs(by_audio, match_clusters(by_audio, by_text, 2)) == 6


def test_matching_undoes_a_renumbering():
    by_audio = torch.arange(200) % 8
    renumbered = torch.randperm(8, generator=generator(0))[by_audio]
    assert torch.equal(match_clusters(by_audio, renumbered, 8), by_audio)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_prototypes", [1, 7, 60])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_prototypes_are_the_maxima_of_the_clusters(pairing, num_prototypes, normalize):
    audio, text = directions(60, 5, 0), directions(60, 5, 1)
    pooled = build_prototypes(audio, text, num_prototypes, pairing=pairing, normalize=normalize, seed=3)

    by_own = [cluster(audio, num_prototypes, 3), cluster(text, num_prototypes, 3)]
    apart = [by_own[0], cluster(text, num_prototypes, 4)]
    by_both = cluster(torch.cat([audio, text], dim=1) / 2**0.5, num_prototypes, 3)
    by_audio, by_text = {
        "audio": (by_own[0], by_own[0]),
        "text": (by_own[1], by_own[1]),
        "joint": (by_both, by_both),
        "index": apart,
        "matched": (by_own[0], match_clusters(*apart, num_prototypes)),
    }[pairing]
    for found, rows, assignment in zip(pooled, (audio, text), (by_audio, by_text), strict=True):
        expected = pool_by_loop(rows, assignment, num_prototypes)
        np.testing.assert_allclose(found.numpy(), unit(expected) if normalize else expected, atol=1e-6)
        lengths = found.norm(dim=1)
        assert bool(((lengths - 1).abs() < 1e-6).all()) == (normalize or num_prototypes == 60)


def test_unnormalised_prototypes_are_longer_than_their_members():
    audio, text = directions(500, 8, 0), directions(500, 8, 1)
    for pooled in build_prototypes(audio, text, 10, normalize=False):
        assert bool((pooled.norm(dim=1) > 1).all())


def test_matched_and_normalised_is_the_default():
    audio, text = directions(90, 5, 0), directions(90, 5, 1)
    expected = build_prototypes(audio, text, 6, pairing="matched", normalize=True, seed=0)
    for found, same in zip(build_prototypes(audio, text, 6), expected, strict=True):
        assert torch.equal(found, same)


@pytest.fixture(scope="module")
def planted_pairs():
    """Pairs of eight topics; the text's directions are the audio's in another order.

    Topic t lies along axis t of the audio space and axis t + 3 (mod 8) of the text space.
    """
    audio, topic = planted([40, 60, 50, 70, 45, 55, 65, 80], 16)
    noise = torch.randn(len(topic), 16, generator=generator(9))
    text = torch.nn.functional.normalize(torch.eye(16)[(topic + 3) % 8] + 0.05 * noise, dim=1)
    return audio, text


def corresponding(audio_prototypes: torch.Tensor, text_prototypes: torch.Tensor) -> int:
    topics = audio_prototypes[:, :8].argmax(dim=1)
    return int(((topics + 3) % 8 == text_prototypes[:, :8].argmax(dim=1)).sum())


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_prototypes_of_planted_topics_correspond(monkeypatch, planted_pairs, pairing):
    audio, text = planted_pairs

    def ideal(sharded: ShardedRows, num_clusters: int, seed: int, clustering: str) -> torch.Tensor:
        """The right groups, numbered in an order of its own for each modality."""
        rows = sharded.local
        largest = rows[:, :8].argmax(dim=1)
        return largest * (3 if torch.equal(rows, text) else 5) % num_clusters

    monkeypatch.setattr(prototypes, "kmeans", ideal)
    found = corresponding(*build_prototypes(audio, text, 8, pairing=pairing))
    assert found < 8 if pairing == "index" else found == 8


@pytest.mark.parametrize("pairing", ["matched", "joint", "audio", "text"])
def test_prototypes_of_planted_topics_correspond_after_k_means(planted_pairs, pairing):
    """K-means splits and merges some topics, so not all can.

    Number with number is worse, yet better than chance: both modalities start from the same pairs.
    """
    audio, text = planted_pairs
    found, by_number = (
        [corresponding(*build_prototypes(audio, text, 8, pairing=name, seed=seed)) for seed in range(6)]
        for name in (pairing, "index")
    )
    assert np.mean(found) >= 6
    assert np.mean(by_number) < np.mean(found) - 1


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_reproducible_by_the_seed(pairing):
    audio, text = directions(300, 8, 0), directions(300, 8, 1)
    one, again, other = (build_prototypes(audio, text, 12, pairing=pairing, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_on_a_gpu(pairing, device):
    audio, text = directions(300, 8, 0).to(device), directions(300, 8, 1).to(device)
    for pooled in build_prototypes(audio, text, 12, pairing=pairing):
        assert pooled.device.type == "cuda"
        assert pooled.shape == (12, 8)
        assert bool(((pooled.norm(dim=1) - 1).abs() < 1e-5).all())


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_euclidean_clusters_are_pooled_alike(pairing):
    audio, text = directions(300, 6, 0), directions(300, 6, 1)
    spherical, euclidean = (
        build_prototypes(audio, text, 30, pairing=pairing, clustering=clustering)
        for clustering in ("spherical", "euclidean")
    )
    assert not torch.equal(spherical[0], euclidean[0])
    if pairing in ("audio", "text"):
        by = kmeans(ShardedRows.unsharded(audio if pairing == "audio" else text), 30, 0, "euclidean")
        for side, prototypes in zip((audio, text), euclidean, strict=True):
            np.testing.assert_allclose(
                prototypes.numpy(), unit(pool_by_loop(side, by, 30)), rtol=1e-5, atol=1e-7
            )

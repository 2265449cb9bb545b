"""The functional core: definitions, ties, and independence from order, blocks, precision and scale."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR

from ask_lightning.metrics import RetrievalRanks, retrieval_ranks, retrieval_scores
from tests.helpers.retrieval_reference import noisy_pairs, positions_of_own, reference_scores, unit


@st.composite
def pairs_with_ties(draw):
    """Rows picked from few different embeddings, a zero vector among them: most scores tie."""
    num_rows = draw(st.integers(1, 24))
    pick = st.lists(st.integers(0, 4), min_size=num_rows, max_size=num_rows)
    pool = torch.randn(5, 8, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    pool[4] = 0
    clip_ids = torch.tensor(draw(pick))
    audio_of_clip = torch.tensor(draw(st.lists(st.integers(0, 4), min_size=5, max_size=5)))
    return pool[audio_of_clip[clip_ids]], pool[draw(pick)], clip_ids


def as_floats(scores):
    return {name: float(score) for name, score in scores.items()}


def assert_equal_ranks(ranks, others):
    for one, other in zip(ranks, others, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.5, 30.0])
@pytest.mark.parametrize("crop_noise", [0.0, 0.7])
def test_scores_are_those_of_the_reference(noise, crop_noise):
    pairs = noisy_pairs(noise=noise, crop_noise=crop_noise)
    assert as_floats(retrieval_scores(retrieval_ranks(*pairs))) == pytest.approx(
        reference_scores(*map(np.asarray, pairs)), abs=1e-6
    )


@given(pairs_with_ties(), st.integers(1, 30), st.sampled_from([(1, 2), (3,), (1, 5, 10)]), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_scores_are_those_of_the_reference_with_ties(pairs, block_size, top_k, map_k):
    scores = retrieval_scores(retrieval_ranks(*pairs, block_size=block_size), top_k, map_k)
    assert as_floats(scores) == pytest.approx(
        reference_scores(*map(np.asarray, pairs), top_k, map_k), abs=1e-6
    )


@given(pairs_with_ties(), st.integers(1, 9), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_ranks_do_not_depend_on_order_or_blocks(pairs, block_size, random):
    ranks = retrieval_ranks(*pairs)
    order = list(range(len(pairs[0])))
    random.shuffle(order)
    shuffled = retrieval_ranks(*(rows[order] for rows in pairs), block_size=block_size)
    assert torch.equal(shuffled.text_to_audio, ranks.text_to_audio[order])
    assert torch.equal(shuffled.clips, ranks.clips[order])
    # Tied captions of one clip may swap their ranks among each other, which no score can tell.
    for clip in ranks.clips.unique():
        ours, theirs = (r.audio_to_text[r.clips == clip].sort().values for r in (ranks, shuffled))
        assert torch.equal(ours, theirs)
    assert retrieval_scores(shuffled) == retrieval_scores(ranks)


@pytest.mark.parametrize("block_size", [7, 33, 64, 999])
def test_blocks_change_nothing_where_scores_nearly_tie(block_size):
    # 400 captions within 1e-6 of each other: the rounding of a block's product would decide their ranks.
    generator = torch.Generator().manual_seed(0)
    clip_ids = torch.arange(400) % 40
    audio = torch.randn(40, 64, generator=generator)[clip_ids]
    text = torch.randn(64, generator=generator) + 1e-6 * torch.randn(400, 64, generator=generator)
    whole = retrieval_ranks(audio, text, clip_ids)
    assert_equal_ranks(retrieval_ranks(audio, text, clip_ids, block_size=block_size), whole)
    order = torch.randperm(400, generator=generator)
    assert_equal_ranks(
        retrieval_ranks(audio[order], text[order], clip_ids[order], block_size=block_size),
        [rows[order] for rows in whole],
    )


@given(st.integers(-40, 40), st.integers(-40, 40))
@settings(max_examples=10, deadline=None)
def test_length_of_the_embeddings_is_immaterial(audio_exponent, text_exponent):
    audio, text, clip_ids = noisy_pairs(num_rows=30, num_clips=8)
    # Powers of two, for others would round the float32 embeddings themselves.
    scaled = retrieval_ranks(audio * 2.0**audio_exponent, text * 2.0**text_exponent, clip_ids)
    assert_equal_ranks(scaled, retrieval_ranks(audio, text, clip_ids))


def test_agrees_with_torchmetrics():
    audio, text, clip_ids = noisy_pairs()
    scores = retrieval_scores(retrieval_ranks(audio, text, clip_ids))
    clips = clip_ids.unique()
    clip_audio = torch.stack([audio[clip_ids == clip][0] for clip in clips])
    similarity = torch.nn.functional.normalize(clip_audio) @ torch.nn.functional.normalize(text).T
    own = clips[:, None] == clip_ids
    for direction, preds, target in (("a2t", similarity, own), ("t2a", similarity.T, own.T)):
        queries = torch.arange(len(preds))[:, None].expand_as(preds)
        for k in (1, 5, 10):
            hit_rate = RetrievalHitRate(top_k=k)(preds, target, indexes=queries)
            assert scores[f"{direction}/recall_at_{k}"] == pytest.approx(hit_rate.item())
    mrr = RetrievalMRR(top_k=10)(similarity.T, own.T, indexes=queries)
    assert scores["t2a/map_at_10"] == pytest.approx(mrr.item())


def test_perfect_embeddings():
    clip_ids = torch.arange(40) % 8
    embeddings = torch.eye(8)[clip_ids]
    scores = retrieval_scores(retrieval_ranks(embeddings, embeddings, clip_ids))
    assert set(as_floats(scores).values()) == {1.0}


def test_collapsed_embeddings_rank_last():
    # 8 clips of 5 captions: 35 captions of others and 7 other clips tie, all ahead.
    clip_ids = torch.arange(40) % 8
    ranks = retrieval_ranks(torch.ones(40, 6), torch.ones(40, 6), clip_ids)
    assert ranks.text_to_audio.tolist() == [8] * 40
    assert ranks.audio_to_text[clip_ids == 3].sort().values.tolist() == [36, 37, 38, 39, 40]
    scores = as_floats(retrieval_scores(ranks))
    assert (scores["a2t/recall_at_10"], scores["t2a/recall_at_5"]) == (0.0, 0.0)
    assert (scores["a2t/median_rank"], scores["t2a/median_rank"]) == (36.0, 8.0)


def test_same_caption_of_another_clip_is_ahead():
    audio = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # both clips are captioned as the first one
    ranks = retrieval_ranks(audio, text, torch.tensor([0, 1]))
    assert ranks.audio_to_text.tolist() == [2, 2]
    assert ranks.text_to_audio.tolist() == [1, 2]


def test_same_caption_of_the_same_clip_is_not_ahead():
    audio, text = torch.eye(2)[[0, 0, 1]], torch.eye(2)[[0, 0, 1]]
    ranks = retrieval_ranks(audio, text, torch.tensor([0, 0, 1]))
    assert ranks.audio_to_text[:2].sort().values.tolist() == [1, 2]
    assert retrieval_scores(ranks)["a2t/map_at_10"] == 1


def test_average_precision_divides_by_all_captions_of_the_clip():
    ranks = RetrievalRanks(
        audio_to_text=torch.tensor([11, 2, 4, 1]),
        text_to_audio=torch.tensor([1, 10, 11, 2]),
        clips=torch.tensor([0, 0, 0, 1]),
    )
    scores = retrieval_scores(ranks)
    assert scores["a2t/map_at_10"] == pytest.approx(((1 / 2 + 2 / 4 + 0) / 3 + 1) / 2)
    assert scores["t2a/map_at_10"] == pytest.approx((1 + 1 / 10 + 0 + 1 / 2) / 4)
    assert (scores["a2t/median_rank"], scores["t2a/median_rank"]) == (1.5, 6.0)


def test_rows_of_a_clip_are_averaged_in_direction():
    text = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.9, 1.0]])
    crops = torch.tensor([[1000.0, 0.0], [0.0, 0.001], [0.9, 1.0]])
    mean = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.9, 1.0]])
    clip_ids = torch.tensor([4, 4, 9])
    assert_equal_ranks(retrieval_ranks(crops, text, clip_ids), retrieval_ranks(mean, text, clip_ids))


@pytest.mark.parametrize("biased", [("audio_bias",), ("text_bias",), ("audio_bias", "text_bias")])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_biases_are_subtracted_from_the_candidates(biased, seed, coarse, gated):
    crop_noise = 0.0 if coarse else 0.4
    audio, text, clip_ids = noisy_pairs(num_rows=60, num_clips=17, crop_noise=crop_noise, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if coarse:  # many ties
        audio, text = audio.sign(), text.sign()
    biases = {name: torch.randn(60, generator=generator) for name in biased}
    if coarse:
        biases = {name: (2 * bias).round() / 4 for name, bias in biases.items()}
    hubs = {}
    if gated:
        hubs = {name.replace("bias", "hubs"): torch.rand(60, generator=generator) < 0.2 for name in biased}
    ranks = retrieval_ranks(audio, text, clip_ids, **biases, **hubs, block_size=13)

    rows, captions = unit(np.asarray(audio, np.float64)), unit(np.asarray(text, np.float64))
    text_bias = np.asarray(biases.get("text_bias", torch.zeros(60)), np.float64)
    audio_bias = np.asarray(biases.get("audio_bias", torch.zeros(60)), np.float64)
    ids = np.asarray(clip_ids)
    clips = np.unique(ids)
    clip_audio = np.stack([unit(rows[ids == clip].mean(axis=0)) for clip in clips])
    clip_bias = np.stack([audio_bias[ids == clip].mean() for clip in clips])
    is_hub = np.asarray(hubs.get("audio_hubs", torch.ones(60)), bool)
    clip_hubs = np.stack([is_hub[ids == clip].any() for clip in clips])
    caption_hubs = np.asarray(hubs.get("text_hubs", torch.ones(60)), bool)

    def calibrated(scores, bias, hubs):
        return scores - bias if hubs[scores > scores.max() - 1e-9].any() else scores

    for row in range(60):
        scores = calibrated(clip_audio @ captions[row], clip_bias, clip_hubs)
        assert [int(ranks.text_to_audio[row])] == positions_of_own(scores, clips == ids[row])
    for clip, query in zip(clips, clip_audio, strict=True):
        expected = positions_of_own(calibrated(captions @ query, text_bias, caption_hubs), ids == clip)
        assert sorted(ranks.audio_to_text[ids == clip].tolist()) == expected


@given(pairs_with_ties(), st.integers(1, 9), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_ranks_with_biases_do_not_depend_on_order_or_blocks(pairs, block_size, random):
    num_rows = len(pairs[0])
    pool = [0.1, 0.1, -0.7, 5.3]
    given = {
        f"{side}_{name}": torch.tensor([random.choice(values) for _ in range(num_rows)])
        for side in ("audio", "text")
        for name, values in (("bias", pool), ("hubs", [False, False, True]))
    }
    ranks = retrieval_ranks(*pairs, **given)
    order = list(range(num_rows))
    random.shuffle(order)
    shuffled = retrieval_ranks(
        *(rows[order] for rows in pairs),
        **{name: values[order] for name, values in given.items()},
        block_size=block_size,
    )
    assert torch.equal(shuffled.text_to_audio, ranks.text_to_audio[order])
    assert retrieval_scores(shuffled) == retrieval_scores(ranks)


def test_a_bias_that_all_candidates_share_changes_nothing():
    pairs = noisy_pairs()
    same = torch.full((90,), 0.25)
    assert_equal_ranks(retrieval_ranks(*pairs, audio_bias=same, text_bias=same), retrieval_ranks(*pairs))


def test_a_bias_moves_a_hub_back():
    audio, text = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.9]])
    ids = torch.tensor([0, 1])
    assert retrieval_ranks(audio, text, ids).text_to_audio.tolist() == [1, 2]
    ranks = retrieval_ranks(audio, text, ids, audio_bias=torch.tensor([0.1, 0.0]))
    assert ranks.text_to_audio.tolist() == [1, 1]
    assert torch.equal(ranks.audio_to_text, retrieval_ranks(audio, text, ids).audio_to_text)


@pytest.mark.parametrize("name", ["audio_bias", "text_bias"])
@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(3), r"shape \(2,\), one number for each row, but got torch.float32 of shape \(3,\)"),
        (torch.zeros(2, dtype=torch.long), r"floating tensor .* but got torch.int64"),
        (torch.tensor([0.0, float("nan")]), "finite, but got NaN or Inf"),
    ],
)
def test_biases_that_do_not_fit(name, bias, message):
    with pytest.raises(ValueError, match=f"Argument `{name}` has to be .*{message}"):
        retrieval_ranks(torch.eye(2), torch.eye(2), torch.arange(2), **{name: bias})


@pytest.mark.parametrize("side", ["audio", "text"])
@pytest.mark.parametrize("hubs", [torch.ones(3, dtype=torch.bool), torch.ones(2)])
def test_hubs_that_do_not_fit(side, hubs):
    bias = {f"{side}_bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=rf"`{side}_hubs` has to be a boolean tensor of shape \(2,\)"):
        retrieval_ranks(torch.eye(2), torch.eye(2), torch.arange(2), **bias, **{f"{side}_hubs": hubs})


def test_hubs_need_their_bias():
    hubs = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"beside `text_bias`, but got torch.bool .* without it"):
        retrieval_ranks(torch.eye(2), torch.eye(2), torch.arange(2), text_hubs=hubs)


def test_a_gate_leaves_a_query_alone_whose_best_hit_is_no_hub():
    audio, text, ids = torch.eye(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]), torch.tensor([0, 1])
    bias = torch.tensor([0.0, 0.5])
    assert retrieval_ranks(audio, text, ids, audio_bias=bias).text_to_audio.tolist() == [1, 2]
    for hubs, expected in (([True, False], [1, 1]), ([False, True], [1, 2])):
        ranks = retrieval_ranks(audio, text, ids, audio_bias=bias, audio_hubs=torch.tensor(hubs))
        assert ranks.text_to_audio.tolist() == expected


def test_zero_embeddings_are_legal_and_last():
    audio, text, clip_ids = torch.eye(3), torch.eye(3), torch.arange(3)
    text[1] = 0
    ranks = retrieval_ranks(audio, text, clip_ids)
    assert ranks.text_to_audio.tolist() == [1, 3, 1]
    assert ranks.audio_to_text.tolist() == [1, 3, 1]


def test_one_row():
    scores = retrieval_scores(retrieval_ranks(torch.ones(1, 2), -torch.ones(1, 2), torch.tensor([5])))
    assert set(as_floats(scores).values()) == {1.0}


def test_reduced_matmul_precision_and_autocast_change_nothing():
    pairs = noisy_pairs(width=128)
    ranks = retrieval_ranks(*pairs)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert_equal_ranks(retrieval_ranks(*pairs), ranks)
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_tensor_is_larger_than_a_block_or_the_embeddings():
    class LargestOutput(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    audio, text, clip_ids = noisy_pairs(num_rows=3000, num_clips=700, width=8)
    bias, hubs = torch.zeros(3000), torch.ones(3000, dtype=torch.bool)
    calibrated = {"audio_bias": bias, "text_bias": bias, "audio_hubs": hubs, "text_hubs": hubs}
    for biases in ({}, calibrated):
        with LargestOutput() as largest:
            retrieval_ranks(audio, text, clip_ids, **biases, block_size=128)
        assert 128 * 128 <= largest.numel <= text.numel()  # 24,000, not 700 × 3000 = 2,100,000


@pytest.mark.parametrize("name", ["audio", "text"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_embeddings_are_counted(name, value):
    rows = {"audio": torch.ones(4, 2), "text": torch.ones(4, 2)}
    rows[name][1:3, 1] = value
    with pytest.raises(ValueError, match=rf"`{name}` has to be finite, but got NaN or Inf in 2 of 4 rows"):
        retrieval_ranks(**rows, clip_ids=torch.arange(4))


@pytest.mark.parametrize(
    ("audio", "text", "clip_ids", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 3), torch.arange(2), r"`audio` .* shape \(2, 3, 4\)\. Pool"),
        (torch.ones(2, 3), torch.ones(2, 3).long(), torch.arange(2), r"`text` .* but got torch\.int64"),
        (
            torch.ones(2, 3),
            torch.ones(4, 3),
            torch.arange(2),
            r"`text` .* \(2, 3\), but got \(4, 3\)\. .* repeat",
        ),
        (
            torch.ones(2, 3),
            torch.ones(2, 3),
            torch.arange(3),
            r"`clip_ids` .* shape \(2,\), .* got .* \(3,\)",
        ),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), r"`clip_ids` has to be integers .*\.float32"),
        (torch.ones(0, 3), torch.ones(0, 3), torch.arange(0), r"`audio` has to have at least one row"),
    ],
)
def test_arguments_that_do_not_fit(audio, text, clip_ids, message):
    with pytest.raises(ValueError, match=f"Argument {message}"):
        retrieval_ranks(audio, text, clip_ids)


def test_block_size_has_to_be_positive():
    with pytest.raises(ValueError, match="`block_size` has to be an integer of at least 1, but got 0"):
        retrieval_ranks(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0]), block_size=0)

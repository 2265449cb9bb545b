"""The scores are those of trec_eval, the reference program of information retrieval."""

import pytest
import torch

from ask_lightning.metrics import AudioTextRetrieval
from tests.helpers.retrieval_reference import noisy_pairs, unit

pytrec_eval = pytest.importorskip("pytrec_eval", reason="pip install pytrec-eval-terrier")


def trec_scores(similarity: torch.Tensor, relevant: torch.Tensor) -> dict[str, float]:
    """The means over the queries, of scores and relevance `(queries, candidates)`."""
    runs, judgements = {}, {}
    for query, (scores, own) in enumerate(zip(similarity.tolist(), relevant.tolist(), strict=True)):
        runs[f"q{query}"] = {f"d{number}": score for number, score in enumerate(scores)}
        judgements[f"q{query}"] = {f"d{number}": int(flag) for number, flag in enumerate(own)}
    wanted = {"success.1,5,10", "map_cut.10"}
    per_query = pytrec_eval.RelevanceEvaluator(judgements, wanted).evaluate(runs).values()
    return {
        name: sum(scores[name] for scores in per_query) / len(runs)
        for name in ("success_1", "success_5", "success_10", "map_cut_10")
    }


@pytest.mark.parametrize("noise", [0.5, 1.5, 30.0])
@pytest.mark.parametrize("num_clips", [23, 60])
def test_both_directions_agree_with_trec_eval(noise, num_clips):
    audio, text, clip_ids = noisy_pairs(noise=noise, num_clips=num_clips)
    metric = AudioTextRetrieval()
    metric.update(audio, text, clip_ids)
    found = {name: float(score) for name, score in metric.compute().items()}

    clips, first = {}, []
    for row, clip in enumerate(clip_ids.tolist()):
        if clip not in clips:
            clips[clip] = len(clips)
            first.append(row)
    assert max(torch.bincount(clip_ids).tolist()) <= 10  # beyond it, own captions do not fit into the cut
    numpy_audio, numpy_text = unit(audio.double().numpy()), unit(text.double().numpy())
    similarity = torch.from_numpy(numpy_text @ numpy_audio[first].T)  # (captions, clips)
    relevant = torch.tensor([clips[clip] for clip in clip_ids.tolist()])[:, None] == torch.arange(len(clips))
    for direction, scores in {
        "t2a": trec_scores(similarity, relevant),
        "a2t": trec_scores(similarity.T, relevant.T),
    }.items():
        for k in (1, 5, 10):
            assert found[f"{direction}/recall_at_{k}"] == pytest.approx(scores[f"success_{k}"], abs=1e-6)
        assert found[f"{direction}/map_at_10"] == pytest.approx(scores["map_cut_10"], abs=1e-6)

"""Values that other implementations gave for the same embeddings, recorded once.

pytorch-metric-learning 2.9.0: `SupConLoss`, `NTXentLoss` and `TripletMarginLoss` on cosine similarity, with
the other modality as `ref_emb`. AuroLA: `hybrid_nce_loss` of the published code, with clips in place of
clusters; it adds 1e-8 to denominators.
"""

import pytest
import torch

from ask_lightning import HardNegativeLoss, NTXentLoss, TripletLoss
from ask_lightning.losses import RetrievalLoss
from tests.helpers.pair_cases import CLIPS

STEPS = torch.arange(40, dtype=torch.float64)
AUDIO, TEXT = torch.sin(STEPS).reshape(8, 5), torch.sin(1.3 * STEPS + 0.4).reshape(8, 5)


@pytest.mark.parametrize(
    ("loss", "term", "expected"),
    [
        (NTXentLoss(0.3), "loss", 2.8733216195288387),
        (NTXentLoss(0.3, positives="same_clip"), "loss", 3.1585415578718408),
        (NTXentLoss(0.3, positives="same_clip"), "contrastive_t2a", 3.81270573199439),
        (NTXentLoss(0.3, positives="same_clip"), "contrastive_a2t", 2.5043773837492913),
        (TripletLoss(0.4, negatives="all", positives="ids"), "loss", 5.674870198839034),
    ],
)
def test_pytorch_metric_learning(loss: RetrievalLoss, term: str, expected: float):
    loss(AUDIO, TEXT, ids=CLIPS)
    assert loss.last[term].item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(
    ("loss", "term", "expected"),
    [
        (HardNegativeLoss(0.3, 0.1), "loss", 3.027655970085461),
        (HardNegativeLoss(0.3, 1.0, positive_weight=0.5), "loss", 3.7184061205646484),
        (HardNegativeLoss(0.3, 0.5, positives="same_clip"), "contrastive_a2t", 1.9846213747052897),
    ],
)
def test_hybrid_nce_of_aurola(loss: RetrievalLoss, term: str, expected: float):
    loss(AUDIO, TEXT, ids=CLIPS)
    assert loss.last[term].item() == pytest.approx(expected, rel=1e-8)

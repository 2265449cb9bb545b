"""A base whose rows all look alike is worth a warning."""

import warnings

import pytest
import torch

from ask_lightning import ASKModule, KnowledgeBase, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.callbacks.refresh_report import mean_similarity
from ask_lightning.losses import KnowledgeDistillationLoss, TripletLoss
from tests.helpers.clients import PlainTowers, make_loader, make_trainer


class Collapsed(PlainTowers):
    """Encoders that say the same of everything, from the second epoch on."""

    def flatten(self, embeddings):
        return embeddings * (self.current_epoch == 0) + torch.ones_like(embeddings)

    def encode_audio(self, batch):
        return self.flatten(super().encode_audio(batch))

    def encode_text(self, batch):
        return self.flatten(super().encode_text(batch))


def collapse_warnings(model, loss=None):
    fit = make_trainer(max_epochs=4, callbacks=[KnowledgeRefreshCallback(T=1, num_prototypes=4)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.fit(ASKModule(model, loss or ReliabilityOTLoss(num_neighbors=3), ids="clip_id"), make_loader())
    return [str(item.message) for item in caught if "collapsed" in str(item.message)]


def test_collapsed_embeddings_are_warned_about():
    (message,) = collapse_warnings(Collapsed())
    assert "mean cosine between source pairs is 1.000 for audio and 1.000 for text" in message
    assert "ReliabilityOTLoss(modulation_gradient=False)" in message


@pytest.mark.parametrize(
    ("loss", "remedy"),
    [
        (ReliabilityOTLoss(num_neighbors=3, modulation_gradient=False), "Try a lower temperature"),
        (ReliabilityOTLoss(num_neighbors=3, lambda_fine=0.0, lambda_coarse=0.0), "Try a lower temperature"),
        (KnowledgeDistillationLoss(), "Try a lower temperature"),
        (TripletLoss(), 'Try TripletLoss(negatives="all")'),
        (TripletLoss(negatives="all"), "Try a lower learning rate"),
    ],
)
def test_what_is_said_against_it_is_of_the_loss_in_use(loss, remedy):
    (message,) = collapse_warnings(Collapsed(), loss)
    assert remedy in message
    assert "reliability factor" not in message
    assert "modulation_gradient" not in message


def test_healthy_embeddings_are_not():
    assert collapse_warnings(PlainTowers()) == []


def test_mean_similarity_is_the_mean_of_all_cosines():
    generator = torch.Generator().manual_seed(0)
    audio, text = torch.randn(2, 40, 6, generator=generator)
    base = KnowledgeBase.from_embeddings(audio, text, num_prototypes=4)
    found = mean_similarity(base)
    torch.testing.assert_close(found["mean_similarity_audio"], (base.fine.audio @ base.fine.audio.T).mean())
    torch.testing.assert_close(found["mean_similarity_text"], (base.fine.text @ base.fine.text.T).mean())

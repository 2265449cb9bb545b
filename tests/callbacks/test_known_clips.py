"""A teacher that knows no clip of an epoch is told."""

import pytest
import torch

from ask_lightning import KnowledgeDistillationLoss, NTXentLoss
from ask_lightning.callbacks.known_clips import KnownClips


@pytest.mark.parametrize(
    ("counts", "is_told"), [((0, 0), True), ((3, 0), False), ((0, 3), False), ((), False)]
)
def test_the_clips_of_all_steps_count(counts, is_told, recwarn):
    clips, term = KnownClips(), torch.zeros(())
    for count in counts:
        clips.add({"known_clips": term.fill_(count)})  # in the memory of the step before
    clips.check(KnowledgeDistillationLoss())
    assert len(recwarn) == is_told


def test_each_epoch_counts_for_itself(recwarn):
    clips, loss = KnownClips(), KnowledgeDistillationLoss()
    for count in (3, 0):
        clips.add({"known_clips": torch.tensor(count)})
        clips.check(loss)
    (told,) = recwarn
    assert "KnowledgeDistillationLoss was trained without a teacher" in str(told.message)


def test_a_loss_without_a_teacher_has_nothing_to_count(recwarn):
    clips = KnownClips()
    clips.add({"loss": torch.zeros(())})
    clips.check(NTXentLoss())
    assert not recwarn

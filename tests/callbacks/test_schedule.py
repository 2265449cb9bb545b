"""Reports after the first, the last and every n-th epoch."""

from types import SimpleNamespace

import pytest

from ask_lightning.callbacks.schedule import is_due_after_epoch


@pytest.mark.parametrize(
    ("max_epochs", "every_n_epochs", "expected"),
    [(7, 3, [1, 3, 6, 7]), (6, 3, [1, 3, 6]), (2, 10, [1, 2]), (3, 1, [1, 2, 3])],
)
def test_first_last_and_every_nth(max_epochs, every_n_epochs, expected):
    trainers = [SimpleNamespace(current_epoch=epoch, max_epochs=max_epochs) for epoch in range(max_epochs)]
    due = [trainer.current_epoch + 1 for trainer in trainers if is_due_after_epoch(trainer, every_n_epochs)]
    assert due == expected

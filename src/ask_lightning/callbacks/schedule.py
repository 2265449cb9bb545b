"""The epochs after which a callback reports on a run."""

import lightning.pytorch as pl


def is_due_after_epoch(trainer: pl.Trainer, every_n_epochs: int) -> bool:
    """Whether to report after the epoch that is ending: the first, the last, and every n-th epoch.

    Args:
        trainer: The running trainer.
        every_n_epochs: Number n of epochs from one report to the next.

    Returns:
        Whether a report is due.
    """
    ended = trainer.current_epoch + 1
    return ended == 1 or ended % every_n_epochs == 0 or ended == trainer.max_epochs

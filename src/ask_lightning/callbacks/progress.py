"""A bar for the refresh on the progress display that the trainer uses."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


@contextmanager
def progress_bar(trainer: pl.Trainer, description: str, total: int | None) -> Iterator[Callable[[], object]]:
    """Show a progress bar while the context lasts, if the trainer shows one itself.

    Args:
        trainer: The running trainer.
        description: Text before the bar.
        total: Number of steps; `None` if it is unknown.

    Yields:
        A function to call after each step.
    """
    display = trainer.progress_bar_callback
    if isinstance(display, RichProgressBar) and display.is_enabled and display.progress is not None:
        progress = display.progress
        # Lightning's rich display takes an unknown number of steps as an infinite one.
        task = progress.add_task(description, total=math.inf if total is None else total)
        try:
            yield lambda: progress.update(task, advance=1, refresh=True)
        finally:
            # Hidden, not removed: Lightning 2.5 uses the number of a task as its index in the list of tasks.
            progress.update(task, visible=False)
    elif isinstance(display, TQDMProgressBar) and display.is_enabled:
        with Tqdm(desc=description, total=total, leave=False, dynamic_ncols=True, file=sys.stdout) as bar:
            yield bar.update
    else:
        yield lambda: None

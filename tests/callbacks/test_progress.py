"""The refresh shows itself on the progress display that the trainer uses."""

import math
import re

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader, IterableDataset

from ask_lightning.callbacks.progress import progress_bar
from tests.helpers.clients import Pairs, PlainTowers, make_loader, make_refresh, make_trainer, wrap

TITLE = "Refreshing knowledge"


def shown(capsys, *callbacks, source=None, **settings) -> str:
    settings = {"enable_progress_bar": bool(callbacks)} | settings
    run = make_trainer(max_epochs=3, callbacks=[make_refresh(2, source), *callbacks], **settings)
    run.fit(wrap(PlainTowers()), make_loader())
    out, err = capsys.readouterr()
    return out + err


def test_tqdm(capsys):
    text = shown(capsys, TQDMProgressBar())
    assert text.count(f"{TITLE}:   0%") == 2
    assert re.search(rf"{TITLE}: .*0/6", text)
    assert "Epoch 2" in text, "the trainer's own bar goes on"


class Stream(IterableDataset):
    def __iter__(self):
        pairs = Pairs(20)
        return (pairs[row] for row in range(20))


def test_tqdm_of_unknown_length(capsys):
    text = shown(capsys, TQDMProgressBar(), source=DataLoader(Stream(), 4))
    assert re.search(rf"{TITLE}: 0it", text)


@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize(("source", "total"), [(None, 6), (DataLoader(Stream(), 4), math.inf)])
def test_rich(capsys, leave, source, total):
    drawn = []

    class Recorded(RichProgressBar):
        """Notes what stands on the display, which a pipe does not show."""

        def _init_progress(self, trainer):
            super()._init_progress(trainer)
            draw = self.progress.update

            def update(task, **values):
                draw(task, **values)
                now = self.progress._tasks[task]
                if TITLE in now.description and now.visible:
                    drawn.append((now.completed, now.total))

            self.progress.update = update

    bar = Recorded(leave=leave)
    text = shown(capsys, bar, source=source)
    steps = 6 if source is None else 5
    assert drawn == [(done + 1, total) for done in range(steps)] * 2
    assert "Epoch" in text, "the trainer's own bar goes on"
    assert not [task for task in bar.progress.tasks if TITLE in task.description and task.visible]


def test_nothing_without_a_display(capsys):
    assert TITLE not in shown(capsys)


def test_disabled_bar(capsys):
    bar = TQDMProgressBar()
    bar.disable()
    assert TITLE not in shown(capsys, bar)


@pytest.mark.parametrize("display", [TQDMProgressBar, RichProgressBar])
def test_bar_is_closed_after_an_error(capsys, display):
    class Sick(Pairs):
        def __getitem__(self, row):
            if row == 9:
                raise ZeroDivisionError
            return super().__getitem__(row)

    bar = display()
    with pytest.raises(ZeroDivisionError):
        shown(capsys, bar, source=Sick(48))
    if display is RichProgressBar:
        assert not [task for task in bar.progress.tasks if TITLE in task.description and task.visible]


def test_advance_without_a_display():
    with progress_bar(make_trainer(), TITLE, 3) as advance:
        assert advance() is None

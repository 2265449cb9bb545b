"""Every kind of knowledge source, read by several ranks, becomes the base that one process makes of it."""

import re
import time

import lightning.pytorch as pl
import pytest
import torch
from run_case import PairData
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler

from ask_lightning import DriftMonitor, InfluenceMonitor
from ask_lightning.distributed import Ranks
from clients import InlineClient, Pairs, PlainTowers, refresh, trainer, wrapped
from ranks import on_ranks


class OwnParts(IterableDataset):
    """Yields each rank every R-th pair, unless told to yield all to each."""

    def __init__(self, size: int, split: bool = True) -> None:
        self.pairs, self.split = Pairs(size), split

    def __iter__(self):
        ranks = Ranks.current() if self.split else Ranks()
        return (self.pairs[row] for row in range(ranks.rank, len(self.pairs), ranks.size))


class Batches(Pairs):
    """Makes batches itself, of different sizes."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: int) -> dict:
        start, end = (0, 3, 10, 11, 25, 31)[number : number + 2]
        return {name: getattr(self, name)[start:end] for name in ("audio", "text", "clip_id")}


class SlowOnOne(Pairs):
    def __getitem__(self, row: int) -> dict:
        if Ranks.current().rank == 1:
            time.sleep(0.02)
        return super().__getitem__(row)


class BrokenOnOne(Pairs):
    def __getitem__(self, row: int) -> dict:
        if Ranks.current().rank == 1:
            raise OSError("clip 3 cannot be read")
        return super().__getitem__(row)


def two_captions(items: list) -> dict:
    """Two pairs for each item."""
    return {
        name: torch.stack([item[name] * factor for item in items for factor in (1, 2)])
        if name != "clip_id"
        else torch.stack([item[name] for item in items for _ in range(2)])
        for name in items[0]
    }


def sources() -> dict:
    return {
        "uneven": Pairs(51),
        "fewer rows than ranks": Pairs(2),
        "one row": Pairs(1),
        "loader with workers": DataLoader(Pairs(31), 4, num_workers=1),
        "two pairs an item": DataLoader(Pairs(31), 4, collate_fn=two_captions),
        "makes its batches": DataLoader(Batches(31), batch_size=None),
        "selected": DataLoader(Pairs(31), 4, sampler=SubsetRandomSampler([3, 20, 7, 11, 30])),
        "subset": Subset(Pairs(31), range(4, 21)),
        "callable": lambda: Pairs(31),
        "slow rank": SlowOnOne(20),
        "own parts": OwnParts(31),
        "same parts": OwnParts(31, split=False),
        "broken on one": BrokenOnOne(31),
        "empty": Pairs(0),
        "list of batches": list(DataLoader(Pairs(12), 4)),
    }


class KeepBase(pl.Callback):
    base = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.base = pl_module.loss.knowledge


def read(size: int, names: tuple[str, ...], **settings) -> dict:
    results = {}
    for name in names:
        pl.seed_everything(1, verbose=False)
        keep = KeepBase()
        size_of_batch = {} if name == "makes its batches" else {"batch_size": 4}
        callback = refresh(source=sources()[name], **size_of_batch)
        run = trainer(
            max_steps=1, devices=size, strategy="ddp" if size > 1 else "auto", callbacks=[callback, keep]
        )
        module = wrapped(
            PlainTowers(), {"num_neighbors": 1, "gather": True, "positives": "ids"}, ids="clip_id", **settings
        )
        try:
            run.fit(module, datamodule=PairData(8))
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
        else:
            base = keep.base
            results[name] = (base.fine.audio, base.fine.text, base.ids, base.coarse.text, base.fingerprint)
    return results


SPECIAL = ("own parts", "same parts", "broken on one", "empty", "list of batches")
GOOD = tuple(name for name in sources() if name not in SPECIAL)


@pytest.mark.parametrize("size", [2, 3])
def test_the_base_is_that_of_one_process(size):
    alone = read(1, GOOD)
    for result in on_ranks(size, read, size, GOOD, grouped=False):
        for name in GOOD:
            assert not isinstance(result[name], str), result[name]
            for got, expected in zip(result[name][:3], alone[name][:3], strict=True):
                torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")
            torch.testing.assert_close(result[name][3], alone[name][3], rtol=1e-4, atol=1e-4)


def test_iterable_source_with_parts_of_its_own():
    (alone,) = read(1, ("own parts",)).values()
    first, second = (result["own parts"] for result in on_ranks(2, read, 2, ("own parts",), grouped=False))
    assert first[4] == second[4]
    rank_by_rank = [*range(0, 31, 2), *range(1, 31, 2)]
    for got, expected in zip(first[:3], alone[:3], strict=True):
        torch.testing.assert_close(got, expected[rank_by_rank])


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("same parts", [r"Ranks 0 and 1 read the same 31 pairs.*get_rank.*map-style Dataset"] * 2),
        ("list of batches", [r"Ranks 0 and 1 read the same 12 pairs"] * 2),
        (
            "broken on one",
            [r"Rank 1 failed while encoding its part .* OSError: clip 3 cannot be read", r"^OSError: clip 3"],
        ),
        ("empty", [r"The knowledge source is empty"] * 2),
    ],
)
def test_errors_reach_every_rank(name, texts):
    results = on_ranks(2, read, 2, (name,), grouped=False)
    for result, text in zip(results, texts, strict=True):
        assert re.search(text, result[name], re.DOTALL), result[name]


class SelectedData(PairData):
    """A training loader whose sampler leaves the validation rows out."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Pairs(48), 4, sampler=SubsetRandomSampler(range(0, 48, 2)))


def rows_known(size: int) -> int:
    keep = KeepBase()
    run = trainer(max_steps=1, devices=size, strategy="ddp", callbacks=[refresh(), keep])
    run.fit(wrapped(PlainTowers()), datamodule=SelectedData(8))
    return len(keep.base.fine)


def test_rows_that_a_sampler_leaves_out_stay_out():
    """Lightning wraps the sampler in one of its own on several ranks."""
    assert on_ranks(2, rows_known, 2, grouped=False) == [24, 24]


def with_monitors(placement: str, size: int = 2) -> dict[str, float]:
    pl.seed_everything(1, verbose=False)
    callbacks = [refresh(T=2, placement=placement), DriftMonitor(16), InfluenceMonitor(2)]
    strategy = "ddp" if size > 1 else "auto"
    run = trainer(max_epochs=2, devices=size, strategy=strategy, callbacks=callbacks)
    run.fit(wrapped(PlainTowers(), {"gather": True}), datamodule=PairData(8))
    return {name: float(value) for name, value in run.callback_metrics.items()}


def test_monitors_on_ranks():
    alone = with_monitors("replicated", size=1)
    replicated, sharded = (
        on_ranks(2, with_monitors, place, grouped=False) for place in ("replicated", "sharded")
    )
    for one, other in zip(replicated, sharded, strict=True):
        for name in ("ask/probe_rdm_audio", "ask/probe_rdm_text", "ask/obi_fine", "ask/obi_coarse"):
            assert one[name] > 0
            assert one[name] == pytest.approx(other[name], rel=1e-4)
            assert one[name] == pytest.approx(alone[name], rel=1e-3)


def idle_parameter(strategy: str, learnable: bool, accumulate: int = 1) -> str:
    model = InlineClient()
    options = {"temperature": lambda: 1 / model.logit_scale.exp()} if learnable else {}
    run = trainer(
        max_steps=3,
        devices=2,
        strategy=strategy,
        callbacks=[refresh()],
        accumulate_grad_batches=accumulate,
    )
    try:
        run.fit(wrapped(model, options), datamodule=PairData(8))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_parameter_without_gradient_is_named(accumulate):
    for message in on_ranks(2, idle_parameter, "ddp", False, accumulate, grouped=False):
        assert re.search(
            r"model.logit_scale got no gradient.*temperature=.*ddp_find_unused_parameters_true", message
        )


def test_a_temperature_in_use_has_a_gradient():
    assert on_ranks(2, idle_parameter, "ddp", True, grouped=False) == ["", ""]
    assert on_ranks(2, idle_parameter, "ddp_find_unused_parameters_true", False, grouped=False) == ["", ""]

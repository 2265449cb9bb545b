"""Every kind of knowledge source, read by several ranks, becomes the base that one process makes of it."""

import os
import re
import signal
import time
from datetime import timedelta
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler

from ask_lightning import DriftMonitor, InfluenceMonitor
from ask_lightning.knowledge.pairs import StoredPairs
from ask_lightning.knowledge.prototypes import build_prototypes
from ask_lightning.utilities.distributed import Ranks
from tests.helpers.clients import InlineClient, Pairs, PlainTowers, make_refresh, make_trainer, wrap
from tests.helpers.distributed_run import PairData
from tests.helpers.ranks import on_ranks


class OwnParts(IterableDataset):
    """Yields each rank every R-th pair, unless told to yield all to each."""

    def __init__(self, size: int, split: bool = True, **settings) -> None:
        self.pairs, self.split = Pairs(size, **settings), split

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


class Rows(Pairs):
    """Items of several rows each, one number after the other."""

    def __init__(self, size: int, *counts: int, **settings) -> None:
        super().__init__(size, **settings)
        self.counts = counts

    def __getitem__(self, row: int) -> dict:
        factors = torch.arange(1, 1 + self.counts[row % len(self.counts)])
        item = super().__getitem__(row)
        return {
            "audio": item["audio"] * factors[:, None],
            "text": item["text"] * factors[:, None],
            "clip_id": item["clip_id"].expand(len(factors)),
        }


def joined(items: list[dict]) -> dict:
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}


class BrokenOnOne(Pairs):
    def __getitem__(self, row: int) -> dict:
        if Ranks.current().rank == 1:
            raise OSError("clip 3 cannot be read")
        return super().__getitem__(row)


class AlikeTowers(PlainTowers):
    """Projections that start from zeros."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.audio_encoder.weight)
        nn.init.zeros_(self.text_encoder.weight)


def sources() -> dict:
    return {
        "uneven": Pairs(51),
        "fewer rows than ranks": Pairs(2),
        "one row": Pairs(1),
        "loader with workers": DataLoader(Pairs(31), 4, num_workers=1),
        "two pairs an item": DataLoader(Rows(31, 2), 4, collate_fn=joined),
        "makes its batches": DataLoader(Batches(31), batch_size=None),
        "selected": DataLoader(Pairs(31), 4, sampler=SubsetRandomSampler([3, 20, 7, 11, 30])),
        "subset": Subset(Pairs(31), range(4, 21)),
        "callable": lambda: Pairs(31),
        "own parts": OwnParts(31),
        "captions of a clip on both ranks": OwnParts(32, captions_per_clip=2),
        "all alike": OwnParts(32, captions_per_clip=2),
        "rows vary": DataLoader(Rows(4, 3, 2, 1, 2), 4, collate_fn=joined),
        "rows of one clip vary": DataLoader(Rows(4, 3, 2, 1, 2, captions_per_clip=4), 1, collate_fn=joined),
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
        keep, source = KeepBase(), sources()[name]
        callback = make_refresh(source=source, batch_size=None if isinstance(source, DataLoader) else 4)
        run = make_trainer(
            max_steps=1, devices=size, strategy="ddp" if size > 1 else "auto", callbacks=[callback, keep]
        )
        module = wrap(
            AlikeTowers() if name == "all alike" else PlainTowers(),
            {"num_neighbors": 1, "gather": True, "positives": "ids"},
            ids="clip_id",
            **settings,
        )
        try:
            run.fit(module, datamodule=PairData(8))
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
        else:
            base = keep.base
            results[name] = (base.fine.audio, base.fine.text, base.ids, base.coarse.text, base.fingerprint)
    return results


FOLLOWING = {
    "own parts": [*range(0, 31, 2), *range(1, 31, 2)],
    "captions of a clip on both ranks": [*range(0, 32, 2), *range(1, 32, 2)],
    "all alike": [*range(0, 32, 2), *range(1, 32, 2)],
    "rows vary": [0, 1, 2, 5, 3, 4, 6, 7],
    "rows of one clip vary": [0, 1, 2, 5, 3, 4, 6, 7],
}
WRONG = {
    "same parts": [r"Ranks 0 and 1 read the same 31 pairs.*get_rank.*map-style Dataset"] * 2,
    "list of batches": [r"Ranks 0 and 1 read the same 12 pairs"] * 2,
    "broken on one": [
        r"Rank 1 failed while encoding its part .* OSError: clip 3 cannot be read",
        r"^OSError: clip 3",
    ],
    "empty": [r"The knowledge source is empty"] * 2,
}
GOOD = tuple(name for name in sources() if name not in {*FOLLOWING, *WRONG})


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_base_is_that_of_one_process(size):
    alone = read(1, GOOD)
    for result in on_ranks(size, read, size, GOOD, grouped=False):
        for name in GOOD:
            assert not isinstance(result[name], str), result[name]
            for got, expected in zip(result[name][:3], alone[name][:3], strict=True):
                torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")
            torch.testing.assert_close(result[name][3], alone[name][3], rtol=1e-4, atol=1e-4)


def test_ranks_follow_each_other():
    """Where they bring rows of their own number, or items are of different numbers of rows."""
    names = tuple(FOLLOWING)
    alone = read(1, names)
    first, second = on_ranks(2, read, 2, names, grouped=False)
    for name, order in FOLLOWING.items():
        assert not isinstance(first[name], str), first[name]
        assert first[name][4] == second[name][4]
        for got, expected in zip(first[name][:3], alone[name][:3], strict=True):
            torch.testing.assert_close(got, expected[order], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", WRONG)
def test_errors_reach_every_rank(name):
    results = on_ranks(2, read, 2, (name,), grouped=False)
    for result, text in zip(results, WRONG[name], strict=True):
        assert re.search(text, result[name], re.DOTALL), result[name]


class Spoiled(Pairs):
    """A source of which rank 1 cannot read or encode its part in the second epoch."""

    def __init__(self, size: int, kind: str) -> None:
        super().__init__(size)
        self.kind = kind
        self.is_spoiled = False

    def __getitem__(self, row: int) -> dict:
        item = super().__getitem__(row)
        if self.is_spoiled and self.kind == "broken":
            raise OSError("clip 3 cannot be read")
        return item | {"audio": item["audio"] * torch.nan} if self.is_spoiled else item


class Spoil(pl.Callback):
    def __init__(self, source: Spoiled) -> None:
        self.source = source
        self.fingerprints: list[str] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 1:
            self.fingerprints.append(pl_module.loss.knowledge.fingerprint)
            self.source.is_spoiled = trainer.global_rank == 1


def spoiled_second_refresh() -> dict[str, tuple[str, list[str]]]:
    """For each kind the error, and the knowledge in use before and after."""
    results = {}
    for kind in ("broken", "nan"):
        source = Spoiled(20, kind)
        spoil, module = Spoil(source), wrap(PlainTowers())
        run = make_trainer(devices=2, strategy="ddp", callbacks=[spoil, make_refresh(1, source)])
        try:
            run.fit(module, datamodule=PairData(8))
        except (OSError, RuntimeError, ValueError) as error:
            results[kind] = str(error), [*spoil.fingerprints, module.loss.knowledge.fingerprint]
    return results


def test_the_old_knowledge_stays_in_use_on_every_rank():
    first, second = on_ranks(2, spoiled_second_refresh, grouped=False)
    for kind in ("broken", "nan"):
        (before, after), others = first[kind][1], second[kind][1]
        assert [before, after] == others
        assert before == after
    assert re.search(r"Rank 1 failed .* clip 3 cannot be read", first["broken"][0])
    assert second["broken"][0] == "clip 3 cannot be read"
    assert first["nan"] == second["nan"]
    assert re.search(r"audio embeddings of 10 of 20 source rows .* \(rows 1, 3, 5", first["nan"][0])


class SlowOnOne(Pairs):
    def __getitem__(self, row: int) -> dict:
        if row == 1:  # which rank 1 reads
            time.sleep(5)
        return super().__getitem__(row)


def slowly_opened() -> SlowOnOne:
    time.sleep(5 * Ranks.current().rank)
    return SlowOnOne(20)


def outlast() -> int:
    strategy = DDPStrategy(timeout=timedelta(seconds=3))
    run = make_trainer(
        max_steps=1, devices=2, strategy=strategy, callbacks=[make_refresh(source=slowly_opened)]
    )
    module = wrap(PlainTowers())
    run.fit(module, datamodule=PairData(8))
    return len(module.loss.knowledge.fine)


@pytest.mark.slow
def test_a_slow_rank_is_waited_for():
    """Longer than collectives wait, while it opens the source and while it reads it."""
    assert on_ranks(2, outlast, grouped=False) == [20, 20]


class KilledOnOne(Pairs):
    def __getitem__(self, row: int) -> dict:
        if row == 1:  # which rank 1 reads
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(row)


def read_to_death() -> None:
    run = make_trainer(
        max_steps=1, devices=2, strategy="ddp", callbacks=[make_refresh(source=KilledOnOne(20))]
    )
    run.fit(wrap(PlainTowers()), datamodule=PairData(8))


def test_a_killed_rank_is_noticed_in_a_refresh():
    noticed = r"rank 0:\n.*in all_gather_object\n.*(Connection|closed|reset).*rank 1:\nended without a word"
    with pytest.raises(AssertionError, match=f"(?s){noticed}"):
        on_ranks(2, read_to_death, grouped=False)


class MoveOne(pl.Callback):
    """Rank 1 goes on with another weight than rank 0."""

    def on_train_start(self, trainer, pl_module) -> None:
        with torch.no_grad():
            pl_module.model.audio_encoder.weight[0, 0] += trainer.global_rank


def moved_prototypes(*arguments, **settings) -> StoredPairs:
    prototypes = build_prototypes(*arguments, **settings)
    prototypes.audio[0, 0] += Ranks.current().rank
    return prototypes


def disagree() -> list[str]:
    """What ranks are told that have other weights, sources of other lengths, other prototypes."""
    errors = []
    for name in ("weights", "length", "prototypes"):
        source = Pairs(20 + (Ranks.current().rank if name == "length" else 0))
        callbacks = [make_refresh(source=source), *([MoveOne()] if name == "weights" else [])]
        run = make_trainer(max_steps=1, devices=2, strategy="ddp", callbacks=callbacks)
        build = moved_prototypes if name == "prototypes" else build_prototypes
        with mock.patch("ask_lightning.knowledge.base.build_prototypes", build):
            try:
                run.fit(wrap(PlainTowers()), datamodule=PairData(8))
            except RuntimeError as error:
                errors.append(str(error))
            else:
                errors.append("")
    return errors


def test_ranks_that_disagree_are_told_so():
    first, second = on_ranks(2, disagree, grouped=False)
    assert first == second
    own = r"the weights and the length of the knowledge source \(rank 0: \('weights (\w+)', 20\)"
    expected = [
        rf"{own}, rank 1: \('weights (?!\1)\w+', 20\)",
        rf"{own}, rank 1: \('weights \1', 21\)",
        r"the knowledge base \(rank 0: (\w+), rank 1: (?!\1)\w+\)",
    ]
    for error, about in zip(first, expected, strict=True):
        assert re.search(f"The ranks do not agree about {about}", error), error


class DividedData(PairData):
    """A training set of which each rank has loaded its own part."""

    def __init__(self, *, as_subset: bool) -> None:
        super().__init__(8)
        self.as_subset = as_subset

    def train_dataloader(self) -> DataLoader:
        rows = range(self.trainer.global_rank, 48, 2)
        part = Subset(Pairs(48), rows)
        return DataLoader(part if self.as_subset else [part[row] for row in range(24)], 4, shuffle=True)


def divided(as_subset: bool) -> str:
    run = make_trainer(
        max_steps=1, devices=2, strategy="ddp", callbacks=[make_refresh()], use_distributed_sampler=False
    )
    module = wrap(PlainTowers(), ids=None if as_subset else "clip_id")
    with pytest.raises(RuntimeError) as error:
        run.fit(module, datamodule=DividedData(as_subset=as_subset))
    return str(error.value)


@pytest.mark.parametrize("as_subset", [True, False])
def test_a_training_set_that_is_divided_already_is_refused(as_subset):
    """The refresh would divide it once more, and half of the pairs would be in no knowledge."""
    for error in on_ranks(2, divided, as_subset, grouped=False):
        assert "Each rank has rows of its own" in error
        assert as_subset or "rank 0: [0, 46], rank 1: [1, 47]" in error


class SelectedData(PairData):
    """A training loader whose sampler leaves the validation rows out."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Pairs(48), 4, sampler=SubsetRandomSampler(range(0, 48, 2)))


def rows_known(size: int) -> int:
    keep = KeepBase()
    run = make_trainer(max_steps=1, devices=size, strategy="ddp", callbacks=[make_refresh(), keep])
    run.fit(wrap(PlainTowers()), datamodule=SelectedData(8))
    return len(keep.base.fine)


def test_rows_that_a_sampler_leaves_out_stay_out():
    """Lightning wraps the sampler in one of its own on several ranks."""
    assert on_ranks(2, rows_known, 2, grouped=False) == [24, 24]


def with_monitors(placement: str, size: int = 2) -> dict[str, float]:
    pl.seed_everything(1, verbose=False)
    callbacks = [make_refresh(T=2, placement=placement), DriftMonitor(16), InfluenceMonitor(2)]
    strategy = "ddp" if size > 1 else "auto"
    run = make_trainer(max_epochs=2, devices=size, strategy=strategy, callbacks=callbacks)
    run.fit(wrap(PlainTowers(), {"gather": True}), datamodule=PairData(8))
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
    options = {"temperature": lambda model: 1 / model.logit_scale.exp()} if learnable else {}
    run = make_trainer(
        max_steps=3,
        devices=2,
        strategy=strategy,
        callbacks=[make_refresh()],
        accumulate_grad_batches=accumulate,
    )
    try:
        run.fit(wrap(model, options), datamodule=PairData(8))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_parameter_without_gradient_is_named(accumulate):
    for message in on_ranks(2, idle_parameter, "ddp", False, accumulate, grouped=False):
        assert re.search(
            r"logit_scale got no gradient.*temperature=.*ddp_find_unused_parameters_true", message
        )


def test_a_temperature_in_use_has_a_gradient():
    assert on_ranks(2, idle_parameter, "ddp", True, grouped=False) == ["", ""]
    assert on_ranks(2, idle_parameter, "ddp_find_unused_parameters_true", False, grouped=False) == ["", ""]

"""`write_back=True`: the embeddings of a step replace the stored ones of its rows."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from ask_lightning import (
    ASKModule,
    KnowledgeBase,
    KnowledgeDistillationLoss,
    KnowledgeRefreshCallback,
    ReliabilityOTLoss,
)
from ask_lightning.callbacks.auto_period import AutoPeriod
from ask_lightning.callbacks.step_embeddings import StepRecorder
from ask_lightning.encoding.target import Target
from ask_lightning.functional import unit_length
from ask_lightning.knowledge.snapshot_file import find_snapshot
from tests.helpers.clients import (
    EpochSeededSampler,
    Pairs,
    PlainTowers,
    SelfContained,
    make_loader,
    make_trainer,
)
from tests.helpers.distributed_run import PairData
from tests.helpers.interrupted_run import Stop, Stopped
from tests.helpers.ranks import on_ranks
from tests.helpers.renewal_run import PAIRS, assert_goes_on, fit, logged


class EachStep(pl.Callback):
    """Compares the base after each step with what the step has embedded."""

    def __init__(self) -> None:
        self.seen = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.before = pl_module.loss.knowledge.fine.audio.clone()
        with torch.no_grad():
            self.fresh = [
                unit_length(side) for side in (pl_module.encode_audio(batch), pl_module.encode_text(batch))
            ]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        base, rows = pl_module.loss.knowledge, batch["clip_id"]
        for stored, fresh in zip((base.fine.audio, base.fine.text), self.fresh, strict=True):
            torch.testing.assert_close(stored[rows], fresh, atol=1e-6, rtol=0)
        others = torch.ones(PAIRS, dtype=torch.bool)
        others[rows] = False
        assert torch.equal(base.fine.audio[others], self.before[others])
        assert not base.fine.audio.requires_grad
        self.seen += 1


@pytest.fixture(name="whole", scope="module")
def whole_fixture():
    return fit(T=4, write_back=True, epochs=6)


def test_each_step_stores_its_rows_and_no_others():
    each = EachStep()
    run = fit(T=9, write_back=True, epochs=2, extra=(each,))
    assert each.seen == 12
    assert torch.equal(run["prototypes"][0], run["prototypes"][1]), "prototypes wait for the next refresh"


def test_prototypes_are_renewed_at_the_refresh(whole):
    prototypes = whole["prototypes"]
    assert torch.equal(prototypes[0], prototypes[3])
    assert not torch.equal(prototypes[3], prototypes[4])
    torch.testing.assert_close(whole["stored"][4], whole["fresh"][4], atol=1e-6, rtol=0)


def test_ages_count_from_the_last_step_that_saw_the_row(whole):
    assert logged(whole, "ask/row_age_max") == [0, 1, 1, 1, 0, 1]
    assert logged(whole, "ask/row_age_mean") == [0, 1, 1, 1, 0, 1]


def test_the_loss_is_that_of_the_new_rows(whole):
    assert len(set(whole["knowledge"])) == 36, "another base after each step"
    assert whole["losses"][:6] != fit(T=4, epochs=1)["losses"]


@pytest.mark.parametrize("loss", ["published", "teacher"])
def test_resumed_exactly(loss, tmp_path):
    def run(name, **options):
        objective = (
            KnowledgeDistillationLoss(temperature=0.2, gather=True)
            if loss == "teacher"
            else ReliabilityOTLoss(num_neighbors=4)
        )
        return fit(1, tmp_path / name, T=4, write_back=True, epochs=4, loss=objective, **options)

    whole = run("whole")
    with pytest.raises(Stopped):
        run("one", extra=(Stop(2),))
    resumed = run("two", resume=tmp_path / "one" / "last.ckpt")
    assert_goes_on(resumed, whole, 2)
    assert logged(resumed, "ask/row_age_max") == [1, 1]


def test_an_option_that_is_switched_on_at_a_resume(tmp_path):
    fit(1, tmp_path / "one", T=9, epochs=2)
    resumed = fit(1, tmp_path / "two", T=9, epochs=4, write_back=True, resume=tmp_path / "one" / "last.ckpt")
    assert logged(resumed, "ask/row_age_max") == [2, 1]
    again = fit(1, tmp_path / "three", T=9, epochs=5, resume=tmp_path / "two" / "last.ckpt")
    assert logged(again, "ask/row_age_max") == []


def test_together_with_a_rolling_refresh():
    run = fit(T=3, mode="rolling", write_back=True, epochs=3)
    assert logged(run, "ask/row_age_max") == [0, 1, 1]
    assert logged(run, "ask/row_age_mean") == pytest.approx([0, 2 / 3, 2 / 3])


def test_a_checkpoint_inside_an_epoch_holds_the_rows_of_its_step(tmp_path):
    often = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    run = fit(1, tmp_path / "other", T=9, write_back=True, epochs=2, extra=(often,))
    states = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*.ckpt"))]
    found = {state["global_step"]: state["callbacks"]["KnowledgeRefreshCallback"] for state in states}
    assert {step: state["fingerprint"] for step, state in found.items()} == {
        step: run["knowledge"][step - 1] for step in (4, 8, 12)
    }
    assert found[4]["encoded_at"].tolist() == [0] * PAIRS
    assert found[8]["encoded_at"].sum() == 16, "two batches of eight in the second epoch"


class SaveAt(pl.Callback):
    """Writes a checkpoint at the end of a step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 2):
            trainer.save_checkpoint(self.path)


def states_before_and_after(size: int, directory: Path, options: dict) -> list[dict]:
    """What checkpoints hold that callbacks before and behind the refresh write at the end of a step."""
    paths = directory / "before.ckpt", directory / "after.ckpt"
    first, last = map(SaveAt, paths)
    refresh = KnowledgeRefreshCallback(num_prototypes=6, **options)
    run = make_trainer(
        max_epochs=2,
        devices=size,
        strategy="ddp" if size > 1 else "auto",
        callbacks=[first, refresh, last],
        default_root_dir=directory,
    )
    module = ASKModule(PlainTowers(), ReliabilityOTLoss(num_neighbors=4, gather=True), ids="clip_id")
    run.fit(module, datamodule=PairData(8))
    return [torch.load(path, weights_only=True)["callbacks"]["KnowledgeRefreshCallback"] for path in paths]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (1, {"T": 9, "write_back": True}),
        (1, {"T": AutoPeriod(max_share=1.0)}),
        pytest.param(2, {"T": 9, "write_back": True, "placement": "sharded"}, marks=pytest.mark.slow),
    ],
)
def test_a_callback_that_saves_before_this_one_has_seen_the_step(size, options, tmp_path):
    if size == 1:
        before, after = states_before_and_after(size, tmp_path, options)
    else:
        before, after = on_ranks(size, states_before_and_after, size, tmp_path, options, grouped=False)[0]
    for state in (before, after):
        if state["schedule"]:
            del state["schedule"]["budget"]  # seconds
    before, after = (tree_map_only(torch.Tensor, torch.Tensor.tolist, state) for state in (before, after))
    assert before == after
    assert find_snapshot(Path(before["snapshot"]))


def test_the_checkpoint_of_an_error_before_this_callback_has_seen_the_step(tmp_path):
    often = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit(1, tmp_path / "other", T=9, write_back=True, epochs=2, extra=(often,))
    keep = OnExceptionCheckpoint(tmp_path, "error")
    refresh = KnowledgeRefreshCallback(9, num_prototypes=6, write_back=True)
    pl.seed_everything(1, verbose=False)
    run = make_trainer(max_epochs=2, callbacks=[Stop(1, 2), refresh, keep], enable_checkpointing=True)
    with pytest.raises(Stopped):
        run.fit(
            ASKModule(PlainTowers(), ReliabilityOTLoss(num_neighbors=4), ids="clip_id"),
            datamodule=PairData(8),
        )
    state = torch.load(tmp_path / "error.ckpt", weights_only=True)
    assert state["global_step"] == 9
    assert state["callbacks"]["KnowledgeRefreshCallback"]["fingerprint"] == whole["knowledge"][8]


class Several(pl.LightningDataModule):
    """Four captions a clip."""

    def train_dataloader(self):
        pairs = Pairs(PAIRS, captions_per_clip=4)
        return DataLoader(pairs, 8, sampler=EpochSeededSampler(PAIRS), drop_last=True)


SEVERAL = rf"\(write_back=True\).* {PAIRS // 4} of the {PAIRS // 4} clips .* several pairs, up to 4"


def test_captions_of_one_clip_are_not_told_apart():
    with pytest.raises(RuntimeError, match=SEVERAL):
        fit(T=9, write_back=True, epochs=2, data=Several())


def test_captions_of_one_clip_are_not_told_apart_after_a_resume(tmp_path):
    fit(1, tmp_path / "one", T=9, epochs=1, data=Several())
    resume = tmp_path / "one" / "last.ckpt"
    with pytest.raises(RuntimeError, match=SEVERAL):
        fit(1, tmp_path / "two", T=9, epochs=2, write_back=True, data=Several(), resume=resume)


def test_embeddings_that_overflow_are_not_stored():
    loss = KnowledgeDistillationLoss(temperature=0.2)
    recorder = StepRecorder(Target(loss, embed=lambda batch: ()), "")
    audio, text = torch.eye(3), torch.eye(3)
    audio[1] = torch.inf
    loss.train()
    recorder._record(loss, (audio, text), {"ids": [4, 5, 6]}, torch.zeros(()))
    step = recorder.take(KnowledgeBase.from_embeddings(text, text, num_prototypes=1), None)
    assert step.ids.tolist() == [4, 6]
    recorder.remove()


def test_hook_is_gone_after_the_run():
    loss = ReliabilityOTLoss(num_neighbors=4)
    fit(T=9, write_back=True, epochs=1, loss=loss)
    assert not loss._forward_hooks
    with pytest.raises(Stopped):
        fit(T=9, write_back=True, epochs=1, loss=loss, extra=(Stop(0),))
    assert not loss._forward_hooks


def test_a_module_without_the_wrapper():
    class WithIds(SelfContained):
        def training_step(self, batch, batch_idx):
            audio, text = self.encode_audio(batch), self.encode_text(batch)
            return self.objective(audio, text, ids=batch["clip_id"])

        def encode_ids(self, batch):
            return batch["clip_id"]

    module = WithIds(exclude_self=True)
    refresh = KnowledgeRefreshCallback(9, num_prototypes=6, write_back=True)
    make_trainer(max_epochs=2, callbacks=[refresh]).fit(module, make_loader())
    assert refresh.state_dict()["encoded_at"].tolist() == [1] * PAIRS


def two_ranks(placement: str, directory) -> dict:
    loss = KnowledgeDistillationLoss(temperature=0.2, gather=True)
    return fit(2, directory, T=9, write_back=True, epochs=2, placement=placement, loss=loss)


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_on_two_ranks_as_on_one(placement):
    one, other = on_ranks(2, two_ranks, placement, None, grouped=False)
    loss = KnowledgeDistillationLoss(temperature=0.2, gather=True)
    alone = fit(T=9, write_back=True, epochs=2, loss=loss)
    assert one["knowledge"] == other["knowledge"], "replicas stay equal, to the bit"
    assert len(set(one["knowledge"])) == 12
    for run in (one, other):
        torch.testing.assert_close(run["stored"][1], alone["stored"][1], atol=1e-4, rtol=0)
    assert logged(one, "ask/row_age_max") == [0, 1]


def test_without_ids():
    with pytest.raises(RuntimeError, match=r"write_back=True\) finds the rows of a batch by their clip ids"):
        fit(T=9, write_back=True, epochs=1, ids=None)


def test_a_source_without_the_clips_of_the_batches():
    class Elsewhere(Pairs):
        def __init__(self):
            super().__init__(PAIRS)
            self.clip_id = self.clip_id + 1000

    with pytest.raises(RuntimeError, match=r"the knowledge has none of them\. Leave `source` out"):
        fit(T=9, write_back=True, epochs=1, source=Elsewhere())


def test_training_clips_beside_another_source():
    loss = ReliabilityOTLoss(num_neighbors=4, distillation_weight=0.5, modulation_gradient=False)
    with pytest.raises(RuntimeError, match=r"write_back=True.*renews rows of the source.*learns from the"):
        fit(T=9, write_back=True, epochs=1, source=Pairs(20, seed=3), loss=loss)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"momentum": 0.5}, "`momentum` and `write_back=True` exclude each other"),
        ({"refine": "graph"}, "`refine` and `write_back=True` exclude each other"),
        ({"T": "auto"}, '`T="auto"` and `write_back=True` exclude each other'),
        ({"index": "IVF8,Flat"}, '`index` has to be "auto" or "exact" with write_back=True.*IVF8,Flat'),
    ],
)
def test_nonsense_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        KnowledgeRefreshCallback(**options, write_back=True)


@pytest.mark.parametrize("name", ["momentum", "refine"])
def test_a_partial_refresh_stores_rows_as_they_are(name):
    value = {"momentum": 0.5, "refine": "graph"}[name]
    with pytest.raises(ValueError, match=f'`{name}` and `mode="rolling"` exclude each other'):
        KnowledgeRefreshCallback(mode="rolling", **{name: value})


def test_dropout_and_norm_of_the_step_are_stored():
    """What is stored is the step's own embedding, not that of evaluation mode."""

    class Dropped(PlainTowers):
        def __init__(self):
            super().__init__(0.0)
            self.dropout = nn.Dropout(0.5)

        def encode_audio(self, batch):
            return self.audio_encoder(self.dropout(batch["audio"]))

    run = fit(T=9, write_back=True, epochs=2, model=Dropped())
    assert (run["stored"][1] - run["stored"][0]).abs().amax(dim=1).min() > 1e-3

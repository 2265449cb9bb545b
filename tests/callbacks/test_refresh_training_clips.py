"""A loss whose teacher is the knowledge finds the training clips there, whatever the source is."""

import re
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils.data import DataLoader, IterableDataset

from ask_lightning import (
    ASKModule,
    InfluenceMonitor,
    KnowledgeBase,
    KnowledgeDistillationLoss,
    KnowledgeRefreshCallback,
    ReliabilityOTLoss,
)
from ask_lightning.callbacks import QueryTable
from ask_lightning.functional import unit_length
from ask_lightning.knowledge.refinement import GraphRefinement
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.losses import RetrievalLoss
from tests.helpers.clients import Pairs, PlainTowers, Watcher, make_loader, make_trainer

TRAINING = 48


def ask_with_teacher() -> ReliabilityOTLoss:
    return ReliabilityOTLoss(num_neighbors=4, distillation_weight=0.5, modulation_gradient=False)


class Kept(pl.Callback):
    """The bases of a run, the encoders' own embeddings when each was made, and what the steps logged."""

    def __init__(self) -> None:
        self.bases, self.fresh, self.unknown = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        base = pl_module.loss.knowledge
        if not self.bases or base is not self.bases[-1]:
            self.bases.append(base)
            pairs = Pairs(TRAINING)
            with torch.no_grad():
                batch = {"audio": pairs.audio, "text": pairs.text}
                audio, text = pl_module.model.encode_audio(batch), pl_module.model.encode_text(batch)
            self.fresh.append((unit_length(audio), unit_length(text)))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.unknown.append(int(pl_module.loss.last["unknown_clips"]))


def fit(loss=None, epochs=2, callbacks=(), model=None, T=1, **settings) -> tuple[Kept, ASKModule]:
    kept = Kept()
    pl.seed_everything(0, verbose=False)
    module = ASKModule(
        model or PlainTowers(), loss or KnowledgeDistillationLoss(temperature=0.2), ids="clip_id"
    )
    refresh = KnowledgeRefreshCallback(T, **({"num_prototypes": 6} | settings))
    run = make_trainer(max_epochs=epochs, callbacks=[refresh, kept, *callbacks])
    run.fit(module, make_loader(TRAINING))
    return kept, module


def test_the_training_set_is_its_own_teacher():
    kept, _ = fit()
    assert len(kept.bases) == 2
    assert kept.unknown == [0] * 12
    for base, (audio, text) in zip(kept.bases, kept.fresh, strict=True):
        assert base.training_clips is None
        found = base.find_clips(torch.arange(TRAINING))
        torch.testing.assert_close(found.audio, audio)
        torch.testing.assert_close(found.text, text)


def test_a_limit_of_the_source_is_none_of_the_training_clips():
    kept, _ = fit(ask_with_teacher(), source=Pairs(40, seed=7), max_rows=20)
    assert [len(base.fine) for base in kept.bases] == [20, 20]
    assert kept.unknown == [0] * 12


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_beside_another_source_the_training_clips_are_encoded_too(momentum):
    kept, _ = fit(ask_with_teacher(), source=Pairs(20, seed=7), momentum=momentum)
    assert [len(base.fine) for base in kept.bases] == [20, 20]
    assert kept.unknown == [0] * 12
    first, second = (base.find_clips(torch.arange(TRAINING)) for base in kept.bases)
    torch.testing.assert_close(first.audio, kept.fresh[0][0])
    expected = unit_length(momentum * first.text + (1 - momentum) * kept.fresh[1][1])
    torch.testing.assert_close(second.text, expected)


@pytest.mark.parametrize("options", [{}, {"mode": "rolling"}, {"write_back": True}])
def test_the_source_of_a_teacher_holds_the_training_clips(options):
    """Here without augmentation, which the training data have."""
    kept, _ = fit(source=Pairs(TRAINING), **options)
    assert all(base.training_clips is None for base in kept.bases)
    assert kept.unknown == [0] * 12
    lacking, _ = fit(source=Pairs(TRAINING - 8))
    assert sum(lacking.unknown) == 2 * 8


def test_the_published_loss_does_not_ask_for_them():
    module = ASKModule(PlainTowers(), ReliabilityOTLoss(num_neighbors=4), ids="clip_id")
    refresh = KnowledgeRefreshCallback(1, Pairs(20, seed=7), num_prototypes=6)
    make_trainer(max_epochs=1, callbacks=[refresh]).fit(module, make_loader(TRAINING))
    assert module.loss.knowledge.training_clips is None


def test_the_published_loss_with_a_teacher_trains():
    kept, _ = fit(ask_with_teacher(), source=Pairs(20, seed=7), callbacks=[InfluenceMonitor(2)])
    assert kept.unknown == [0] * 12


def test_clips_that_the_knowledge_lacks_are_counted():
    loss = KnowledgeDistillationLoss(temperature=0.2)
    module = ASKModule(PlainTowers(), loss, ids=lambda model, batch: batch["clip_id"] + 24)
    kept = Kept()
    # Clips 24 … 71 are asked for; the base was made by hand of clips 0 … 47.
    pairs = Pairs(TRAINING)
    with torch.no_grad():
        batch = {"audio": pairs.audio, "text": pairs.text}
        audio, text = module.model.encode_audio(batch), module.model.encode_text(batch)
    loss.knowledge = KnowledgeBase.from_embeddings(audio, text, ids=pairs.clip_id, num_prototypes=6)
    make_trainer(max_epochs=1, callbacks=[kept]).fit(module, make_loader(TRAINING))
    assert sum(kept.unknown) == 24


@pytest.mark.parametrize("make", [partial(KnowledgeDistillationLoss, 0.2), ask_with_teacher])
@pytest.mark.parametrize("of_ones_own", [False, True], ids=["refreshed", "a base of one's own"])
def test_an_epoch_without_a_known_clip_is_told(of_ones_own, make, recwarn):
    loss, refresh = make(), KnowledgeRefreshCallback(9, num_prototypes=6)
    module = ASKModule(PlainTowers(), loss, ids=lambda model, batch: batch["clip_id"] + first[0])

    def told(offset):
        """Of a fit whose second epoch has other ids."""
        first[0] = 0
        callbacks = [] if of_ones_own else [refresh]
        change = LambdaCallback(on_train_epoch_end=lambda *_: first.__setitem__(0, offset))
        recwarn.clear()
        make_trainer(max_epochs=2, callbacks=[*callbacks, change]).fit(module, make_loader(TRAINING))
        return sum("none of the clips of this epoch" in str(warning.message) for warning in recwarn)

    first = [0]
    loss.knowledge = KnowledgeBase.from_embeddings(
        *torch.randn(2, TRAINING, 8), ids=range(TRAINING), num_prototypes=6
    )
    assert told(0) == 0
    assert told(TRAINING - 1) == 0, "one clip is known"
    assert told(TRAINING) == 1


@pytest.mark.parametrize("momentum", [0.25, 0.9])
def test_momentum_keeps_a_part_of_each_row(momentum):
    kept, _ = fit(momentum=momentum, epochs=3)
    assert len(kept.bases) == 3
    stored = kept.fresh[0]
    for base, fresh in zip(kept.bases[1:], kept.fresh[1:], strict=True):
        stored = tuple(
            unit_length(momentum * old + (1 - momentum) * new) for old, new in zip(stored, fresh, strict=True)
        )
        torch.testing.assert_close(base.fine.audio, stored[0])
        torch.testing.assert_close(base.fine.text, stored[1])


@pytest.mark.parametrize("refine", ["graph", GraphRefinement(3, share=0.5)])
def test_a_refresh_stores_refined_pairs(refine):
    kept, _ = fit(refine=refine, momentum=0.25, epochs=2)
    expected = GraphRefinement() if refine == "graph" else refine
    shard = RowShard.unsharded(len(kept.fresh[0][0]))
    stored = expected(*kept.fresh[0], shard)
    torch.testing.assert_close((kept.bases[0].fine.audio, kept.bases[0].fine.text), stored)
    mixed = (0.25 * old + 0.75 * new for old, new in zip(stored, kept.fresh[1], strict=True))
    stored = expected(*mixed, shard)
    torch.testing.assert_close((kept.bases[1].fine.audio, kept.bases[1].fine.text), stored)


def test_an_unknown_refinement_is_refused():
    with pytest.raises(ValueError, match="`refine`"):
        KnowledgeRefreshCallback(refine="tree")


def test_training_clips_beside_another_source_are_refined_too():
    kept, _ = fit(ask_with_teacher(), refine="graph", source=Pairs(20, seed=7), epochs=1)
    expected = GraphRefinement()(*kept.fresh[0], RowShard.unsharded(TRAINING))
    found = kept.bases[0].find_clips(torch.arange(TRAINING))
    torch.testing.assert_close((found.audio, found.text), expected)


@pytest.mark.parametrize("limit", [3, 0.5])
def test_a_trainer_that_visits_a_part_of_the_training_data_has_all_of_them_beside_a_source(limit):
    kept = Kept()
    module = ASKModule(PlainTowers(), ask_with_teacher(), ids="clip_id")
    refresh = KnowledgeRefreshCallback(1, Pairs(20, seed=7), num_prototypes=6)
    run = make_trainer(max_epochs=2, callbacks=[refresh, kept], limit_train_batches=limit)
    run.fit(module, make_loader(TRAINING))
    assert kept.unknown == [0] * 6


def test_momentum_where_the_source_changes():
    sizes = iter([20, 20, 24])

    def source():
        return Pairs(next(sizes), seed=7)

    with pytest.warns(UserWarning, match=r"source changed since the last refresh \(20 pairs then, 24 now\)"):
        kept, _ = fit(source=source, momentum=0.5, epochs=3)
    assert [len(base.fine) for base in kept.bases] == [20, 20, 24]


@pytest.mark.parametrize("is_new", [True, False])
def test_momentum_without_ids_mixes_rows_of_one_dataset_only(is_new, recwarn):
    """Row j of another dataset, though it has as many, is another pair."""
    pairs, kept, loss = (
        iter([Pairs(20, seed=1), Pairs(20, seed=2)]),
        Kept(),
        ReliabilityOTLoss(num_neighbors=3),
    )
    first = next(pairs)
    refresh = KnowledgeRefreshCallback(
        1, lambda: next(pairs) if is_new and loss.knowledge else first, num_prototypes=6, momentum=0.5
    )
    kept.on_before_optimizer_step = lambda *args: None
    run = make_trainer(max_epochs=2, callbacks=[refresh, kept])
    run.fit(ASKModule(PlainTowers(), loss), make_loader(TRAINING))
    told = [str(each.message) for each in recwarn if "source changed" in str(each.message)]
    assert len(told) == is_new
    assert all("pass their clip ids" in message for message in told)
    assert ("ask/rdm_audio" in run.callback_metrics) == (not is_new)


class Stream(IterableDataset):
    def __iter__(self):
        pairs = Pairs(20)
        return (pairs[row] for row in range(20))


def test_momentum_needs_rows_that_can_be_found_again():
    with pytest.raises(ValueError, match=r"momentum=0\.5.*Stream has no index.*map-style"):
        fit(source=DataLoader(Stream(), 5), momentum=0.5)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match=r"`momentum` has to be in \[0, 1\)"):
        KnowledgeRefreshCallback(momentum=momentum)


@pytest.mark.parametrize("settings", [{}, {"source": "other"}, {"source": "other", "momentum": 0.5}])
def test_a_resumed_run_has_the_same_teacher(tmp_path, settings):
    def run(folder, epochs, resume=None):
        pl.seed_everything(0, verbose=False)
        watcher = Watcher()
        options = settings | ({"source": Pairs(20, seed=7)} if "source" in settings else {})
        refresh = KnowledgeRefreshCallback(2, num_prototypes=6, **options)
        loss = ask_with_teacher() if settings else KnowledgeDistillationLoss(temperature=0.2)
        module = ASKModule(PlainTowers(), loss, ids="clip_id")
        keep = pl.callbacks.ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
        going = make_trainer(max_epochs=epochs, callbacks=[refresh, watcher, keep], enable_checkpointing=True)
        going.fit(module, make_loader(TRAINING), ckpt_path=resume)
        return watcher.losses

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "broken", 3)
    resumed = run(tmp_path / "again", 4, tmp_path / "broken" / "last.ckpt")
    assert resumed == whole[-len(resumed) :]
    assert len(resumed) == 6


def test_a_resumed_run_whose_knowledge_lacks_the_training_clips(tmp_path):
    """It began with the published loss, which needs none."""

    def run(loss, epochs, resume=None):
        refresh = KnowledgeRefreshCallback(9, Pairs(20, seed=7), num_prototypes=6)
        keep = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
        kept = [Kept()] if resume else []
        going = make_trainer(max_epochs=epochs, callbacks=[refresh, keep, *kept], enable_checkpointing=True)
        going.fit(ASKModule(PlainTowers(), loss, ids="clip_id"), make_loader(TRAINING), ckpt_path=resume)
        return kept

    run(ReliabilityOTLoss(num_neighbors=4), 1)
    with pytest.warns(UserWarning, match="newly encoded knowledge .* lacks the training clips"):
        (kept,) = run(ask_with_teacher(), 2, tmp_path / "last.ckpt")
    assert kept.unknown == [0] * 6


class Recordings(Pairs):
    """Pairs whose clips have other numbers."""

    def __init__(self, size: int, first: int = 0) -> None:
        super().__init__(size)
        self.clip_id = self.clip_id + first


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        (Recordings(32), None),
        (Recordings(TRAINING), r"items 32 → 48"),
        (
            Recordings(32, first=16),
            r"first and the last item \[16, 47\] are not among",
        ),
    ],
    ids=["the same", "more", "others"],
)
def test_a_resumed_run_with_other_training_data_beside_the_same_source(now, difference, tmp_path, recwarn):
    def run(data, epochs, resume=None):
        refresh, kept = KnowledgeRefreshCallback(9, Pairs(20, seed=7), num_prototypes=6), Kept()
        keep = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
        going = make_trainer(max_epochs=epochs, callbacks=[refresh, keep, kept], enable_checkpointing=True)
        module = ASKModule(PlainTowers(), ask_with_teacher(), ids="clip_id")
        going.fit(module, DataLoader(data, 8), ckpt_path=resume)
        return kept

    run(Recordings(32), 1)
    kept = run(now, 2, tmp_path / "last.ckpt")
    assert not any(kept.unknown)
    told = [str(one.message) for one in recwarn if "training data are other ones" in str(one.message)]
    assert len(told) == (difference is not None)
    assert difference is None or re.search(difference, told[0])


def test_a_resumed_run_whose_training_data_were_beside_a_source(tmp_path):
    """What steps write back then reaches the teacher."""

    def run(epochs, resume=None, **settings):
        refresh = KnowledgeRefreshCallback(9, num_prototypes=6, **settings)
        keep = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
        module = ASKModule(PlainTowers(), ask_with_teacher(), ids="clip_id")
        going = make_trainer(max_epochs=epochs, callbacks=[refresh, keep], enable_checkpointing=True)
        going.fit(module, make_loader(TRAINING), ckpt_path=resume)
        return module.loss.knowledge

    run(1, source=Pairs(TRAINING))
    with pytest.warns(UserWarning, match="newly encoded knowledge .* holds training clips beside its source"):
        base = run(2, tmp_path / "last.ckpt", write_back=True)
    torch.testing.assert_close(base.find_clips(base.ids).audio, base.fine.audio)


@pytest.mark.parametrize("display", [InfluenceMonitor, QueryTable])
def test_displays_of_neighbours_refuse_a_loss_without_any(display):
    with pytest.raises(RuntimeError, match=f"{display.__name__} shows the neighbours .* with Knowledge"):
        fit(callbacks=[display()])


class SquaredDistance(RetrievalLoss):
    """A loss of a user's that knows nothing but its batch."""

    needs_knowledge = False

    def compute(self, audio, text, ids, knowledge):
        loss = (audio - text).square().sum(dim=1).mean()
        return loss, {"loss": loss}


def test_a_loss_of_ones_own_needs_no_knowledge():
    loss = SquaredDistance(temperature=1.0, positives="diagonal", gather=False)
    model = PlainTowers()
    before = model.audio_encoder.weight.clone()
    make_trainer(max_epochs=1).fit(ASKModule(model, loss), make_loader())
    assert not torch.equal(before, model.audio_encoder.weight)
    assert set(loss.last) == {"loss"}


def test_ids_are_asked_for():
    with pytest.raises(ValueError, match="`ids` has to be given, because KnowledgeDistillationLoss"):
        ASKModule(PlainTowers(), KnowledgeDistillationLoss())


def test_the_wrapper_restores_the_loss_of_a_checkpoint(tmp_path):
    loss = KnowledgeDistillationLoss(temperature=0.2, distillation_weight=0.4, teacher="transport")
    module = ASKModule(PlainTowers(), loss, ids="clip_id")
    run = make_trainer(max_epochs=1, callbacks=[KnowledgeRefreshCallback(T=4, num_prototypes=4)])
    run.fit(module, make_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = ASKModule.load_from_checkpoint(tmp_path / "a.ckpt", PlainTowers(), ids="clip_id")
    assert type(again.loss) is KnowledgeDistillationLoss
    assert again.loss.options == loss.options


def test_the_loss_of_a_users_class_has_to_be_passed(tmp_path):
    class Mine(ReliabilityOTLoss):
        pass

    module = ASKModule(PlainTowers(), Mine(num_neighbors=3))
    run = make_trainer(max_epochs=1, callbacks=[KnowledgeRefreshCallback(T=4, num_prototypes=4)])
    run.fit(module, make_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"with the loss .*Mine, which is not of this library. Pass it"):
        ASKModule.load_from_checkpoint(tmp_path / "a.ckpt", PlainTowers())
    again = ASKModule.load_from_checkpoint(tmp_path / "a.ckpt", PlainTowers(), Mine(num_neighbors=3))
    assert type(again.loss) is Mine


def test_training_data_that_a_refresh_cannot_read():
    module = ASKModule(PlainTowers(), ask_with_teacher(), ids="clip_id")
    run = make_trainer(callbacks=[KnowledgeRefreshCallback(1, DataLoader(Pairs(20), 8))])
    with pytest.raises(
        TypeError, match="training clips encoded beside `source`, but the training data are a dict"
    ):
        run.fit(module, {"pairs": make_loader(TRAINING), "others": make_loader(TRAINING)})

"""What a refresh makes of the rows of its source."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import (
    DataLoader,
)

from ask_lightning import (
    ASKModule,
    KnowledgeBase,
    KnowledgeDistillationLoss,
    KnowledgeRefreshCallback,
    ReliabilityOTLoss,
)
from ask_lightning.losses import HardNegativeMiningLoss
from tests.helpers.clients import (
    AUDIO,
    MemoryLogger,
    Pairs,
    PlainTowers,
    Watcher,
    make_loader,
    make_refresh,
    make_trainer,
    wrap,
)
from tests.helpers.first_base import knowledge, rows

PAIRS, OTHER = Pairs(48), Pairs(20, seed=5)


def test_rows_are_the_unit_embeddings_of_the_present_encoders():
    model = PlainTowers()
    module = wrap(model)
    with torch.no_grad():
        audio, text = model.audio_encoder(PAIRS.audio), model.text_encoder(PAIRS.text)
    make_trainer(max_epochs=1, max_steps=1, callbacks=[make_refresh()]).fit(module, make_loader())
    base = module.loss.knowledge
    assert base.fine.audio.allclose(F.normalize(audio, dim=1), atol=1e-6)
    assert base.fine.text.allclose(F.normalize(text, dim=1), atol=1e-6)
    assert len(base.coarse) == 6
    assert base.ids.tolist() == list(range(48)), "row numbers where no ids are named"


def test_source_is_read_anew_at_each_refresh():
    watcher = Watcher()
    module = wrap(PlainTowers())
    for source in (list(DataLoader(OTHER, 3)), lambda: OTHER):
        make_trainer(callbacks=[make_refresh(1, source), watcher]).fit(module, make_loader())
        assert len(set(watcher.knowledge[-18:])) == 3


def test_fewer_pairs_than_prototypes():
    with pytest.warns(
        UserWarning, match=r"fewer pairs \(48\) than prototypes asked for \(64\): `num_prototypes` becomes 48"
    ):
        base = knowledge(callback=make_refresh(num_prototypes=64))
    assert len(base.coarse) == 48


@pytest.mark.parametrize(
    "loss",
    [
        KnowledgeDistillationLoss(),
        HardNegativeMiningLoss(num_negatives=2, num_candidates=8),
        ReliabilityOTLoss(num_neighbors=3, granularities=("fine",)),
    ],
)
def test_no_prototypes_for_a_loss_that_reads_none(loss, recwarn):
    module = ASKModule(PlainTowers(), loss, ids="clip_id")
    make_trainer(max_epochs=2, callbacks=[KnowledgeRefreshCallback(T=1)]).fit(module, make_loader())
    base = module.loss.knowledge
    assert (len(base.fine), len(base.coarse)) == (48, 0)
    assert not [one for one in recwarn if "prototypes" in str(one.message)]


@pytest.mark.parametrize("pairing", ["matched", "joint", "audio", "text", "index"])
def test_prototype_settings_reach_the_base(pairing):
    base = knowledge(
        callback=make_refresh(prototype_pairing=pairing, normalize_prototypes=False, num_prototypes=4)
    )
    assert len(base.coarse) == 4
    assert not base.coarse.audio.norm(dim=1).allclose(torch.ones(4), atol=1e-3)


@pytest.mark.parametrize("clustering", ["spherical", "euclidean"])
def test_clustering_reaches_the_base(clustering):
    base = knowledge(callback=make_refresh(clustering=clustering, num_prototypes=12))
    expected = KnowledgeBase.from_embeddings(
        base.fine.audio, base.fine.text, num_prototypes=12, clustering=clustering
    )
    assert torch.equal(base.coarse.audio, expected.coarse.audio)
    with pytest.raises(ValueError, match=r"`clustering` has to be one of .* but got 'cosine'"):
        make_refresh(clustering="cosine")


def test_index_that_cannot_be_built_fails_at_the_first_refresh():
    with pytest.raises(ValueError, match="no such index"):
        knowledge(callback=make_refresh(index="no such index"))


def test_loaders_reloaded_each_epoch():
    """The source is the data of the present epoch."""

    class Client(PlainTowers):
        def train_dataloader(self):
            return make_loader(16 * (1 + self.trainer.current_epoch))

    sizes = []

    class Look(Watcher):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.append(len(pl_module.loss.knowledge.fine))

    run = make_trainer(reload_dataloaders_every_n_epochs=1, callbacks=[make_refresh(1), Look()])
    run.fit(wrap(Client()))
    assert sizes == [16] * 2 + [32] * 4 + [48] * 6


class Sick(Pairs):
    """Some items make the encoders return NaN, Inf or zero."""

    def __init__(self, size=48, **values):
        super().__init__(size)
        for row, value in values.items():
            self.audio[int(row[1:])] = value


def test_nan_and_inf_name_their_rows():
    with pytest.raises(
        ValueError,
        match=r"audio embeddings of 2 of 48 source rows contain NaN or Inf \(rows 5, 31\).*Check these items",
    ):
        rows(callback=make_refresh(source=Sick(r5=float("nan"), r31=float("inf"))))


def test_rows_are_numbered_as_the_source_numbers_them():
    many = {f"r{row}": float("nan") for row in range(3, 40)}
    with pytest.raises(ValueError, match=r"audio embeddings of 37 of 48 .* \(rows 3, 4, 5, 6, 7, …\)"):
        rows(callback=make_refresh(source=Sick(**many)))


def test_all_zero_embeddings_are_counted():
    class Client(PlainTowers):
        def __init__(self):
            super().__init__()
            self.audio_encoder = torch.nn.Linear(AUDIO, 8, bias=False)

    module, watcher = wrap(Client()), Watcher()
    source = Sick(r2=0.0, r9=0.0, r40=0.0)
    run = make_trainer(max_epochs=1, callbacks=[make_refresh(source=source), watcher])
    with pytest.warns(UserWarning, match=r"audio embeddings of 3 of 48 source rows are all zero; they stay"):
        run.fit(module, make_loader())
    base = module.loss.knowledge
    assert (base.fine.audio[[2, 9, 40]] == 0).all()
    assert base.fine.audio.isfinite().all()
    assert all(loss == loss for loss in watcher.losses)


class Redrawn(Pairs):
    """Other pairs at each refresh, as many as before."""

    def __init__(self):
        super().__init__()
        self.whole, self.draw = Pairs(96), 0

    def redraw(self):
        rows = torch.randperm(96, generator=torch.Generator().manual_seed(self.draw))[:48]
        self.draw += 1
        for name in ("audio", "text", "clip_id"):
            setattr(self, name, getattr(self.whole, name)[rows])
        return self


@pytest.mark.parametrize("ids", ["clip_id", None])
def test_no_drift_between_unrelated_rows(ids):
    """Rows are compared where the clip ids, or else the dataset, are the same."""

    def fit(source):
        logger = MemoryLogger()
        run = make_trainer(max_epochs=2, callbacks=[make_refresh(1, source)], logger=logger)
        run.fit(wrap(PlainTowers(), ids=ids), make_loader())
        return logger.names

    assert "ask/rdm_audio" in fit(PAIRS)
    redrawn = Redrawn()
    assert "ask/rdm_audio" not in fit(redrawn.redraw if ids else lambda: Redrawn().redraw())


def test_more_neighbours_than_the_source_has_is_said_at_the_refresh():
    steps = []

    class Look(Watcher):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            steps.append(batch_idx)

    module = wrap(PlainTowers(), {"num_neighbors": 21})
    with pytest.raises(ValueError, match=r"`k` has to be in \[1, 20\] for a knowledge base of 20 pairs"):
        make_trainer(callbacks=[make_refresh(source=OTHER), Look()]).fit(module, make_loader())
    assert not steps
    assert module.loss.knowledge is None


def test_last_batch_of_one_is_foreseen(recwarn):
    def warned(data, **settings):
        recwarn.clear()
        run = make_trainer(max_epochs=1, max_steps=1, callbacks=[make_refresh()], **settings)
        run.fit(wrap(PlainTowers()), data)
        return any("last batch of each epoch holds a single pair" in str(each.message) for each in recwarn)

    assert warned(DataLoader(Pairs(9), 8))
    assert not warned(DataLoader(Pairs(9), 8, drop_last=True))
    assert not warned(DataLoader(Pairs(10), 8))
    assert not warned(DataLoader(Pairs(9), 8), limit_train_batches=1)


def test_parameters_outside_the_loss_are_named_once():
    class Client(PlainTowers):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, 1)
            self.frozen = torch.nn.Linear(8, 1).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.head(self.encode_audio(batch)).mean()

    run = make_trainer(max_epochs=2, callbacks=[make_refresh()])
    with pytest.warns(UserWarning, match="got no gradient") as seen:
        run.fit(wrap(Client(), step="encode"), make_loader())
    texts = [str(each.message) for each in seen if "got no gradient" in str(each.message)]
    assert len(texts) == 1
    assert texts[0].startswith("The parameters head.weight, head.bias got no gradient")
    assert "criterion=" in texts[0]
    assert "such as a projection, do that in the methods" in texts[0]

"""Clips with several captions: `caption_ids` tell which stored pair a sample is."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from ask_lightning import ASKModule, KnowledgeDistillationLoss, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.callbacks import LoaderStateCallback
from ask_lightning.callbacks.auto_period import AutoPeriod
from ask_lightning.callbacks.step_embeddings import StepRecorder
from ask_lightning.data import EpochSampler
from ask_lightning.encoding.target import Target, find_target
from ask_lightning.knowledge import KnowledgeBase
from tests.helpers.clients import EpochSeededSampler, Pairs, PlainTowers, SelfContained, make_trainer
from tests.helpers.interrupted_run import Stop, Stopped
from tests.helpers.ranks import on_ranks
from tests.helpers.renewal_run import BATCH, PAIRS, assert_goes_on, fit, logged

CAPTIONS = 4
NEVER = 10**6
NO_REFRESH = AutoPeriod(max_drift=1e6)


class Captioned(Pairs):
    """Clips with four captions each; their ids are the same numbers, or texts, for all clips."""

    def __init__(self, *, numbers: bool = True, constant: bool = False) -> None:
        super().__init__(PAIRS, captions_per_clip=CAPTIONS)
        self.audio = self.audio[self.clip_id * CAPTIONS]
        self.text = self.text[self.clip_id * CAPTIONS] + 0.2 * self.text  # alike, as of one sound
        self.numbers, self.constant = numbers, constant

    def __getitem__(self, row: int) -> dict:
        number = 0 if self.constant else (row * 7 + row // CAPTIONS) % CAPTIONS
        item = {**super().__getitem__(row), "row": row}
        return item | {"caption_id": number if self.numbers else f"caption {number}"}


class Repeating(EpochSeededSampler):
    """Draws with replacement, another draw in each epoch."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randint(self.size, (self.size,), generator=generator).tolist())


class CaptionedData(pl.LightningDataModule):
    """Each rank has its share of every batch; on one rank samples may repeat."""

    def __init__(self, *, repeats: bool = False, stateful: bool = False, **settings) -> None:
        super().__init__()
        self.pairs, self.repeats, self.stateful = Captioned(**settings), repeats, stateful

    def train_dataloader(self) -> DataLoader:
        size, sampler = self.trainer.world_size, None
        if self.repeats:
            sampler = Repeating(PAIRS)
        elif self.stateful:
            from torchdata.stateful_dataloader import StatefulDataLoader

            generator = torch.Generator().manual_seed(3)
            return StatefulDataLoader(self.pairs, BATCH, shuffle=True, generator=generator)
        else:
            sampler = EpochSampler(self.pairs, num_replicas=size, rank=self.trainer.global_rank, seed=0)
        return DataLoader(self.pairs, BATCH // size, sampler=sampler, drop_last=True)


def exact(module: pl.LightningModule, batch) -> tuple[Tensor, Tensor]:
    """The unit embeddings of a batch in float64; a wrapper has the model's attributes."""
    sides = []
    for name in ("audio", "text"):
        layer = getattr(module, f"{name}_encoder")
        side = batch[name].double() @ layer.weight.detach().double().T + layer.bias.detach().double()
        sides.append(F.normalize(side, dim=1))
    return sides[0], sides[1]


class EachStep(pl.Callback):
    """Holds the base after each step against a table that is written row by row."""

    def __init__(self) -> None:
        self.seen, self.repeated = 0, 0
        self.table: list[Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        fine = pl_module.loss.knowledge.fine
        if not self.table:
            self.table = [fine.audio.double().clone(), fine.text.double().clone()]
        for table, side in zip(self.table, exact(pl_module, batch), strict=True):
            for row, embedding in zip(batch["row"].tolist(), side, strict=True):
                table[row] = embedding

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        fine = pl_module.loss.knowledge.fine
        for table, stored in zip(self.table, (fine.audio, fine.text), strict=True):
            torch.testing.assert_close(stored.double(), table, atol=1e-6, rtol=0)
        self.seen += 1
        self.repeated += len(batch["row"]) - len(batch["row"].unique())


class Drift(pl.Callback):
    """The drift of the rows that the samples are, in float64, as `DriftTracker` defines it."""

    def __init__(self) -> None:
        self.sides = [{"moved": 0.0, "spread": 0.0, "floor": 0.0} for _ in range(2)]
        self.count = 0
        self.found: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        fine, self.count = pl_module.loss.knowledge.fine, self.count + 1
        fresh = exact(pl_module, batch)
        for side, now, table in zip(self.sides, fresh, (fine.audio, fine.text), strict=True):
            cosines = [float(one @ table[row].double()) for one, row in zip(now, batch["row"], strict=True)]
            moved = 1 - sum(cosines) / len(cosines)
            off = ~torch.eye(len(now), dtype=torch.bool)
            new = {"moved": moved, "spread": 1 - float((now @ now.T)[off].mean())}
            if self.count == 1:
                side["floor"] = moved
            for name, value in new.items():
                side[name] += max(0.1, 1 / self.count) * (value - side[name])

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        drifts = [
            (side["moved"] - side["floor"]) / (1 - side["floor"]) / side["spread"] for side in self.sides
        ]
        self.found.append(max(0.0, *drifts))


@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "texts"])
def test_each_sample_is_stored_in_its_row(numbers):
    each = EachStep()
    data = CaptionedData(repeats=True, numbers=numbers)
    fit(T=NEVER, write_back=True, epochs=3, data=data, caption_ids="caption_id", extra=(each,))
    assert each.seen == 18
    assert each.repeated > 0, "some samples occur twice in a batch"


@pytest.mark.parametrize("options", [{"mode": "rolling", "T": 3}, {"storage": "memmap", "T": 2}])
def test_with_other_kinds_of_refresh(options, tmp_path):
    """At the end of an epoch each row is what the last step that had it has made of it."""
    if "storage" in options:
        options = options | {"storage_directory": tmp_path}
    last = Last()
    fit(write_back=True, epochs=3, data=CaptionedData(), caption_ids="caption_id", extra=(last,), **options)
    torch.testing.assert_close(last.stored.double(), last.table, atol=2e-3, rtol=0)


class Last(pl.Callback):
    """What the steps of each epoch have made of the text of each row, and what is stored."""

    def __init__(self) -> None:
        self.table = torch.zeros(PAIRS, 8, dtype=torch.float64)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.text = exact(pl_module, batch)[1]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if outputs:  # else the step has skipped the batch
            self.table[batch["row"]] = self.text

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        base = find_target(pl_module).loss.knowledge
        self.stored = base.fine.pairs(torch.arange(PAIRS))[1].float()
        self.captions = base.caption_ids


class SlowAudio(PlainTowers):
    """Steps turn its audio less than its text, whose drift is the larger one then."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(3e-3)
        self.audio_encoder.weight.data *= 20


def test_drift_is_that_of_the_rows_themselves():
    drift = Drift()
    options = {"T": NO_REFRESH, "epochs": 4, "data": CaptionedData()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="KnowledgeRefreshCallback")
        run = fit(model=SlowAudio(), caption_ids="caption_id", extra=(drift,), **options)
    assert logged(run, "ask/drift") == pytest.approx(drift.found, rel=1e-4)
    with pytest.warns(UserWarning, match=r'T="auto".*12 of the 12 clips.*up to 4.*caption_ids=.*too small'):
        nearest = fit(model=SlowAudio(), **options)
    assert logged(nearest, "ask/drift")[-1] < 0.9 * drift.found[-1]


@pytest.mark.parametrize("option", [{"write_back": True}, {"T": "auto"}], ids=["write_back", "auto"])
def test_captions_that_their_ids_do_not_tell_apart(option):
    name = r'T="auto"' if "T" in option else "write_back=True"
    text = rf"\({name}\).* 36 of the 48 pairs .* the first of them row 1, .* differ within a clip"
    with pytest.raises(RuntimeError, match=text):
        fit(**{"T": NEVER} | option, epochs=1, data=CaptionedData(constant=True), caption_ids="caption_id")


def test_they_are_of_no_concern_to_a_refresh_of_all_rows():
    fit(T=1, epochs=1, data=CaptionedData(constant=True), caption_ids="caption_id")


def test_the_source_has_other_captions():
    class Others(Captioned):
        def __getitem__(self, row):
            item = super().__getitem__(row)
            return item | {"caption_id": item["caption_id"] + 100}

    with pytest.raises(RuntimeError, match=r"stored of their pairs.* clip ids and caption ids of the"):
        fit(
            T=NEVER,
            write_back=True,
            epochs=1,
            data=CaptionedData(),
            source=Others(),
            caption_ids="caption_id",
        )


def test_refused_without_caption_ids():
    with pytest.raises(RuntimeError, match=r"write_back=True.*ASKModule\(\.\.\., caption_ids=\.\.\.\)"):
        fit(T=NEVER, write_back=True, epochs=1, data=CaptionedData())


def test_chunks_accumulation_and_skipped_batches():
    """The captions are those of the batch whose embeddings were recorded last."""

    class Skipping(PlainTowers):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)

    for settings in ({"chunk_size": 3}, {"step": "capture"}):
        last = Last()
        refresh = KnowledgeRefreshCallback(NEVER, num_prototypes=6, write_back=True)
        model = PlainTowers() if "chunk_size" in settings else Skipping()
        loss = KnowledgeDistillationLoss(temperature=0.2)
        module = ASKModule(model, loss, ids="clip_id", caption_ids="caption_id", **settings)
        trainer = make_trainer(max_epochs=2, callbacks=[refresh, last], accumulate_grad_batches=2)
        first = torch.stack([Captioned()[row]["text"] for row in range(PAIRS)])
        before = F.normalize(model.text_encoder(first), dim=1).detach().double()
        trainer.fit(module, datamodule=CaptionedData())
        seen = last.table.any(dim=1)
        torch.testing.assert_close(last.stored.double()[seen], last.table[seen], atol=1e-6, rtol=0)
        torch.testing.assert_close(last.stored.double()[~seen], before[~seen], atol=1e-6, rtol=0)
        assert bool(seen.all()) == ("chunk_size" in settings)


class TestWithoutTheWrapper:
    class WithCaptions(SelfContained):
        def training_step(self, batch, batch_idx):
            audio, text = self.encode_audio(batch), self.encode_text(batch)
            order = self.order(len(audio))
            return self.objective(audio[order], text[order], ids=batch["clip_id"][order])

        def order(self, size):
            return torch.arange(size)

        def encode_ids(self, batch):
            return batch["clip_id"]

        def encode_caption_ids(self, batch):
            return batch["caption_id"]

    def run(self, module):
        last, refresh = Last(), KnowledgeRefreshCallback(NEVER, num_prototypes=6, write_back=True)
        make_trainer(max_epochs=1, callbacks=[refresh, last]).fit(module, datamodule=CaptionedData())
        return last

    def test_by_a_method(self):
        last = self.run(self.WithCaptions())
        torch.testing.assert_close(last.stored.double(), last.table, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("order", [lambda size: torch.arange(size).flip(0), lambda size: torch.arange(5)])
    def test_other_samples_than_those_of_the_batch(self, order):
        module = self.WithCaptions()
        module.order = order
        with pytest.raises(RuntimeError, match=r"its batch, which has 8, but the loss was last called with"):
            self.run(module)

    def test_needs_the_clips(self):
        class WithoutClips(SelfContained):
            def encode_caption_ids(self, batch):
                return batch["caption_id"]

        with pytest.raises(
            RuntimeError, match=r"captions of a clip by their ids, and so needs .*`encode_ids`"
        ):
            find_target(WithoutClips())

    def test_beside_one_method_for_all(self):
        class WithPairs(SelfContained):
            def embed_pairs(self, batch):
                return self.encode_audio(batch), self.encode_text(batch), batch["clip_id"]

            def encode_caption_ids(self, batch):
                return batch["caption_id"]

        batch = next(iter(DataLoader(Captioned(), 8)))
        target = find_target(WithPairs())
        assert torch.equal(target.embed(batch)[3], batch["caption_id"])
        assert target.pair_ids(batch)[0] is None


def test_a_step_that_overflows_keeps_the_captions_in_line():
    loss = KnowledgeDistillationLoss(temperature=0.2).train()
    target = Target(loss, embed=lambda batch: (), pair_ids=lambda batch: (None, batch))
    recorder, base = (
        StepRecorder(target, ""),
        KnowledgeBase.from_embeddings(*[torch.eye(3)] * 2, num_prototypes=1),
    )
    audio = torch.eye(3)
    audio[1] = torch.inf
    recorder._record(loss, (audio, torch.eye(3)), {"ids": [4, 5, 6]}, torch.zeros(()))
    step = recorder.take(base, [7, 8, 9])
    assert (step.ids.tolist(), step.caption_ids.tolist()) == ([4, 6], [7, 9])
    assert recorder.take(base, None).caption_ids.tolist() == []
    recorder.remove()


def test_resumed_exactly_inside_an_epoch(tmp_path):
    pytest.importorskip("torchdata")

    def run(name, **options):
        keep = ModelCheckpoint(tmp_path / name, save_last=True, every_n_train_steps=1)
        options = {"T": NEVER, "write_back": True, "epochs": 3, "caption_ids": "caption_id"} | options
        extra = (*options.pop("extra", ()), LoaderStateCallback(), keep)
        return fit(
            1, tmp_path / f"{name}, each epoch", data=CaptionedData(stateful=True), extra=extra, **options
        )

    whole = run("whole")
    with pytest.raises(Stopped):
        run("one", extra=(Stop(1),))
    resumed = run("two", resume=tmp_path / "one" / "last.ckpt")
    steps = len(resumed["losses"])
    assert steps == 9, "it goes on behind the third batch of the second epoch"
    rest = {name: whole[name][-steps:] for name in ("losses", "knowledge", "clips")}
    assert_goes_on(resumed, rest | {"weights": whole["weights"]}, 0)


def test_knowledge_of_a_checkpoint_without_caption_ids_is_encoded_anew(tmp_path):
    fit(1, tmp_path / "one", T=NEVER, epochs=1, data=CaptionedData())
    options = {"write_back": True, "data": CaptionedData(), "caption_ids": "caption_id"}
    with pytest.warns(UserWarning, match=r"newly encoded knowledge.* lacks the caption ids"):
        fit(T=NEVER, epochs=2, resume=tmp_path / "one" / "last.ckpt", **options)


def test_knowledge_with_other_caption_ids_is_encoded_anew(tmp_path):
    options = {"write_back": True, "caption_ids": "caption_id"}
    fit(1, tmp_path / "one", T=NEVER, epochs=1, data=CaptionedData(), **options)
    with pytest.warns(UserWarning, match=r"caption ids of the first and last row \[0, \d\] → .* anew"):
        fit(
            T=NEVER,
            epochs=2,
            resume=tmp_path / "one" / "last.ckpt",
            data=CaptionedData(numbers=False),
            **options,
        )


@pytest.mark.parametrize("options", [{"mode": "mapped"}, {"in_background": True, "num_workers": 1}])
def test_every_kind_of_refresh_keeps_them(options):
    last = Last()
    fit(T=1, epochs=3, data=CaptionedData(), caption_ids="caption_id", extra=(last,), **options)
    expected = [Captioned()[row]["caption_id"] for row in range(PAIRS)]
    assert last.captions.tolist() == expected


def test_only_where_they_are_given():
    runs = [fit(T=NEVER, epochs=1, data=CaptionedData(), caption_ids=ids) for ids in (None, "caption_id")]
    assert runs[0]["losses"] == runs[1]["losses"]
    assert runs[0]["knowledge"][0] != runs[1]["knowledge"][0]


def on_one_of_two(placement: str, storage: str, directory) -> dict:
    loss, last = KnowledgeDistillationLoss(temperature=0.2, gather=True), Last()
    files = {"storage": storage, "storage_directory": directory} if storage == "memmap" else {}
    options = {"T": NEVER, "write_back": True, "epochs": 2, "placement": placement, **files}
    run = fit(2, data=CaptionedData(), caption_ids="caption_id", loss=loss, extra=(last,), **options)
    return {"knowledge": run["knowledge"], "text": last.stored, "captions": last.captions}


@pytest.mark.parametrize(
    ("placement", "storage"), [("replicated", "float32"), ("sharded", "float32"), ("sharded", "memmap")]
)
def test_on_two_ranks_as_on_one(placement, storage, tmp_path):
    one, other = on_ranks(2, on_one_of_two, placement, storage, tmp_path, grouped=False)
    assert one["knowledge"] == other["knowledge"], "the same to the bit"
    last, loss = Last(), KnowledgeDistillationLoss(temperature=0.2, gather=True)
    options = {"T": NEVER, "write_back": True, "epochs": 2, "data": CaptionedData()}
    fit(caption_ids="caption_id", loss=loss, extra=(last,), **options)
    for run in (one, other):
        assert torch.equal(run["captions"], last.captions)
        torch.testing.assert_close(run["text"], last.stored, atol=2e-3, rtol=0)


class Drawing(Captioned):
    """Each of the clips, with the caption that is drawn at this reading."""

    def __len__(self) -> int:
        return len(self.clip_id.unique())

    def __getitem__(self, clip: int) -> dict:
        rows = (self.clip_id == clip).nonzero().flatten()
        return super().__getitem__(int(rows[torch.randint(len(rows), ())]))


def fit_drawing(*, source=None, caption_ids: str | None = "caption_id", **options) -> tuple[ASKModule, int]:
    """A run over such a dataset; how many samples it has written back."""
    pl.seed_everything(0, verbose=False)
    module = ASKModule(
        PlainTowers(), ReliabilityOTLoss(num_neighbors=2), ids="clip_id", caption_ids=caption_ids
    )
    refresh = KnowledgeRefreshCallback(2, source, num_prototypes=4, **options)
    make_trainer(max_epochs=3, callbacks=[refresh]).fit(module, DataLoader(Drawing(), 4))
    return module, refresh.num_written


def test_a_dataset_that_draws_captions():
    samples = 3 * len(Drawing())
    assert fit_drawing(write_back=True, caption_ids=None)[1] == samples
    assert fit_drawing(write_back=True, source=Captioned())[1] == samples
    assert 0 < fit_drawing(write_back=True)[1] < samples / 2
    told = "clips are the same, but their captions are not.* leave `caption_ids` out"
    with pytest.warns(UserWarning, match=told):
        fit_drawing(momentum=0.5)

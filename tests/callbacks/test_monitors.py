"""`DriftMonitor` and `InfluenceMonitor`: what they log, and that they only watch."""

import itertools

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from ask_lightning import DriftMonitor, InfluenceMonitor, KnowledgeBase, ReliabilityOTLoss
from ask_lightning.callbacks.monitors import influence_of_knowledge
from ask_lightning.functional import representation_drift, unit_length
from ask_lightning.knowledge.pairs import StoredPairs, read_neighborhood
from tests.helpers.clients import (
    InlineClient,
    MemoryLogger,
    Pairs,
    PlainTowers,
    RestlessTowers,
    SelfContained,
    Watcher,
    assert_same_weights,
    held_out,
    make_loader,
    make_refresh,
    make_trainer,
    static_knowledge,
    wrap,
)

RDM = ("ask/probe_rdm_audio", "ask/probe_rdm_text")
OBI = ("ask/obi_fine", "ask/obi_coarse")


class Still(PlainTowers):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class HalfStill(PlainTowers):
    """Only the text encoder learns."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.text_encoder.parameters(), lr=1e-2)


def fit(client=PlainTowers, *monitors, T=2, epochs=4, data=None, settings=None, source=None, **options):
    pl.seed_everything(0, verbose=False)
    model, logger, watcher = client(), MemoryLogger(), Watcher()
    callbacks = [make_refresh(T, source), *monitors, watcher]
    run = make_trainer(max_epochs=epochs, callbacks=callbacks, logger=logger, log_every_n_steps=1, **options)
    module = model if isinstance(model, SelfContained) else wrap(model, settings)
    run.fit(module, data if data is not None else make_loader(), held_out())
    return model, logger, watcher, module


def test_drift_of_encoders_that_stand_still_is_zero():
    _, logger, _, _ = fit(Still, DriftMonitor())
    for name in RDM:
        assert logger.values(name) == pytest.approx([0.0] * 4, abs=1e-6)


def test_drift_is_measured_per_modality():
    _, logger, _, _ = fit(HalfStill, DriftMonitor())
    audio, text = (logger.values(name) for name in RDM)
    assert audio == pytest.approx([0.0] * 4, abs=1e-6)
    assert all(value > 1e-6 for value in text)


def test_drift_grows_with_the_age_of_the_base():
    _, logger, _, _ = fit(PlainTowers, DriftMonitor(), T=9)
    for name in RDM:
        values = logger.values(name)
        assert len(values) == 4
        assert values == sorted(values)
        assert values[0] > 0


@pytest.mark.parametrize("num_probes", [2, 7, 48, 1000])
def test_drift_is_that_of_the_probe(num_probes):
    model, logger, _, module = fit(PlainTowers, DriftMonitor(num_probes), T=9, epochs=1)
    rows = torch.linspace(0, 47, min(num_probes, 48)).long()
    pairs, base = Pairs(48), module.loss.knowledge
    with torch.no_grad():
        now = unit_length(model.audio_encoder(pairs.audio[rows]))
    expected = representation_drift(now, now, base.fine.audio[rows])
    assert logger.values(RDM[0]) == pytest.approx([expected.item()], rel=1e-4, abs=1e-7)


def test_drift_of_a_selection_compares_rows_with_themselves():
    selection = DataLoader(Pairs(48), 8, sampler=SubsetRandomSampler(range(1, 48, 2)))
    _, logger, _, _ = fit(Still, DriftMonitor(), data=selection)
    assert logger.values(RDM[0]) == pytest.approx([0.0] * 4, abs=1e-6)
    _, logger, _, _ = fit(
        Still, DriftMonitor(), source=lambda: DataLoader(Pairs(20, seed=4), 3, shuffle=True)
    )
    assert logger.values(RDM[0]) == pytest.approx([0.0] * 4, abs=1e-6)


class Stream(IterableDataset):
    def __iter__(self):
        pairs = Pairs(48)
        return (pairs[row] for row in range(48))


@pytest.mark.parametrize(
    ("source", "name"), [(list(DataLoader(Pairs(48), 8)), "list"), (DataLoader(Stream(), 8), "Stream")]
)
def test_drift_needs_a_source_with_an_index(source, name):
    """Said when training starts, not after an epoch of it."""
    watcher = Watcher()
    run = make_trainer(callbacks=[make_refresh(source=source), DriftMonitor(), watcher])
    with pytest.raises(
        RuntimeError, match=rf"DriftMonitor needs a knowledge source with an index, but got {name}\. Pass"
    ):
        run.fit(wrap(PlainTowers()), make_loader())
    assert watcher.losses == []


def test_drift_needs_the_refresh():
    module = wrap(PlainTowers())
    module.loss.knowledge = static_knowledge(module.model)
    with pytest.raises(
        RuntimeError, match=r"DriftMonitor needs the knowledge of a KnowledgeRefreshCallback.*Add it"
    ):
        make_trainer(callbacks=[DriftMonitor()]).fit(module, make_loader())


@pytest.mark.parametrize("num_probes", [1, 0, 2.0, True])
def test_probes_out_of_range(num_probes):
    with pytest.raises(
        ValueError, match=r"Argument `num_probes` has to be an integer of at least 2, but got"
    ):
        DriftMonitor(num_probes)


@pytest.mark.parametrize("every_n_steps", [0, -1, 1.5])
def test_steps_out_of_range(every_n_steps):
    with pytest.raises(
        ValueError, match=r"Argument `every_n_steps` has to be an integer of at least 1, but got"
    ):
        InfluenceMonitor(every_n_steps)


OFF = {"injection_ratio": 0.0, "lambda_fine": 0.0, "lambda_coarse": 0.0}


@pytest.mark.parametrize("ot_factor", [0.0, 0.5])
def test_influence_is_zero_without_injection_and_reliability(ot_factor):
    _, logger, _, _ = fit(PlainTowers, InfluenceMonitor(1), settings=OFF | {"ot_factor": ot_factor}, epochs=1)
    for name in OBI:
        assert logger.values(name) == [0.0] * 6


@pytest.mark.parametrize(
    "on", [{"injection_ratio": 0.2}, {"lambda_fine": 0.2, "lambda_coarse": 0.2}, {"injection_ratio": 1.0}]
)
@pytest.mark.parametrize("plan", [True, False])
def test_influence_is_positive_with_either(on, plan):
    settings = OFF | on | {"detach_plan": plan}
    _, logger, _, _ = fit(PlainTowers, InfluenceMonitor(1), settings=settings, epochs=1)
    for name in OBI:
        assert len(logger.values(name)) == 6
        assert all(value > 0 for value in logger.values(name))


def test_influence_per_epoch_is_the_mean_of_its_steps():
    _, by_step, _, _ = fit(PlainTowers, InfluenceMonitor(2), settings={}, epochs=1)
    _, by_epoch, _, _ = fit(PlainTowers, InfluenceMonitor(2, per_epoch=True), settings={}, epochs=1)
    for name in OBI:
        (mean,) = by_epoch.values(name)
        # Lightning hands the last value to the logger again at steps without a new one.
        assert mean == pytest.approx(sum(by_step.values(name)[::2]) / 3)


def test_influence_of_the_granularities_in_use():
    _, logger, _, _ = fit(
        InlineClient, InfluenceMonitor(1), settings={"granularities": ("coarse",)}, epochs=1
    )
    assert logger.names & set(OBI) == {"ask/obi_coarse"}


def test_influence_agrees_with_finite_differences():
    """‖∂L/∂U_k‖ + ‖∂L/∂V_k‖ over all rows, by moving each number of the base a little."""
    generator = torch.Generator().manual_seed(2)
    audio, text = unit_length(torch.randn(2, 5, 3, generator=generator, dtype=torch.float64))
    rows = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    base = KnowledgeBase.from_embeddings(*rows, num_prototypes=3)
    # Without the plan, which the monitor holds constant as training does.
    loss = ReliabilityOTLoss(num_neighbors=2, ot_factor=0.0, granularities=("fine",))
    hood = loss.retrieve(audio, text, base)["fine"]

    def value(moved: torch.Tensor) -> float:
        near = {"fine": read_neighborhood(StoredPairs(*moved), hood.audio_rows, hood.text_rows)}
        return loss.from_neighborhoods(audio, text, near)[0].item()

    sides = torch.stack([base.fine.audio, base.fine.text])
    gradient = torch.empty_like(sides)
    for place in itertools.product(range(2), range(7), range(3)):
        step = torch.zeros_like(sides)
        step[place] = 1e-6
        gradient[place] = (value(sides + step) - value(sides - step)) / 2e-6
    expected = gradient.norm(dim=2).sum() / 7
    measured = influence_of_knowledge(loss, audio, text, knowledge=base)["fine"]
    assert measured.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("every", "accumulate", "measured"), [(1, 1, 6), (4, 1, 2), (50, 1, 1), (2, 2, 2)])
def test_every_n_optimizer_steps(every, accumulate, measured):
    _, logger, watcher, _ = fit(
        PlainTowers, InfluenceMonitor(every), epochs=1, accumulate_grad_batches=accumulate
    )
    assert len(watcher.losses) == 6
    # A logger repeats the last value in rows between two measurements.
    assert len(set(logger.values(OBI[0]))) == measured


@pytest.mark.parametrize("client", [PlainTowers, RestlessTowers, SelfContained])
@pytest.mark.filterwarnings("ignore:ReliabilityOTLoss evaluates without knowledge")
def test_monitors_only_watch(client):
    alone, logged_alone, before, _ = fit(client, epochs=3)
    model, logged, after, _ = fit(client, InfluenceMonitor(1), DriftMonitor(), epochs=3)
    assert after.losses == before.losses
    assert after.clips == before.clips
    assert after.knowledge == before.knowledge
    assert_same_weights(model, alone)
    monitored = {*RDM, *OBI}
    assert logged.names == logged_alone.names | monitored
    for name in logged_alone.names - {"ask/refresh_seconds", "ask/pairs_per_second"}:
        assert logged.values(name) == logged_alone.values(name), name


def test_gradients_are_untouched_by_a_measurement():
    gradients = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients[-1].append([p.grad.clone() for p in pl_module.model.parameters()])

    for monitors in ([], [InfluenceMonitor(1)]):
        gradients.append([])
        pl.seed_everything(0, verbose=False)
        model = InlineClient()
        module = wrap(model, {"temperature": lambda model: 1 / model.logit_scale.exp()})
        make_trainer(max_epochs=1, callbacks=[make_refresh(), *monitors, Look()]).fit(module, make_loader())
    for ours, theirs in zip(*gradients, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        assert any(one.abs().sum() > 0 for one in ours[-1:])


@pytest.mark.parametrize("fails", [False, True])
def test_the_loss_is_not_watched_after_the_run(fails):
    class Client(PlainTowers):
        def on_train_epoch_end(self):
            if fails:
                raise ZeroDivisionError

    module, monitor = wrap(Client()), InfluenceMonitor(1)
    for _ in range(2):
        run = make_trainer(max_epochs=1, callbacks=[make_refresh(), monitor])
        if fails:
            with pytest.raises(ZeroDivisionError):
                run.fit(module, make_loader())
        else:
            run.fit(module, make_loader())
        assert not module.loss._forward_hooks


def test_measured_with_ids():
    pl.seed_everything(0, verbose=False)
    logger = MemoryLogger()
    module = wrap(PlainTowers(), {"exclude_self": True, "positives": "ids"}, ids="clip_id")
    run = make_trainer(
        max_epochs=1, callbacks=[make_refresh(), InfluenceMonitor(1)], logger=logger, log_every_n_steps=1
    )
    run.fit(module, make_loader(captions_per_clip=2))
    assert all(value > 0 for value in logger.values(OBI[0]))


def test_barebones_trainer():
    callbacks = [make_refresh(1), InfluenceMonitor(1), DriftMonitor()]
    run = pl.Trainer(accelerator="cpu", barebones=True, max_epochs=1, callbacks=callbacks)
    run.fit(wrap(PlainTowers()), make_loader())

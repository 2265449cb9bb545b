"""A model whose parameters are divided among ranks is trained as a whole one is.

FSDP2 and FSDP run on two CPU processes here; `tests.helpers.sharded_run` says what stands in their way.
"""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities import consolidate_checkpoint
from lightning.pytorch.utilities import consolidate_checkpoint as consolidate_of_fsdp

from ask_lightning import ASKModule
from ask_lightning.callbacks.auto_period import AutoPeriod
from ask_lightning.knowledge.mapping import MappedRefresh
from ask_lightning.losses import ReliabilityOTLoss
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded_run import (
    EPOCHS,
    STEPS,
    CriterionTowers,
    FlatTowers,
    LargeTowers,
    MetaTowers,
    TowersAsAWhole,
    TowersInParts,
    TowersInSomeParts,
    fit,
    tau,
)

# 26 and 25 pairs are 6 and 5 batches of a refresh.
RUNS = {
    "fsdp2, part by part": ("fsdp2", {"client": TowersInParts}),
    "fsdp2, the text encoder whole": ("fsdp2", {"client": TowersInSomeParts}),
    "fsdp2, the model as one": ("fsdp2", {"client": TowersAsAWhole}),
    "fsdp2, encode": ("fsdp2", {"options": {"step": "encode"}}),
    "fsdp2, the model as one, encode": ("fsdp2", {"client": TowersAsAWhole, "options": {"step": "encode"}}),
    "fsdp2, criterion": ("fsdp2", {"client": CriterionTowers, "options": {"criterion": "criterion"}}),
    "fsdp": ("fsdp", {"client": FlatTowers}),
    "fsdp, encode": ("fsdp", {"client": FlatTowers, "options": {"step": "encode"}}),
    "fsdp, gradients only": ("fsdp_grad_op", {"client": FlatTowers}),
}
FORMATS = {
    "fsdp2, one file": ("fsdp2", TowersInParts, True),
    "fsdp2, directory": ("fsdp2", TowersInParts, False),
    "fsdp, directory": ("fsdp", FlatTowers, False),
}

# What a refresh encodes, and when; those of the training data find the rows of a batch by their clips.
OF_TRAINING_DATA = {"source": None, "options": {"ids": "clip_id"}}
MODES = {
    "rolling": {"mode": "rolling", "T": 3},
    "rolling, one item": {"mode": "rolling", "T": 51},  # one rank encodes nothing of its own
    "mapped": {"mode": MappedRefresh(0.4), "T": 1, "rows": 301},
    "write_back": {"write_back": True} | OF_TRAINING_DATA,
    "auto": {"T": AutoPeriod(max_drift=1e-3, max_share=1.0)} | OF_TRAINING_DATA,
}
NUM_ENCODED = {
    "rolling": 51 + 17 + 17,
    "rolling, one item": 51 + 1 + 1,
    "mapped": 301 + 120 + 120,
    "write_back": 2 * 8 * STEPS,
    "auto": EPOCHS * 8 * STEPS,
}


# The others are left to `pytest -m slow`.
USUAL = ("fsdp2, part by part", "fsdp2, the model as one", "fsdp")


@pytest.fixture(name="alone", scope="module")
def alone_fixture():
    return fit("auto", 1)


@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_a_run_is_that_of_one_process(name, alone):
    kind, options = RUNS[name]
    first, second = on_ranks(2, fit, kind, 2, grouped=False, **options)
    assert first["knowledge"] == second["knowledge"]
    assert len(set(first["knowledge"])) == 2
    assert first["losses"] == second["losses"]
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first["pairs"], alone["pairs"], rtol=1e-5, atol=1e-5)
    assert first["validation"] == second["validation"] > 0
    # After a validation FSDP2 keeps together what ran first, until the next backward pass.
    assert any(first["divided"]) == name.startswith("fsdp2")


def in_all_modes(kind: str, size: int) -> dict:
    return {name: fit(kind, size, client=FlatTowers, **settings) for name, settings in MODES.items()}


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_what_a_refresh_encodes_is_that_of_one_process(kind):
    alone = in_all_modes("auto", 1)
    first, second = on_ranks(2, in_all_modes, kind, 2, grouped=False)
    for name, expected in alone.items():
        assert first[name]["knowledge"] == second[name]["knowledge"]
        # Renewed in each epoch, by T each second one, or in each step.
        assert len(set(first[name]["knowledge"])) == len(set(expected["knowledge"])) >= EPOCHS
        assert first[name]["num_encoded"] == expected["num_encoded"] == NUM_ENCODED[name]
        torch.testing.assert_close(first[name]["losses"], expected["losses"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(first[name]["pairs"], expected["pairs"], rtol=1e-5, atol=1e-5)


def too_few_ids_on_rank_one(model, batch):
    return batch["clip_id"][model.trainer.global_rank :]


def error_of_a_refresh() -> str:
    try:
        fit("fsdp2", 2, options={"ids": too_few_ids_on_rank_one})
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_what_is_wrong_with_the_batch_of_one_rank_ends_all():
    first, second = on_ranks(2, error_of_a_refresh, grouped=False)
    assert second == "ValueError: There have to be 2 clip ids in this batch, but got 1."
    assert first == f"RuntimeError: Rank 1 failed while encoding the knowledge source. {second}"


def test_made_on_the_meta_device():
    first, second = on_ranks(2, fit, "fsdp2", 2, client=MetaTowers, grouped=False)
    assert all(first["divided"])
    assert first["knowledge"] == second["knowledge"]
    assert first["losses"] == second["losses"]
    assert first["losses"][-1] < first["losses"][0]


def gradient_of_first_step(kind: str, size: int, client: type, gather: bool) -> dict:
    """By the weights after a step of plain SGD with a rate of 1."""
    before = {name: value.clone() for name, value in seeded(client).state_dict().items()}
    after = fit(kind, size, client=client, epochs=1, loss={"gather": gather}, extra=(OneStep(),))["weights"]
    return {name: before[name] - value for name, value in whole(after).items() if "running" not in name}


class OneStep(pl.Callback):
    """Ends a run after its first step, which goes down the gradient itself."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        for group in optimizer.param_groups:
            group.update(lr=1.0, momentum=0.0)
        trainer.should_stop = True
        trainer.fit_loop.epoch_loop.max_steps = 1


def seeded(client: type[LargeTowers]) -> LargeTowers:
    pl.seed_everything(1, verbose=False)
    return client()


def whole(weights: dict) -> dict:
    """Of weights that may be divided."""
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in weights.items()
    }


def gradients() -> list[dict]:
    return [
        {
            kind: gradient_of_first_step(kind, 2, FlatTowers if kind == "fsdp" else TowersInParts, gather)
            for kind in ("ddp", "fsdp2", "fsdp")
        }
        for gather in (True, False)
    ]


def test_gradients(alone):
    expected = gradient_of_first_step("auto", 1, TowersInParts, True)
    gathered, local = on_ranks(2, gradients, grouped=False)[0]
    for found in gathered.values():
        for name, gradient in found.items():
            torch.testing.assert_close(gradient.reshape(-1), expected[name].reshape(-1), rtol=1e-5, atol=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for kind in ("fsdp2", "fsdp"):
        for name, gradient in local[kind].items():
            torch.testing.assert_close(
                gradient.reshape(-1), local["ddp"][name].reshape(-1), rtol=1e-5, atol=1e-5
            )
    assert any(
        not torch.allclose(gathered["ddp"][name], local["ddp"][name], rtol=1e-3) for name in local["ddp"]
    )


def means_around_refreshes() -> list:
    return [fit(kind, 2, client=FlatTowers, normed=True)["means"] for kind in ("fsdp2", "fsdp")]


def test_buffers_are_restored_after_a_refresh():
    first, second = on_ranks(2, means_around_refreshes, grouped=False)
    for (before, after), (elsewhere, _) in zip(first, second, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(before[:-1], after, strict=True))
        assert not torch.equal(before[0], before[1])
        assert not torch.equal(before[0], elsewhere[0])  # each rank has its own


def saved_and_resumed(directory: str, name: str) -> list[dict]:
    """A whole run, and one that goes on from the end of its first epoch, inside of a period of T."""
    kind, client, single_file = FORMATS[name]
    named = {"client": client, "single_file": single_file}
    complete = fit(kind, 2, **named)
    fit(kind, 2, directory, epochs=1, **named)
    # Elsewhere, so that the checkpoint stays as it is.
    resumed = fit(kind, 2, Path(directory) / "next", resume=Path(directory) / "last.ckpt", **named)
    return [run | {"weights": whole_or_none(run)} for run in (complete, resumed)]


def whole_or_none(run: dict) -> dict:
    """The weights, unless each rank has a part in a format of FSDP's own."""
    values = run["weights"].values()
    return {} if any(type(value).__name__ == "ShardedTensor" for value in values) else whole(run["weights"])


@pytest.fixture(name="saved", scope="module", params=FORMATS)
def saved_fixture(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return request.param, folder, on_ranks(2, saved_and_resumed, str(folder), request.param, grouped=False)


def test_resumed(saved):
    name, _, runs = saved
    for rank, (complete, resumed) in enumerate(runs):
        assert len(resumed["losses"]) == 2 * STEPS
        assert resumed["knowledge"] == complete["knowledge"][STEPS:]
        assert resumed["knowledge"][0] == complete["knowledge"][0]
        assert resumed["losses"] == complete["losses"][STEPS:]
        assert torch.equal(resumed["pairs"], complete["pairs"])
        assert all(torch.equal(resumed["weights"][key], one) for key, one in complete["weights"].items())
        # One file is made on rank 0; the parts of FSDP are no tensors that can be compared here.
        assert bool(complete["weights"]) == (
            name == "fsdp2, directory" or (name != "fsdp, directory" and rank == 0)
        )


def test_loaded_in_one_process(saved):
    name, folder, runs = saved
    _, client, is_file = FORMATS[name]
    path = folder / "next" / "last.ckpt"
    assert path.is_file() == is_file
    loss = ReliabilityOTLoss(num_neighbors=4, temperature=tau)
    wrapped = ASKModule.load_from_checkpoint(path, client(), loss)
    if not is_file:  # as `python -m` with these modules does
        checkpoint = consolidate_checkpoint._load_distributed_checkpoint(path)
        if "model" in checkpoint:
            checkpoint = consolidate_of_fsdp._format_checkpoint(checkpoint)
        path = path.with_suffix(".consolidated")
        torch.save(checkpoint, path)
    loaded = client.load_from_checkpoint(path, weights_only=True).state_dict()
    assert_equal(wrapped.state_dict(), loaded)
    assert_equal(runs[0][1]["weights"] or loaded, loaded)
    assert not torch.equal(loaded["text_encoder.weight"], seeded(client).text_encoder.weight)


def assert_equal(one: dict, other: dict) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_snapshots_beside_directories(saved):
    """Only the knowledge that the last checkpoint names is left."""
    folder = saved[1] / "next"
    (left,) = folder.glob("knowledge-*")
    assert "epoch=2" in left.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp"])
@pytest.mark.parametrize("single_file", [True, False])
def test_one_gpu(kind, single_file, tmp_path):
    """A group of one process on a GPU, which gloo on a CPU says nothing about: NCCL, streams, copies."""
    for run in on_ranks(1, one_gpu, kind, str(tmp_path), single_file, grouped=False):
        assert run["divided"]
        torch.testing.assert_close(run["losses"], run["expected"], rtol=1e-4, atol=1e-4)
        assert run["resumed"] == run["losses"][STEPS:]


def one_gpu(kind: str, directory: str, single_file: bool) -> dict:
    client = FlatTowers if kind == "fsdp" else TowersAsAWhole
    named = {"client": client, "single_file": single_file, "accelerator": "gpu"}
    expected = fit("auto", 1, client=client, accelerator="gpu")
    complete = fit(kind, 1, **named)
    fit(kind, 1, directory, epochs=1, **named)
    resumed = fit(kind, 1, directory, resume=Path(directory) / "last.ckpt", **named)
    return {
        "divided": kind == "fsdp" or all(complete["divided"]),
        "expected": expected["losses"],
        "losses": complete["losses"],
        "resumed": resumed["losses"],
    }

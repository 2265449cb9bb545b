"""DeepSpeed at the stages of ZeRO that keep parameters whole trains as DDP does.

It runs on two CPU processes here; `tests.helpers.deepspeed_strategy` says what stands in its way.
"""

from pathlib import Path

import pytest
import torch

from ask_lightning import ASKModule
from ask_lightning.losses import ReliabilityOTLoss
from tests.helpers.deepspeed_run import STAGES, VARIANTS, all_stages, all_variants, saved_and_resumed
from tests.helpers.deepspeed_strategy import HAS_DEEPSPEED
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded_run import STEPS, FlatTowers, tau

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed"),
]


@pytest.fixture(name="stages", scope="module")
def stages_fixture() -> list[dict]:
    return on_ranks(2, all_stages, grouped=False)


@pytest.fixture(name="variants", scope="module")
def variants_fixture() -> list[dict]:
    return on_ranks(2, all_variants, grouped=False)


@pytest.fixture(name="saved", scope="module", params=STAGES)
def saved_fixture(request, tmp_path_factory) -> tuple[str, Path, list[dict]]:
    pytest.importorskip("torchdata")
    folder = tmp_path_factory.mktemp("saved")
    runs = on_ranks(2, saved_and_resumed, request.param, str(folder), grouped=False)
    return request.param, folder, runs


def assert_as_ddp(runs: list[dict], kind: str) -> None:
    """The runs of both ranks by kind of strategy."""
    for run in runs:
        found, expected = run[kind], run["ddp"]
        assert found["warned"] == []
        assert len(set(found["knowledge"])) == len(set(expected["knowledge"]))
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["pairs"], expected["pairs"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["validation"], expected["validation"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=1e-5)
    first, second = (run[kind] for run in runs)
    assert first["knowledge"] == second["knowledge"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


@pytest.mark.parametrize("kind", STAGES)
def test_stages(stages, kind):
    assert_as_ddp(stages, kind)
    assert len(set(stages[0][kind]["knowledge"])) == 2
    assert stages[0][kind]["losses"][-1] < stages[0][kind]["losses"][0]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_variants(variants, name):
    assert_as_ddp([rank[name] for rank in variants], "deepspeed_2")


@pytest.mark.parametrize("kind", STAGES)
def test_parameters_without_gradient_are_named(stages, kind):
    (text,) = stages[0]["idle"][kind]
    assert text.startswith("The parameters head.weight, head.bias got no gradient")


@pytest.mark.parametrize(("name", "steps"), [("inside", 4), ("between", STEPS)])
def test_resumed(saved, name, steps):
    for rank in saved[2]:
        whole, resumed = rank["whole"], rank[name]
        assert resumed["losses"] == whole["losses"][steps:]
        assert resumed["knowledge"] == whole["knowledge"][steps:]
        assert torch.equal(resumed["pairs"], whole["pairs"])
        assert all(torch.equal(resumed["weights"][key], value) for key, value in whole["weights"].items())


def test_snapshots_beside_directories(saved):
    """Each checkpoint has its knowledge, and knowledge without a checkpoint is removed."""
    _, folder, _ = saved
    # That of epoch 0 is of the checkpoint inside the second epoch.
    assert {path.name[:17] for path in folder.glob("knowledge-*")} == {
        "knowledge-epoch=0",
        "knowledge-epoch=2",
    }
    (left,) = (folder / "between").glob("knowledge-*")
    assert "epoch=2" in left.name


def test_loaded_in_one_process(saved):
    """The directory by ASKModule, and, once it is converted, by the class of the model itself."""
    kind, folder, runs = saved
    weights = runs[0]["whole"]["weights"]
    loss = ReliabilityOTLoss(num_neighbors=4, temperature=tau)
    module = ASKModule.load_from_checkpoint(folder / "whole" / "last.ckpt", FlatTowers(), loss)
    assert_equal(module.state_dict(), weights)
    if kind != "deepspeed_0":
        path = folder / "converted.ckpt"
        assert_equal(FlatTowers.load_from_checkpoint(path, weights_only=True).state_dict(), weights)


def assert_equal(one: dict, other: dict) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(value, other[name]) for name, value in one.items())

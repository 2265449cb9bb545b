"""Training on several ranks is training on one: the same knowledge everywhere, the same loss."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from tests.helpers.distributed_run import fit
from tests.helpers.ranks import on_ranks


@pytest.fixture(name="alone", scope="module")
def alone_fixture():
    return fit(1)


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_is_that_of_one_process(alone, size, placement):
    results = on_ranks(size, fit, size, None, grouped=False, placement=placement)
    for result in results:
        assert result["sharded"] == (placement == "sharded")
        assert result["knowledge"] == results[0]["knowledge"]
        assert len(set(result["knowledge"])) == 2
        torch.testing.assert_close(result["losses"], alone["losses"], rtol=1e-5, atol=1e-5)
        for name, weight in alone["weights"].items():
            assert torch.equal(result["weights"][name], results[0]["weights"][name])
            torch.testing.assert_close(result["weights"][name], weight, rtol=1e-4, atol=1e-5)
        for name in ("ask/rdm_audio", "ask/rdm_text", "ask/mean_similarity_audio", "ask/knowledge_age"):
            assert result["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-3, abs=1e-5), name
    # The batches of the ranks make up the batch of one process.
    for step, clips in enumerate(alone["clips"]):
        seen = [clip for result in results for clip in result["clips"][step]]
        assert sorted(seen) == sorted(clips)


def test_placements_agree_to_the_last_bit():
    replicated, sharded = (
        on_ranks(2, fit, 2, None, grouped=False, placement=placement)
        for placement in ("replicated", "sharded")
    )
    for one, other in zip(replicated, sharded, strict=True):
        assert one["knowledge"] == other["knowledge"]
        assert one["losses"] == other["losses"]
        assert all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_precisions(precision):
    for result in on_ranks(2, fit, 2, None, grouped=False, precision=precision, storage="bfloat16"):
        assert all(torch.isfinite(torch.tensor(result["losses"])))
        assert result["bytes"] == (48 + 6) * 8 * 2 * 2


class Scales(pl.Callback):
    """The factor of the loss in each step."""

    def __init__(self) -> None:
        self.scales: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


def fit_in_float16() -> dict:
    """With "16-mixed" alone Lightning takes bfloat16 on a CPU."""
    mixed, scales = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")), Scales()
    return fit(2, precision=mixed, storage="float16", extra=(scales,)) | {"scales": scales.scales}


def assert_learned(result: dict, alone: dict) -> None:
    assert result["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-3)
    assert result["losses"][-1] < 0.5 * result["losses"][0]
    assert all(torch.isfinite(torch.tensor(result["losses"])))
    assert all(weight.isfinite().all() for weight in result["weights"].values())
    assert len(set(result["knowledge"])) == 2


def test_float16_with_steps_that_overflow(alone):
    first, second = on_ranks(2, fit_in_float16, grouped=False)
    assert_learned(first, alone)
    assert first["scales"][1] == 0.5 * first["scales"][0]  # the first step was skipped
    for name in ("losses", "knowledge", "scales"):
        assert first[name] == second[name]
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float16_on_a_gpu(alone):
    assert_learned(fit(1, precision="16-mixed", storage="float16", accelerator="gpu"), alone)


def test_local_batches():
    first, second = on_ranks(2, fit, 2, None, grouped=False, loss={"gather": False})
    assert first["losses"] != second["losses"]
    assert first["knowledge"] == second["knowledge"]
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())

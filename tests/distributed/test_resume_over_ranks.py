"""Runs on several ranks that were stopped or killed go on as if they had not been."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_case
import torch
from ranks import free_port, on_ranks
from run_case import fit

STEPS = 6


def assert_goes_on(resumed: list[dict], whole: list[dict], first_epoch: int) -> None:
    for now, before in zip(resumed, whole, strict=True):
        rest = slice(first_epoch * STEPS, None)
        assert now["clips"] == before["clips"][rest]
        assert now["knowledge"] == before["knowledge"][rest]
        assert now["losses"] == before["losses"][rest]
        for name, weight in before["weights"].items():
            assert torch.equal(now["weights"][name], weight)


@pytest.fixture(name="whole", scope="module", params=["replicated", "sharded"])
def whole_fixture(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return request.param, on_ranks(2, fit, 2, str(directory), grouped=False, placement=request.param)


@pytest.fixture(name="directory", scope="module")
def directory_fixture(whole, tmp_path_factory):
    """Of a run all of whose processes were killed inside epoch 3; the last checkpoint ends epoch 2."""
    directory = tmp_path_factory.mktemp("broken") / "run"
    kill(directory, 3, 2, (0, 1), whole[0])
    return directory


def kill(directory: Path, epoch: int, batch: int, ranks: tuple[int, ...], placement: str) -> None:
    stop = (run_case.Kill(epoch, batch, ranks),)
    with pytest.raises(AssertionError, match="ended without a word|Connection|closed|reset"):
        on_ranks(2, fit, 2, str(directory), grouped=False, extra=stop, placement=placement)
    assert (directory / "last.ckpt").exists()


def test_all_killed(whole, directory, tmp_path):
    placement, before = whole
    resumed = on_ranks(
        2, fit, 2, str(tmp_path), grouped=False, resume=str(directory / "last.ckpt"), placement=placement
    )
    assert_goes_on(resumed, before, first_epoch=3)


def test_one_killed(whole, tmp_path):
    placement, before = whole
    kill(tmp_path / "run", 1, 3, (1,), placement)
    resume = str(tmp_path / "run" / "last.ckpt")
    resumed = on_ranks(2, fit, 2, str(tmp_path / "run"), grouped=False, resume=resume, placement=placement)
    assert_goes_on(resumed, before, first_epoch=1)


@pytest.mark.parametrize("size", [1, 4])
def test_on_another_number_of_ranks(whole, directory, tmp_path, size):
    """The very knowledge that was in use; the global batch is the same, so the losses are but for rounding."""
    placement, before = whole
    arguments = (fit, size, str(tmp_path))
    named = {"resume": str(directory / "last.ckpt"), "placement": placement}
    if size == 1:
        results = [fit(*arguments[1:], **named)]
    else:
        results = on_ranks(size, *arguments, grouped=False, **named)
    for result in results:
        assert result["knowledge"] == before[0]["knowledge"][3 * STEPS :]
        torch.testing.assert_close(result["losses"], before[0]["losses"][3 * STEPS :], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("other", ["replicated", "sharded"])
def test_in_another_placement(whole, directory, tmp_path, other):
    placement, before = whole
    results = on_ranks(
        2, fit, 2, str(tmp_path), grouped=False, resume=str(directory / "last.ckpt"), placement=other
    )
    assert [result["sharded"] for result in results] == [other == "sharded"] * 2
    assert_goes_on(results, before, first_epoch=3)


def resume_without_one_file(directory: str, target: str, placement: str) -> list[str]:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(2, target, resume=f"{directory}/last.ckpt", placement=placement)
    assert all(torch.isfinite(torch.tensor(result["losses"])))
    return result["knowledge"], [str(warning.message) for warning in caught]


def test_a_missing_file_is_re_encoded_by_all(whole, directory, tmp_path):
    placement, before = whole
    shutil.copytree(directory, tmp_path / "run")
    files = sorted((tmp_path / "run").glob("knowledge-epoch=2*.safetensors"))
    files[-1].unlink()
    shutil.move(directory, directory.with_name("away"))
    try:
        results = on_ranks(
            2, resume_without_one_file, str(tmp_path / "run"), str(tmp_path), placement, grouped=False
        )
    finally:
        shutil.move(directory.with_name("away"), directory)
    (knowledge, warned), (knowledge_too, _) = results
    assert knowledge == knowledge_too
    assert knowledge[0] != before[0]["knowledge"][3 * STEPS]
    assert any(re.search("resumes with newly encoded knowledge instead of that of epoch 2", w) for w in warned)


def start(directory: Path, placement: str, resume: bool, slow: bool) -> list[subprocess.Popen]:
    """Two processes that train for long enough to be killed somewhere."""
    tests = Path(run_case.__file__).parents[1]
    port = free_port()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests / "distributed")]),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "soak",
    }
    command = [sys.executable, str(tests / "distributed" / "soak_case.py"), str(directory), placement]
    command += ["resume"] if resume else []
    return [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]

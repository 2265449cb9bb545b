"""Runs on several ranks that were stopped or killed go on as if they had not been."""

import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.helpers import distributed_run
from tests.helpers.distributed_run import fit as fit_in
from tests.helpers.ranks import free_port, on_ranks, python_path

STEPS = 6


def fit(*arguments, **settings) -> dict:
    """In float32: Lightning restores float64 weights through float32 ones."""
    return fit_in(*arguments, precision="32-true", **settings)


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
    stop = (distributed_run.Kill(epoch, batch, ranks),)
    with pytest.raises(AssertionError, match=r"ended without a word|Connection|closed|reset"):
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


def test_running_means_are_those_of_the_checkpoint(tmp_path):
    """Resumed where a refresh is due: the encoders of the checkpoint are those that encode the source."""
    named = {"grouped": False, "normed": True}
    whole = on_ranks(2, fit, 2, str(tmp_path / "whole"), **named)
    on_ranks(2, fit, 2, str(tmp_path / "run"), epochs=2, **named)
    resume = str(tmp_path / "run" / "last.ckpt")
    resumed = on_ranks(2, fit, 2, str(tmp_path / "again"), resume=resume, **named)
    assert len(set(whole[0]["knowledge"])) == 2
    for now, before in zip(resumed, whole, strict=True):
        assert now["knowledge"] == before["knowledge"][2 * STEPS :]
        assert now["losses"] == before["losses"][2 * STEPS :]


@pytest.mark.parametrize("size", [1, 4])
def test_on_another_number_of_ranks(whole, directory, tmp_path, size):
    """The very knowledge that was in use; the global batch is the same, the losses up to rounding."""
    placement, before = whole
    arguments = (fit, size, str(tmp_path))
    named = {"resume": str(directory / "last.ckpt"), "placement": placement}
    if size == 1:
        results = [fit(*arguments[1:], **named)]
    else:
        results = on_ranks(size, *arguments, grouped=False, **named)
    for result in results:
        assert result["knowledge"] == before[0]["knowledge"][3 * STEPS :]
        torch.testing.assert_close(result["losses"], before[0]["losses"][3 * STEPS :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("other", ["replicated", "sharded"])
def test_in_another_placement(whole, directory, tmp_path, other):
    _, before = whole
    results = on_ranks(
        2, fit, 2, str(tmp_path), grouped=False, resume=str(directory / "last.ckpt"), placement=other
    )
    assert [result["sharded"] for result in results] == [other == "sharded"] * 2
    assert_goes_on(results, before, first_epoch=3)


def resume_without_one_file(directory: str, target: str, placement: str) -> tuple[list, list[str]]:
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
    assert any("resumes with newly encoded knowledge instead of that of epoch 2" in text for text in warned)


def run_until_it_ends(
    directory: Path, log: Path, placement: str, deaths: tuple[tuple[str, int], tuple[str, int]]
) -> list[int]:
    """Exit codes of two processes, of which each dies as `deaths` says."""
    root = Path(distributed_run.__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": python_path(root),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "soak",
    }
    script = str(root / "tests" / "helpers" / "soak.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(directory), str(log), placement, kind, str(count)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank, (kind, count) in enumerate(deaths)
    ]
    try:
        return [process.wait(120) for process in processes]
    finally:
        for process in processes:
            process.kill()


def read_diary(path: Path) -> dict[tuple[str, str], set[str]]:
    """What was written down for each step, once or again."""
    steps: dict[tuple[str, str], set[str]] = {}
    for line in path.read_text().splitlines():
        epoch, batch, rest = line.split(" ", 2)
        steps.setdefault((epoch, batch), set()).add(rest)
    return steps


@pytest.mark.soak
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_killed_at_twenty_moments(tmp_path, placement):
    """Every loss of a run that dies twenty times is, bit for bit, that of a run that never does."""
    alive = (("none", 0), ("none", 0))
    assert run_until_it_ends(tmp_path / "whole", tmp_path / "whole.log", placement, alive) == [0, 0]
    draw = random.Random(0)
    kinds = ["step", "refresh", "snapshot", "checkpoint"] * 5
    draw.shuffle(kinds)
    for number, kind in enumerate(kinds):
        last = {"step": 9, "refresh": 8, "snapshot": 2, "checkpoint": 4}[kind]
        death, life = (kind, draw.randint(1, last)), ("none", 0)
        ways = [(death, life), (death, death), (life, death)]
        writes_alone = kind == "checkpoint" or (kind == "snapshot" and placement == "replicated")
        deaths = draw.choice(ways[:2] if writes_alone else ways)
        codes = run_until_it_ends(tmp_path / "run", tmp_path / "run.log", placement, deaths)
        print(number, deaths, codes)
        if codes == [0, 0]:  # the run had ended: another one
            shutil.rmtree(tmp_path / "run")
        else:
            assert -signal.SIGKILL in codes, (number, deaths, codes)
    assert run_until_it_ends(tmp_path / "run", tmp_path / "run.log", placement, alive) == [0, 0]
    for rank in range(2):
        expected = read_diary(tmp_path / f"whole.log.{rank}")
        assert len(expected) == 48
        assert read_diary(tmp_path / f"run.log.{rank}") == expected

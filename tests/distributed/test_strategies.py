"""Every way in which Lightning starts several processes ends with the weights of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import distributed_run
from tests.helpers.ranks import free_port, python_path

ROOT = Path(distributed_run.__file__).parents[2]


def start(strategy: str, output: Path, devices: int, nodes: int = 1, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, distributed_run.__file__, strategy, str(output), str(devices), str(nodes)],
        env=os.environ
        | {
            "PYTHONPATH": python_path(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_weights(path: Path, expected: dict) -> None:
    for name, weight in torch.load(path, weights_only=True).items():
        torch.testing.assert_close(weight.double(), expected[name].double(), rtol=1e-4, atol=1e-5)


@pytest.fixture(name="expected", scope="module")
def expected_fixture():
    return distributed_run.fit(1)["weights"]


# All but the usual one are left to `pytest -m slow`.
OTHERS = ("ddp_spawn", "ddp_notebook", "ddp_find_unused_parameters_true")


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_strategy(strategy, expected, tmp_path):
    process = start(strategy, tmp_path / "weights.pt", 2)
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    assert_weights(tmp_path / "weights.pt", expected)


@pytest.mark.slow
def test_two_nodes(expected, tmp_path):
    """Two machines, as Lightning's own environment variables describe them."""
    port = str(free_port())
    nodes = [
        start(
            "ddp",
            tmp_path / "weights.pt",
            1,
            2,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            NODE_RANK=str(rank),
            LOCAL_RANK="0",
        )
        for rank in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=150)
        assert node.returncode == 0, errors
    assert_weights(tmp_path / "weights.pt", expected)

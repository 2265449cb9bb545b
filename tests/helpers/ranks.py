"""Functions run by several real processes that talk over gloo, and what they return."""

import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from random import SystemRandom
from typing import Any

import torch
import torch.distributed as dist

# Fresh processes are forked from one that has imported what takes seconds and done nothing else.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "lightning.pytorch", "ask_lightning", "faiss"])
_PATIENCE_SECONDS = 180


def on_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, grouped: bool = True, **named: Any
) -> list[Any]:
    """What a function of a test module returns in each of `size` processes.

    Args:
        size: Number of processes, which are one torch process group.
        function: Of the top level of a module.
        arguments: For the function.
        named: For the function, too.
        grouped: Whether the group is made here; a `Trainer` with `strategy="ddp"` makes its own.

    Raises:
        AssertionError: A process failed, with its traceback, or did not end.
    """
    port = free_port()
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _CONTEXT.Process(target=_run, args=(rank, size, port, sending, function, arguments, named, grouped))
        for rank, (_, sending) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, sending in pipes:
        sending.close()
    try:
        outcomes = [_receive(receiving) for receiving, _ in pipes]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    failures = [f"rank {rank}:\n{text}" for rank, (_, text) in enumerate(outcomes) if text]
    assert not failures, "\n".join(failures)
    return [torch.load(BytesIO(content), weights_only=False) for content, _ in outcomes]


def _receive(pipe: Any) -> tuple[bytes, str]:
    if not pipe.poll(_PATIENCE_SECONDS):
        return b"", "did not end in time"
    try:
        return pipe.recv()
    except EOFError:
        return b"", "ended without a word"


def _run(
    rank: int, size: int, port: int, pipe: Any, function: Any, arguments: Any, named: Any, grouped: bool
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "HF_HUB_OFFLINE": "1",
    }
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        if grouped:
            dist.init_process_group("gloo", rank=rank, world_size=size)
        stored = BytesIO()
        torch.save(function(*arguments, **named), stored)
        pipe.send((stored.getvalue(), ""))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        pipe.send((b"", traceback.format_exc()))
        sys.exit(1)


def python_path(*folders: Path) -> str:
    """The environment's value for a subprocess that shall find these folders as well."""
    return os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])


def free_port() -> int:
    """A port that is free, and none of those that the system gives to connections and may take next."""
    while True:
        port = SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port

"""What the benchmarks share: tasks that take turns, medians over rounds, and the machine that ran them."""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Task = Callable[[], object]


# A task is repeated within a round until it has taken this long: none is measured on cold caches alone.
_SHORTEST_SECONDS = 0.005


def medians(rounds: int, device: torch.device | str = "cpu", **tasks: Task) -> dict[str, float]:
    """Milliseconds of each task: the median over rounds in which all of them run, after a first one."""
    times = seconds_of_rounds(rounds, device, **tasks)
    return {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}


def seconds_of_rounds(
    rounds: int, device: torch.device | str = "cpu", **tasks: Task
) -> dict[str, list[float]]:
    """Seconds of each task in each round; every other round runs the tasks backwards."""
    measure = on_gpu if torch.device(device).type == "cuda" else on_cpu
    for task in tasks.values():
        task()
    repeats = {name: math.ceil(_SHORTEST_SECONDS / measure(task, 1)) for name, task in tasks.items()}
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds):
        for name in list(tasks)[:: -1 if number % 2 else 1]:
            times[name].append(measure(tasks[name], repeats[name]))
    return times


def on_cpu(task: Task, repeats: int) -> float:
    """With one thread the time that the process computes, which others on the machine hardly change."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    for _ in range(repeats):
        task()
    return (clock() - started) / repeats


def on_gpu(task: Task, repeats: int) -> float:
    """From an idle device to the end of the last kernel: launches that the device has to wait for count."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        task()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a reader has to know of the machine and the packages."""
    found: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__}
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    else:
        found["threads"] = torch.get_num_threads()
    return found


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(path: Path | None, device: torch.device | str, rows: list[dict[str, Any]]) -> None:
    """Keep rows of results with the machine they were taken on, if a path is given."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(device), "rows": rows}, indent=1) + "\n")

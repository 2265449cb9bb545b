"""One task, and the methods that are trained on it for several tables and figures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ask_lightning.metrics.table import mean_recall
from ask_lightning.reproduce.comparison import Method, compare, describe_run
from ask_lightning.reproduce.data_checksum import data_checksum
from ask_lightning.reproduce.methods import LossVariant, loss_methods
from ask_lightning.reproduce.run_table import FailedRun, Run, RunTable
from ask_lightning.reproduce.tasks.task import Task


@dataclass(frozen=True)
class Entry:
    """A method of a study.

    Attributes:
        name: Name of its runs. An entry that several tables have is trained once; two that differ need
            different names.
        variant: The loss and its options.
        tokens: How clips and captions are compared by their tokens, `"prototypes"` or `"frames"`; None: by
            pooled embeddings.
        like: The entry whose chosen settings it is trained with. None: it chooses its own.
        one_seed: Whether the first seed is enough.
    """

    name: str
    variant: LossVariant
    tokens: str | None = None
    like: Entry | None = None
    one_seed: bool = False


@dataclass(frozen=True)
class Trained:
    """The runs of an entry.

    Attributes:
        method: What the runs were built by.
        runs: Runs with the chosen settings, seed by seed.
        tuning: Runs that settings were chosen from; none if the entry takes those of another one.
    """

    method: Method
    runs: tuple[Run, ...]
    tuning: tuple[Run, ...]

    @property
    def test_recalls(self) -> list[float]:
        """The mean of the six recalls on the test part in percent, seed by seed."""
        return [100 * mean_recall(run.metrics.test) for run in self.runs]


class Study:
    """Trains entries on a task, each once for everything that needs it, and goes on where it stopped.

    Settings are chosen for search by cosine similarity, on the validation part with the first seed, from
    equally many candidates for all entries that choose.

    Args:
        task: Data, model and schedule.
        output: Folder of the runs.
        seeds: Seeds, at least one.
        num_candidates: Number of settings that each entry tries, in [1, 8].
        jobs: Number of runs at a time.
        threads: Number of CPU threads of each run.
        log: A function that is called with a line about each finished run.
    """

    def __init__(
        self,
        task: Task,
        output: Path,
        *,
        seeds: Sequence[int] = range(5),
        num_candidates: int = 4,
        jobs: int = 1,
        threads: int = 1,
        log: Callable[[str], object] = print,
    ) -> None:
        self.task = task
        self.output = output
        self.seeds = tuple(seeds)
        self.num_candidates = num_candidates
        self.jobs = jobs
        self.threads = threads
        self._log = log
        self._left = 0
        self._started = time.perf_counter()
        self._finished = 0

    def announce(self, entries: Iterable[Entry]) -> None:
        """Count the runs that entries need and that are not yet there, for the time that is left.

        Args:
            entries: All entries that are to be trained.
        """
        table = RunTable(self.output)
        there = Counter(method for method, _, _ in (*table.read(), *table.read_failed()))
        needed = with_origins(entries)
        self._left = sum(max(0, self._num_runs(entry) - there[name]) for name, entry in needed.items())
        self._started, self._finished = time.perf_counter(), 0
        self._log(f"{self._left} runs to do, {sum(there.values())} are there.")

    def train(self, entries: Iterable[Entry]) -> dict[str, Trained]:
        """Train entries, as far as they are not yet trained.

        Args:
            entries: The entries.

        Returns:
            Their runs and those of the entries whose settings they take, by name.

        Raises:
            ValueError: Two entries of one name differ.
            RunsError: The folder holds runs with other options, or damaged ones.
            RuntimeError: All candidates of an entry diverged, or a run failed otherwise. Runs that are
                finished are kept.
        """
        needed = with_origins(entries)
        choosing = [(entry, self._method(entry)) for entry in needed.values() if entry.like is None]
        trained = self._compare(choosing, self.seeds)
        following = [entry for entry in needed.values() if entry.like is not None]
        for seeds, group in (
            (self.seeds, [entry for entry in following if not entry.one_seed]),
            (self.seeds[:1], [entry for entry in following if entry.one_seed]),
        ):
            methods = []
            for entry in group:
                assert entry.like is not None
                settings = trained[entry.like.name].runs[0].settings
                methods.append((entry, replace(self._method(entry), candidates=(settings,))))
            trained |= self._compare(methods, seeds)
        return trained

    def _compare(self, methods: Sequence[tuple[Entry, Method]], seeds: Sequence[int]) -> dict[str, Trained]:
        if not methods:
            return {}
        compared = compare(
            [method for _, method in methods],
            self.task.protocol(),
            self.output,
            seeds=seeds,
            jobs=self.jobs,
            threads=self.threads,
            calibrated=False,
            on_run=self._tell,
        )

        def of(method: Method, runs: Iterable[Run]) -> tuple[Run, ...]:
            return tuple(run for run in runs if run.method == method.name)

        return {
            entry.name: Trained(
                method, of(method, compared.raw), () if entry.like else of(method, compared.tuning)
            )
            for entry, method in methods
        }

    def _method(self, entry: Entry) -> Method:
        """The method of an entry, with the candidates that it chooses from."""
        make_model: Callable[..., object] = self.task.make_model
        if entry.tokens is not None:
            if self.task.make_token_model is None:
                raise ValueError(f"The task {self.task.name} has no model that is compared by tokens.")
            make_model = partial(self.task.make_token_model, entry.tokens)
        (method,) = loss_methods(
            {entry.name: entry.variant},
            make_model,  # type: ignore[arg-type]
            learning_rate=self.task.learning_rate,
            num_candidates=self.num_candidates,
            refresh=self.task.refresh,
        )
        description = dict(method.description)
        if entry.tokens is not None:
            description["tokens"] = entry.tokens
        if "source" in entry.variant.refresh:  # whose files the checksum of the task does not cover
            source = entry.variant.refresh["source"]()
            description["knowledge"] = data_checksum({"knowledge": source})
        return replace(method, description=description)

    def _num_runs(self, entry: Entry) -> int:
        num_seeds = 1 if entry.one_seed else len(self.seeds)
        return num_seeds if entry.like else self.num_candidates + num_seeds - 1

    def _tell(self, run: Run | FailedRun) -> None:
        """A line about a finished run, with the time that is left."""
        self._finished += 1
        self._left = max(0, self._left - 1)
        seconds = self._left * (time.perf_counter() - self._started) / self._finished
        self._log(f"{self._left} runs, about {readable_time(seconds)} left · {describe_run(run)}")


def with_origins(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Entries by name, with those whose settings they take before them.

    Args:
        entries: The entries, some perhaps more than once.

    Raises:
        ValueError: Two entries of one name differ, so that one would be taken for the other.
    """
    needed: dict[str, Entry] = {}
    for entry in entries:
        for one in (entry,) if entry.like is None else (entry.like, entry):
            if needed.setdefault(one.name, one) != one:
                raise ValueError(
                    f"Argument `entries` has to give every entry a name of its own, but got {one.name!r} for "
                    f"two that differ: {needed[one.name]} and {one}. Rename one."
                )
    return needed


def readable_time(seconds: float) -> str:
    """A length of time for a reader.

    Args:
        seconds: The time, at least 0.

    Examples:
        >>> readable_time(50), readable_time(600), readable_time(9000)
        ('50 s', '10 min', '2 h 30 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"

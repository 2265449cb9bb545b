"""`ask-lightning reproduce`: tables and figures of the paper, and first experiments, over seeds."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ask_lightning.cli.errors import UsageError, check_writable, usage_errors
from ask_lightning.cli.run_lock import locked_run
from ask_lightning.cli.run_options import FlagParser
from ask_lightning.reproduce import MAX_CANDIDATES, silence_lightning
from ask_lightning.reproduce.artifacts import ARTIFACTS, EXPERIMENTS, Artifact
from ask_lightning.reproduce.run_table import RunsError
from ask_lightning.reproduce.study import Study
from ask_lightning.reproduce.tasks import TASKS, Task, quick_options

_EPILOG = """\
names:
{names}
  paper         all tables and figures of the paper
  experiments   all experiments
  all           everything

--data NAME --help lists the flags of a kind of data. A repeated command continues where it stopped; finished
runs are shared by all tables and figures of one output folder.
"""


def reproduce(arguments: Sequence[str]) -> dict[str, str]:
    """Train what tables and figures need, and write them.

    Args:
        arguments: What follows `reproduce` on the command line.

    Returns:
        What each has to say, in Markdown, by name.

    Raises:
        UsageError: The command line cannot be used, or the folder holds runs with other options or damaged
            ones.
    """
    try:
        return _reproduce(arguments)
    except RunsError as error:
        raise UsageError(str(error)) from error


def _reproduce(arguments: Sequence[str]) -> dict[str, str]:
    options, own = parse_flags(arguments)
    check_writable(options.output / "runs", "Pass a folder of your own as `--output`.")
    with usage_errors():
        task = TASKS[options.data](**own)
        protocol = task.protocol()
        data = protocol.make_data(0)
        data.setup("fit")
    silence_lightning()
    wanted: list[Artifact] = []
    for artifact in options.artifacts:
        obstacle = artifact.obstacle(task)
        if obstacle is None:
            wanted.append(artifact)
        else:
            print(f"{artifact.label} is left out: {obstacle}.", flush=True)
    if not wanted:
        raise UsageError("Nothing is left to do.")
    folder = options.output / task.name
    texts: dict[str, str] = {}
    with locked_run(folder, "--output"):
        print(f"{task.name}: {task.sizes()}", flush=True)
        study = Study(
            task,
            folder / "runs",
            seeds=range(options.seeds),
            num_candidates=options.candidates,
            jobs=options.jobs,
            threads=options.threads,
            log=partial(print, flush=True),
        )
        task.prepare_runs(options.threads, partial(print, flush=True))
        study.announce(entry for artifact in wanted for entry in artifact.entries(task))
        for artifact in wanted:
            trained = study.train(artifact.entries(task))
            texts[artifact.name] = artifact.write(study, trained, folder)
            print(f"\n{artifact.label}: {artifact.title}\n\n{texts[artifact.name]}\n", flush=True)
    print(f"{folder} has every table (.md, .tex), figure (.png, .svg) and run (.csv).", flush=True)
    return texts


def parse_flags(arguments: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Parse the command line of `reproduce`.

    Args:
        arguments: What follows `reproduce` on the command line.

    Returns:
        The command's own options, and the arguments of the task by name.

    Raises:
        UsageError: The command line cannot be used.
    """
    names = "\n".join(f"  {artifact.name:<13} {artifact.title}" for artifact in ARTIFACTS.values())
    parser = FlagParser(
        usage="ask-lightning reproduce NAME [NAME ...] --data NAME [flags]",
        description=__doc__,
        epilog=_EPILOG.format(names=names),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument
    add("--data", choices=tuple(TASKS), required=True, help="the task that is trained on")
    add("--seeds", type=int, default=None, help="seeds of each method (default: 5; 2 with --quick)")
    add(
        "--candidates",
        type=int,
        default=None,
        help=f"settings that each method tries, up to {MAX_CANDIDATES} (default: 4; 1 with --quick)",
    )
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--threads", type=int, default=1, help="CPU threads of each run")
    add("--output", type=Path, default=Path("runs/reproduce"), help="folder to write to")
    add("--quick", action="store_true", help="tiny data and few epochs: whether everything runs, no result")
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        kind = next((name for name in TASKS if name in arguments), None)
        if kind is not None:
            print()
            _task_parser(TASKS[kind], kind, {}).print_help()
        raise SystemExit(0)
    # Names come first: the values of a task's own flags, which this parser does not know, look like them.
    count = next((place for place, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    options, others = parser.parse_known_args(arguments[count:])
    options.artifacts = _chosen(arguments[:count])
    options.seeds = _at_least_one("--seeds", options.seeds, 2 if options.quick else 5)
    options.candidates = _at_least_one("--candidates", options.candidates, 1 if options.quick else 4)
    if options.candidates > MAX_CANDIDATES:
        raise UsageError(f"Argument `--candidates` has to be at most {MAX_CANDIDATES}.")
    for name in ("jobs", "threads"):
        _at_least_one(f"--{name}", getattr(options, name), 1)
    quick = quick_options(options.data) if options.quick else {}
    task_parser = _task_parser(TASKS[options.data], options.data, quick)
    with usage_errors():
        own = task_parser.parse_args(others)
    return options, dict(own.as_dict())


def _task_parser(builder: Callable[..., Task], kind: str, defaults: dict[str, Any]) -> ArgumentParser:
    """A parser of the arguments of a task's builder."""
    parser = ArgumentParser(
        prog=f"ask-lightning reproduce NAME --data {kind}", exit_on_error=False, default_env=False
    )
    parser.add_function_arguments(builder, fail_untyped=True)
    parser.set_defaults(defaults)
    return parser


def _chosen(names: Sequence[str]) -> list[Artifact]:
    """Artifacts by name, each once, in the order of the list."""
    groups = {
        "all": set(ARTIFACTS),
        "paper": set(ARTIFACTS) - set(EXPERIMENTS),
        "experiments": set(EXPERIMENTS),
    }
    chosen: set[str] = set()
    if not names:
        raise UsageError(f"Say first what to reproduce: {', '.join([*ARTIFACTS, *groups])}.")
    for name in names:
        if name not in ARTIFACTS and name not in groups:
            raise UsageError(f"There is no {name!r}, only {', '.join([*ARTIFACTS, *groups])}.")
        chosen |= groups.get(name, {name})
    return [artifact for name, artifact in ARTIFACTS.items() if name in chosen]


def _at_least_one(flag: str, value: int | None, default: int) -> int:
    if value is None:
        return default
    if value < 1:
        raise UsageError(f"Argument `{flag}` has to be at least 1, but got {value}.")
    return value

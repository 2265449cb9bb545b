"""The flags that decide which config is read; all others are LightningCLI's."""

import os
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ask_lightning.cli.compose import Composition, compose
from ask_lightning.cli.demo import default_demo_folder, write_demo
from ask_lightning.cli.errors import UsageError

# Which checkpoint of the run folder these are names for.
_NAMED_CHECKPOINTS = ("last", "best")


class Flags(ArgumentParser):
    """A parser of the flags of a command, which says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving the program.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{message}. See `ask-lightning --help`.")


@dataclass
class Invocation:
    """A command line, as far as it is not for LightningCLI.

    Attributes:
        configs: Names and paths of configs.
        run: The folder of the run.
        datasets: The folder in which the datasets are.
        weights: The folder in which weights are that no hub has.
        demo: Whether to run on synthetic data with shrunken models.
        checkpoint: Path of the checkpoint, or what Lightning makes of the name.
        rest: Everything else.
    """

    configs: list[str]
    run: Path
    datasets: Path
    weights: Path
    demo: bool
    checkpoint: str | None
    rest: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "Invocation":
        """Take the flags of the composition out of a command line.

        Args:
            arguments: What follows the command.

        Raises:
            UsageError: A flag lacks its value, or names a checkpoint that is not there.

        Examples:
            >>> made = Invocation.parse(["--config", "clotho_ced_sonar_ask", "--data.batch_size", "8"])
            >>> str(made.run), made.rest
            ('runs/clotho_ced_sonar_ask', ['--data.batch_size', '8'])
        """
        parser = Flags(add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
        parser.add_argument("-c", "--config", action="append", default=[])
        parser.add_argument("--run")
        parser.add_argument("--datasets", default="data")
        parser.add_argument("--weights", default="weights")
        parser.add_argument("--ckpt_path", default=None)
        # Only with `=`, because what follows a flag without one would be taken for its value.
        demo, others = None, []
        for argument in arguments:
            if argument == "--demo" or argument.startswith("--demo="):
                demo = argument.partition("=")[2] or str(default_demo_folder())
            else:
                others.append(argument)
        known, rest = parser.parse_known_args(others)
        configs: list[str] = known.config
        name = Path(configs[0]).stem if configs else "unnamed"
        run = Path(getattr(known, "run", f"runs/{'demo-' if demo else ''}{name}"))
        return cls(
            configs=configs,
            run=run,
            datasets=Path(known.datasets if demo is None else demo),
            weights=Path(known.weights),
            demo=demo is not None,
            checkpoint=_find_checkpoint(known.ckpt_path, run),
            rest=rest,
        )

    def compose(self, instead: dict[str, str] | None = None) -> Composition:
        """The merged config; with `--demo` the data are written, too.

        Args:
            instead: See `compose`.

        Raises:
            UsageError: A config is not there or not readable, or the demo has nothing to shrink.
        """
        places = {
            "run": str(self.run),
            "name": self.run.name,
            "datasets": str(self.datasets),
            "weights": str(self.weights),
        }
        made = compose(self.configs, places, demo=self.demo, instead=instead)
        if self.demo:
            if not made.parts:
                raise UsageError(
                    "--demo shrinks the shipped parts of a config, but the config names none of them. Begin "
                    "it with `compose:` and the name of a shipped config, see docs/cli.md."
                )
            write_demo(self.datasets)
        return made

    def check_run_is_new(self, config: Mapping[str, Any]) -> None:
        """Refuse to mix a new run with another in the same folder.

        Args:
            config: What the run is made of.

        Raises:
            UsageError: A folder for its checkpoints holds some already.
        """
        # Ranks that are started by the first one may find its checkpoints.
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if not first or self.demo or self.checkpoint is not None:
            return
        for folder in (self.run / "checkpoints", *_checkpoint_folders(config)):
            if any(folder.glob("*.ckpt")):
                raise UsageError(
                    f"{folder} holds the checkpoints of a run. Go on with it by `--ckpt_path last`, or start "
                    "another one with `--run FOLDER`."
                )


def _checkpoint_folders(config: Mapping[str, Any]) -> list[Path]:
    """Where the callbacks of a config keep checkpoints."""
    callbacks = config.get("trainer", {}).get("callbacks") or []
    arguments = [entry.get("init_args") or {} for entry in callbacks if isinstance(entry, dict)]
    return [Path(given["dirpath"]) for given in arguments if given.get("dirpath")]


def _checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("*.ckpt"))


def _find_checkpoint(name: str | None, run: Path) -> str | None:
    if name is None or "://" in name or name == "hpc" or name.startswith("registry"):
        return name
    path = run / "checkpoints" / f"{name}.ckpt" if name in _NAMED_CHECKPOINTS else Path(name)
    if not path.is_file():
        there = ", ".join(str(one) for one in _checkpoints(run)) or "no others"
        raise UsageError(f"There is no checkpoint {str(path)!r}; in the folder of the run there are {there}.")
    return str(path)

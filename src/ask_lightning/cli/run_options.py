"""The flags of this command line itself, which decide the config; all others are LightningCLI's."""

import shlex
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ask_lightning.cli.compose import MONITOR, Composition, compose, shipped_classes
from ask_lightning.cli.demo_data import default_demo_folder, write_demo_data
from ask_lightning.cli.errors import UsageError
from ask_lightning.cli.flags import check_flags
from ask_lightning.cli.run_lock import is_first_process

# Values of `--ckpt_path` that stand for a file in the run folder.
_NAMED_CHECKPOINTS = ("last", "best")


class FlagParser(ArgumentParser):
    """A parser of flags that raises `UsageError` where argparse would print and leave the program."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse has to say.

        Args:
            message: The message of argparse.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{message}. See `ask-lightning --help`.")


@dataclass
class RunOptions:
    """The flags that decide which config is read and where the run writes.

    Attributes:
        configs: Names and paths of configs.
        run_folder: The folder of the run.
        datasets_folder: The folder in which the datasets are.
        weights_folder: The folder of weights that are on no hub.
        monitor: Name of the metric that the best epoch is chosen by. None: that of the config.
        demo: Whether to run on synthetic data with shrunken models.
        checkpoint: Path of the checkpoint, or a name that Lightning resolves.
        lightning_arguments: All other arguments, which LightningCLI parses.
        given: Names of these flags that were passed.
    """

    configs: list[str]
    run_folder: Path
    datasets_folder: Path
    weights_folder: Path
    monitor: str | None
    demo: bool
    checkpoint: str | None
    lightning_arguments: list[str] = field(default_factory=list)
    given: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "RunOptions":
        """Take these flags out of a command line.

        Args:
            arguments: What follows the command.

        Returns:
            The options, with the arguments that are left.

        Raises:
            UsageError: A flag lacks its value, or names a checkpoint that does not exist.

        Examples:
            >>> options = RunOptions.parse(["--config", "clotho_ced_sonar_ask", "--data.batch_size", "8"])
            >>> str(options.run_folder), options.lightning_arguments
            ('runs/clotho_ced_sonar_ask', ['--data.batch_size', '8'])
        """
        parser = FlagParser(add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
        parser.add_argument("-c", "--config", action="append", default=[])
        parser.add_argument("--run")
        parser.add_argument("--datasets")
        parser.add_argument("--weights")
        parser.add_argument("--monitor")
        parser.add_argument("--ckpt_path")
        # `--demo` takes its value after `=` only; argparse would take the next argument for it.
        demo_folder, others = None, []
        for argument in arguments:
            if argument == "--demo" or argument.startswith("--demo="):
                demo_folder = argument.partition("=")[2] or str(default_demo_folder())
            else:
                others.append(argument)
        known, lightning_arguments = parser.parse_known_args(others)
        if demo_folder and "datasets" in known:
            raise UsageError(
                f"--demo writes datasets of its own and would not read those in {known.datasets!r}. Leave "
                "out `--demo` or `--datasets`."
            )
        configs: list[str] = known.config
        name = Path(configs[0]).stem if configs else "unnamed"
        run_folder = Path(getattr(known, "run", f"runs/{'demo-' if demo_folder else ''}{name}"))
        return cls(
            configs=configs,
            run_folder=run_folder,
            datasets_folder=Path(demo_folder or str(getattr(known, "datasets", "data"))),
            weights_folder=Path(getattr(known, "weights", "weights")),
            monitor=getattr(known, "monitor", None),
            demo=demo_folder is not None,
            checkpoint=_find_checkpoint(getattr(known, "ckpt_path", None), run_folder),
            lightning_arguments=lightning_arguments,
            given=frozenset(vars(known)),
        )

    def compose(self, replacements: Mapping[str, str] | None = None) -> Composition:
        """Merge the configs; with `--demo`, also write the data.

        Args:
            replacements: Names of parts, by the name of the part that each one replaces.

        Returns:
            The merged config and the parts that it is made of.

        Raises:
            UsageError: A config is missing or not readable, or the demo has nothing to shrink.
        """
        composition = compose(self.configs, self._placeholders, demo=self.demo, replacements=replacements)
        if self.demo:
            if not composition.parts:
                raise UsageError(
                    "--demo shrinks the shipped parts of a config, but the config names none of them. Begin "
                    "it with `compose:` and the name of a shipped config, see docs/cli.md."
                )
            self._check_demo_knows(composition)
            write_demo_data(self.datasets_folder)
        return composition

    def check_flags(self, command: str) -> None:
        """Refuse flags that no command knows, in a fraction of the time that the parser takes.

        Args:
            command: The command.

        Raises:
            UsageError: A flag is unknown, or a config is missing or not readable.
        """
        check_flags(command, compose(self.configs, self._placeholders).config, self.lightning_arguments)

    @property
    def _placeholders(self) -> dict[str, str]:
        """What stands in configs for folders and for the metric of the best epoch."""
        return {
            "run": str(self.run_folder),
            "name": self.run_folder.name,
            "datasets": str(self.datasets_folder),
            "weights": str(self.weights_folder),
        } | ({} if self.monitor is None else {MONITOR: self.monitor})

    def _check_demo_knows(self, composition: Composition) -> None:
        """Refuse to shrink a model or data that are not those of shipped parts."""
        shipped = shipped_classes(composition.parts)
        for section in ("model", "data"):
            flags = (f"--{section}", f"--{section}.class_path")
            given = [flag for flag in self.lightning_arguments if flag.partition("=")[0] in flags]
            named = (composition.config.get(section) or {}).get("class_path")
            if given or (named is not None and named not in shipped):
                raise UsageError(
                    f"--demo shrinks the models and data of shipped parts only, but `{section}` is "
                    f"{'given by ' + given[0] if given else named}. Leave out `--demo`, and choose small "
                    "sizes yourself."
                )

    def check_run_is_new(self, config: Mapping[str, Any]) -> None:
        """Refuse to mix a new run with an earlier one in the same folder.

        Args:
            config: The merged config.

        Raises:
            UsageError: A folder for checkpoints of this run holds some already.
        """
        # Later ranks start when the first one may have written checkpoints of this run.
        if not is_first_process() or self.demo or self.checkpoint is not None:
            return
        for folder in (self.run_folder / "checkpoints", *_checkpoint_folders(config)):
            found = sorted(file.stem for file in folder.glob("*.ckpt"))
            if found:
                # A full disk may have had room for the best one alone.
                name = "best" if "best" in found and "last" not in found else "last"
                raise UsageError(
                    f"{folder} holds the checkpoints of a run. Go on with it by `--ckpt_path {name}`, or "
                    "start another one with `--run FOLDER`."
                )


def repeated_flags(options: RunOptions) -> str:
    """The flags that the next command on the same run needs as well: configs, data, model and folders.

    Args:
        options: The flags of the command before.

    Returns:
        The flags with their values, quoted for a shell.

    Examples:
        >>> flags = ["--config", "my_recordings", "--data.root", "my sounds", "--trainer.max_epochs", "3"]
        >>> repeated_flags(RunOptions.parse(flags))
        "--config my_recordings --data.root 'my sounds'"
    """
    kept: list[str] = []
    for name in options.configs:
        kept += ["--config", name]
    kept += _flags_of(("--data", "--model"), options.lightning_arguments)
    folders = {
        "run": options.run_folder,
        "datasets": options.datasets_folder,
        "weights": options.weights_folder,
    }
    for name, folder in folders.items():
        if name in options.given:
            kept += [f"--{name}", str(folder)]
    if options.demo:
        kept.append(f"--demo={options.datasets_folder}")
    return shlex.join(kept)


def data_flags(arguments: Sequence[str]) -> list[str]:
    """The flags of the data with their values.

    Args:
        arguments: Arguments of a command.

    Examples:
        >>> data_flags(["--data.root", "sounds", "--trainer.max_epochs", "3", "--data.batch_size=4"])
        ['--data.root', 'sounds', '--data.batch_size=4']
    """
    return _flags_of(("--data",), arguments)


def _flags_of(sections: tuple[str, ...], arguments: Sequence[str]) -> list[str]:
    """The flags that begin with one of several texts, with their values."""
    kept, keep = [], False
    for argument in arguments:
        if argument.startswith("--"):
            keep = argument.startswith(sections)
        if keep:
            kept.append(argument)
    return kept


def _checkpoint_folders(config: Mapping[str, Any]) -> list[Path]:
    """The folders in which the callbacks of a config keep checkpoints."""
    callbacks = config.get("trainer", {}).get("callbacks") or []
    arguments = [entry.get("init_args") or {} for entry in callbacks if isinstance(entry, dict)]
    return [Path(given["dirpath"]) for given in arguments if given.get("dirpath")]


def _find_checkpoint(name: str | None, run_folder: Path) -> str | None:
    """The path of a checkpoint; names that Lightning resolves are returned as they are."""
    if name is None or "://" in name or name == "hpc" or name.startswith("registry"):
        return name
    folder = run_folder / "checkpoints"
    path = folder / f"{name}.ckpt" if name in _NAMED_CHECKPOINTS else Path(name)
    if not path.is_file():
        present = ", ".join(str(file) for file in sorted(folder.glob("*.ckpt"))) or "no others"
        raise UsageError(
            f"There is no checkpoint {str(path)!r}; in the folder of the run there are {present}."
        )
    return str(path)

"""Callbacks of every run of the command line."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ask_lightning.callbacks import RecallTable
from ask_lightning.callbacks.snapshots import checkpoint_directories
from ask_lightning.cli.errors import UsageError
from ask_lightning.utilities.atomic_files import atomic_write


class SavePortableConfig(SaveConfigCallback):
    """Saves the config of a run with `{run}` for its folder, so that `--run` repeats it in another folder.

    Args:
        parser: The parser of the command.
        config: The parsed config.
        *args: Further arguments of Lightning's `SaveConfigCallback`.
        **kwargs: Further arguments of Lightning's `SaveConfigCallback`.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any) -> None:
        run = config["trainer"]["default_root_dir"]
        if run is not None:
            config = config.clone()
            config["trainer"] = _replace_run_folder(config["trainer"], str(run))
        super().__init__(parser, config, *args, **kwargs)
        self._path: Path | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save the config, as a whole or not at all: half of one would pass for that of another command."""
        folder = trainer.log_dir  # collective
        if folder is not None and "://" not in folder:
            self.save_to_log_dir, self._path = False, Path(folder) / self.config_filename
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file, in the first process."""
        if self._path is not None:
            with atomic_write(self._path) as temporary:
                self.parser.save(self.config, str(temporary), skip_none=False, multifile=self.multifile)


class LoopMarker(Callback):
    """Notes whether batches run, as opposed to what is set up before.

    Attributes:
        is_running: Whether a loop over batches has begun. Training data are set up after the sanity check, so
            that the check's own loop counts only until its end.
    """

    def __init__(self) -> None:
        self.is_running = False

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.is_running = True

    def _stop(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.is_running = False

    on_sanity_check_start = on_train_start = on_validation_start = on_test_start = on_predict_start = _start
    on_sanity_check_end = _stop


class MonitorCheck(Callback):
    """Refuses at the start to look for the best epoch by a metric of validation that nobody logs."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of a monitor of validation where there is none."""
        if not trainer.enable_validation:
            for name, monitor in _monitors_of_validation(trainer):
                rank_zero_warn(f"There is no validation, so {name} finds no best epoch by {monitor!r}.")

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the monitors with what the first batches of validation have logged."""
        for name, monitor in _monitors_of_validation(trainer):
            if monitor not in trainer.callback_metrics:
                logged = ", ".join(sorted(filter(_is_of_validation, trainer.callback_metrics)))
                raise UsageError(
                    f"{name} goes by {monitor!r}, but validation logs {logged or 'nothing'}. Log it (a mean "
                    "recall is that of the recalls which `metrics.AudioTextRetrieval` computes), or choose "
                    "another metric by `--monitor`, or by `monitor` in your config or in its "
                    "`trainer.callbacks`."
                )


class ResumeHint(Callback):
    """Says after Ctrl-C and SIGTERM from where the run can go on."""

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Tells whether there is a checkpoint to go on from."""
        if not (isinstance(exception, (KeyboardInterrupt, SIGTERMException)) and trainer.training):
            return
        if any((folder / "last.ckpt").is_file() for folder in checkpoint_directories(trainer)):
            rank_zero_info("The same command with `--ckpt_path last` goes on from the last finished epoch.")
        else:
            rank_zero_info("No epoch was finished, so there is no checkpoint to go on from.")


def _monitors_of_validation(trainer: pl.Trainer) -> list[tuple[str, str]]:
    """The names of the callbacks that go by a metric of validation, and that metric."""
    # `RecallTable` marks what the others choose.
    callbacks = [one for one in trainer.callbacks if not isinstance(one, RecallTable)]  # type: ignore[attr-defined]
    monitors = [(type(callback).__name__, getattr(callback, "monitor", None)) for callback in callbacks]
    return [(name, monitor) for name, monitor in monitors if monitor and _is_of_validation(monitor)]


def _is_of_validation(name: str) -> bool:
    return name.startswith(("val/", "val_"))


def _replace_run_folder(value: Any, run: str) -> Any:
    """A section of the config with `{run}` in place of the folder of the run."""
    if isinstance(value, Namespace):
        entries = {name: _replace_run_folder(entry, run) for name, entry in vars(value).items()}
        return Namespace(**entries)  # type: ignore[no-untyped-call]
    if isinstance(value, dict):
        return {name: _replace_run_folder(entry, run) for name, entry in value.items()}
    if isinstance(value, list):
        return [_replace_run_folder(entry, run) for entry in value]
    if isinstance(value, str) and (value == run or value.startswith(f"{run}/")):
        return "{run}" + value.removeprefix(run)
    return value

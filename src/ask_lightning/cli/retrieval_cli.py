"""LightningCLI with a section for ASK, and a trainer that also encodes."""

import contextlib
import copy
import importlib
import json as json_module
import logging
import pickle
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

import ask_lightning.data
import ask_lightning.models  # so that their classes can be named without their modules
from ask_lightning import ASKModule
from ask_lightning.callbacks import RecallTable, SearchCalibration
from ask_lightning.callbacks.snapshots import checkpoint_directories
from ask_lightning.cli.ask_section import (
    SECTION,
    add_ask_arguments,
    ask_callbacks,
    ask_module,
    check_ask,
    check_compilation,
    check_encoders,
    check_knowledge_flags,
)
from ask_lightning.cli.checkpoint_io import AtomicCheckpointIO
from ask_lightning.cli.encode_split import SplitEncoder, encode_split
from ask_lightning.cli.encoded_pairs import EncodedPairs, check_output
from ask_lightning.cli.errors import UsageError, construct, usage_errors
from ask_lightning.cli.run_config import run_of_checkpoint, training_config
from ask_lightning.cli.run_lock import is_first_process, locked_run
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.clips import Clip
from ask_lightning.data.splits import Split
from ask_lightning.encoding.encoders import find_encoders, find_interaction
from ask_lightning.metrics import AudioTextRetrieval, Calibration, QueryBank
from ask_lightning.metrics.table import percentages, score_table, write_scores
from ask_lightning.models.retriever import FineTunedRetriever
from ask_lightning.utilities.arguments import check_choice
from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.distributed import Ranks
from ask_lightning.utilities.text_tables import print_table

# Lines of Lightning that tell the user of a command nothing.
_LITTER = (
    "💡 Tip",
    "GPU available",
    "TPU available",
    "HPU available",
    "Loading `train_dataloader`",
    "Seed set to",
)
# Hyperparameters of a model that describe its batches: the config decides them, not the checkpoint.
_BATCH_PARAMETERS = ("sample_rate",)
# Arguments of data that say which they are, and those that decide which clip is in which split.
_PLACE = ("root", "annotations", "hub")
_SPLITTING = ("fractions", "split_seed", "clip_id_column", "split_column", "collection")


def quiet_lightning() -> None:
    """Leave out tips, other lines that tell the user of a command nothing, and where warnings come from."""
    warnings.formatwarning = _format_warning
    for name in ("fabric", "pytorch"):
        for ending in ("rank_zero", "seed"):
            logging.getLogger(f"lightning.{name}.utilities.{ending}").addFilter(_is_no_litter)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as a line: who passes flags does not look into the code that warns."""
    return f"warning: {message}\n"


def _is_no_litter(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LITTER)


class RetrievalTrainer(pl.Trainer):
    """Lightning's trainer, which also tests calibrated search and writes down the embeddings of a split.

    Attributes:
        model_section: Class and arguments of the model as the config builds it, before any checkpoint. The
            command line sets it.
        calibration: Kind and parameters of calibrated search in the last test, or None.
        calibration_bank: The training pairs that calibrated it, or None.
        encoded_file: Path of the file that the last `encode` has written, or None.
    """

    model_section: dict[str, Any] | None = None
    calibration: Calibration | None = None
    calibration_bank: QueryBank | None = None
    encoded_file: Path | None = None

    def test(  # type: ignore[override]  # which has more arguments by position
        self,
        model: pl.LightningModule | None = None,
        *,
        datamodule: pl.LightningDataModule | None = None,
        calibrate: bool = True,
        untrained: bool = False,
        json: bool = False,
        ckpt_path: str | None = None,
        verbose: bool = True,
    ) -> list[Mapping[str, float]]:
        """Test a model by cosine similarity and, unless it is left out, in calibrated search.

        Args:
            model: The model.
            datamodule: The data.
            calibrate: Whether to report calibrated search as well. It costs a pass over the training split,
                which is the bank, and one over the validation split, on which kind and parameters are chosen.
            untrained: Whether to test the model also as the config builds it, without the checkpoint, and to
                print both by cosine in one table: what training has brought.
            json: Whether to print JSON alone to the standard output; the tables go to the standard error.
            ckpt_path: Path of a checkpoint whose weights are loaded; None for the model's present weights.
            verbose: Whether Lightning prints its table of all metrics.

        Returns:
            The metrics.

        Raises:
            UsageError: There is no checkpoint to compare the untrained model with.
        """
        with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
            before = self._test_untrained(datamodule, ckpt_path) if untrained else {}
            options = {"ckpt_path": ckpt_path, "verbose": verbose}
            metrics = self._test_calibrated(model, datamodule, calibrate, options)
            if untrained:
                rows = {"untrained": before, "trained": percentages(metrics[0], "test/")}
                print_table(*score_table(rows, "% of"), float_format=".1f")
                path = Path(self.default_root_dir) / "untrained.csv"
                write_scores(path, rows)
                print(f"The table is in {path} and {path.with_suffix('.json').name}.")
        if json and self.is_global_zero:
            said: dict[str, Any] = {"metrics": {name: float(value) for name, value in metrics[0].items()}}
            if untrained:
                said["untrained_percent"] = before
            said |= {"checkpoint": ckpt_path, "run": str(self.default_root_dir)}
            print(json_module.dumps(said, indent=2))
        return metrics

    def _test_untrained(self, datamodule: pl.LightningDataModule | None, checkpoint: Any) -> dict[str, float]:
        """The recalls in percent of the model as the config builds it."""
        if checkpoint is None or self.model_section is None:
            raise UsageError(
                "`--untrained true` compares a checkpoint with the model before it was trained: pass "
                "`--ckpt_path best`. Without it `test` tests the untrained model alone."
            )
        model = make_model(self.model_section)
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        kept, loggers = list(callbacks), self.loggers
        # The config is written beside the logs, which are those of the test with the checkpoint.
        callbacks[:] = [one for one in kept if not isinstance(one, (RecallTable, SaveConfigCallback))]
        self.loggers = []
        try:
            (metrics,) = super().test(model, datamodule=datamodule, verbose=False)
        finally:
            callbacks[:], self.loggers = kept, loggers
        return percentages(metrics, "test/")

    def _test_calibrated(
        self,
        model: pl.LightningModule | None,
        datamodule: pl.LightningDataModule | None,
        calibrate: bool,
        options: Mapping[str, Any],
    ) -> list[Mapping[str, float]]:
        """Test a model by cosine similarity and, if it shall be and can be, in calibrated search."""
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        calibration = SearchCalibration()
        if calibrate and (obstacle := _obstacle_to_calibration(model, datamodule)):
            rank_zero_info(f"Calibrated search is left out: {obstacle}.")
        elif calibrate:
            rank_zero_info(
                "The training and the validation split are encoded first, for calibrated search; "
                "`--calibrate false` leaves it out."
            )
            callbacks.append(calibration)
        try:
            return super().test(model, datamodule=datamodule, **options)
        finally:
            self.calibration, self.calibration_bank = calibration.calibration, calibration.bank
            if calibration in callbacks:
                callbacks.remove(calibration)

    def encode(
        self,
        model: pl.LightningModule,
        datamodule: ask_lightning.data.RetrievalDataModule,
        split: Split | Literal["all"] = "test",
        output: str | None = None,
        ckpt_path: str | None = None,
        calibrate: bool = False,
        tokens: Literal["float32", "float16", "none"] = "float32",
    ) -> EncodedPairs | None:
        """Encode a split of the data into a file that `ask-lightning search` reads; collective.

        Several processes divide the batches, and the first one writes the file. Until it is written, parts
        of it are in the folder `{output}.parts`. Where parts of the same model, data and options are left by
        a run that did not end, the others alone are encoded.

        Args:
            model: With methods that encode audio and text, such as `encode_audio` and `encode_text`.
            datamodule: The data.
            split: The split to encode. Training clips are encoded without random crops. `"all"`: all clips of
                one's own recordings.
            output: Path of the `.safetensors` file to write; by default `encoded-{split}.safetensors` in the
                folder of the run.
            ckpt_path: Path of a checkpoint whose weights are loaded; None for the model's present weights.
            calibrate: Whether to store what calibrated search needs. The training split is encoded as well,
                which is the bank, and the validation split, on which kind and parameters are chosen.
            tokens: How the frames and words of a model with an interaction are stored, by which `search`
                sorts what it finds; `"none"`: they are left out. Other models have none.

        Returns:
            The embeddings that were written; None in other processes than the first.

        Raises:
            UsageError: The data are of another kind, the file cannot be written, another process is writing
                it, the trainer has several devices under another strategy than DDP, an embedding has
                NaN or infinity, or what a model with an interaction finds shall be calibrated.
        """
        check_choice("tokens", tokens, ("float32", "float16", "none"))
        if calibrate and find_interaction(model) is not None:
            raise UsageError(
                f"Calibrated search is of cosine similarities, but {type(model).__name__} compares tokens. "
                "Leave `--calibrate` out."
            )
        if not hasattr(datamodule, "ordered_dataloader"):
            raise UsageError(
                f"{type(datamodule).__name__} does not say which clips are encoded in which order. Let it be "
                "a RetrievalDataModule of ask_lightning.data, such as DatasetsDataModule over your datasets."
            )
        path = Path(output or Path(self.default_root_dir) / f"encoded-{split}.safetensors")
        check_output(path)
        wanted = dict.fromkeys([split, "train", "val"] if calibrate else [split])
        # All loaders are made before the work, should a split not exist.
        loaders = {name: datamodule.ordered_dataloader(name) for name in wanted}
        if ckpt_path is not None:
            weights = torch.load(ckpt_path, map_location="cpu", weights_only=True)["state_dict"]
            model.load_state_dict(weights)
        dtype = None if tokens == "none" else getattr(torch, tokens)
        parts = path.with_name(f"{path.name}.parts")
        encoders: dict[str, SplitEncoder] = {}
        # Other datasets than this library's do not say what their items are, so that no part is used again.
        goes_on = all(isinstance(loader.dataset, ClipDataset) for loader in loaders.values())
        with locked_run(parts, "--output"), _hint_at_parts(parts) if goes_on else contextlib.nullcontext():
            for name, loader in loaders.items():
                # Frames and words are of the split alone: what calibrates it has none.
                encoders[name] = encode_split(
                    self, model, loader, parts / name, checkpoint=ckpt_path, tokens=dtype
                )
            return self._write(encoders, split, path, calibrate)

    def _write(
        self, encoders: Mapping[str, SplitEncoder], split: str, path: Path, calibrate: bool
    ) -> EncodedPairs | None:
        """Join the parts of a split, and those that calibrate it, and write the file; collective."""
        pairs = None
        try:
            with Ranks.current().all_or_none("writing the embeddings"):
                if self.is_global_zero:
                    encoded = {name: encoder.join() for name, encoder in encoders.items()}
                    pairs, report = encoded[split], None
                    if pairs.model["checkpoint"] is None and self.model_section is not None:
                        with contextlib.suppress(TypeError):  # arguments that no file can hold
                            pairs.model["init_args"] = json_module.dumps(self.model_section["init_args"])
                    if calibrate:
                        report = pairs.calibrate(training=encoded["train"], validation=encoded["val"])
                    pairs.save(path)
                    self.encoded_file = path
                    for encoder in encoders.values():
                        encoder.parts.remove()
                    print(f"{len(pairs.names)} clips and {len(pairs.captions)} captions are in {path}.")
                    if report is not None:
                        print(report)
        except RuntimeError as error:
            if self.is_global_zero:
                raise
            raise UsageError(str(error)) from error  # which the first process tells at length
        return pairs


@contextlib.contextmanager
def _hint_at_parts(folder: Path) -> Iterator[None]:
    """Say, if the work does not end, that the same command goes on from the parts that are written.

    Args:
        folder: Folder in which each split has a folder of parts.
    """
    try:
        yield
    except BaseException:
        count = sum(1 for _ in folder.glob("*/part-*"))
        if count and is_first_process():
            print(
                f"{count} parts are kept in {folder}: the same command goes on from there.", file=sys.stderr
            )
        raise


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


class RetrievalCLI(LightningCLI):
    """LightningCLI for the commands that train and evaluate a retrieval model; making one runs the command.

    Args:
        arguments: A command and its arguments.
        held_out: Evaluation clips of other datasets, to be kept out of the knowledge.

    Attributes:
        model: The trained module: an `ASKModule` if it trained with ASK, else the model itself.
        trainer: The trainer after the command.
        datamodule: The data of the command.
    """

    def __init__(self, arguments: Sequence[str], held_out: Sequence[Clip] = ()) -> None:
        self._arguments = list(arguments)
        self._held_out = held_out
        self._loop_marker = LoopMarker()
        options = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            trainer_class=RetrievalTrainer,
            save_config_callback=SavePortableConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs=options | {name: dict(options) for name in self.subcommands()},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=self._arguments,
            # Models configure their own optimizers.
            auto_configure_optimizers=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # which is static there
        """The command that runs; the others are left out, since to make a parser for each takes time."""
        commands = {**LightningCLI.subcommands(), "encode": {"model", "datamodule"}}
        return {name: skipped for name, skipped in commands.items() if name == self._arguments[0]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the section `ask`."""
        add_ask_arguments(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, without Lightning's warning that the program has a command line as well."""
        assert isinstance(args, list)
        with usage_errors():
            self.config = parser.parse_args(args)

    def _add_instantiators(self) -> None:
        # Lightning's own would note in checkpoints how this command line made the model, which its class and
        # hyperparameters say already.
        self.parser.add_instantiator(construct, object)

    def _parse_ckpt_path(self) -> None:
        # Newer versions of Lightning take the model's arguments from the checkpoint here;
        # `before_instantiate_classes` does so in all versions.
        pass

    def before_instantiate_classes(self) -> None:
        """Check the config, and take the model's arguments from the checkpoint if there is one."""
        command = self.subcommand
        assert command is not None
        config = self.config[command]
        check_ask(command, config[SECTION]["enabled"], self._arguments)
        _check_prediction(command, config)
        _check_sample_rates(config)
        _check_features(config)
        checkpoint = config.get("ckpt_path")
        if checkpoint is None and command != "fit":
            rank_zero_warn(f"There is no --ckpt_path: `{command}` uses the model as the config builds it.")
        section = config["model"]
        self._model_section = {
            "class_path": section["class_path"],
            "init_args": copy.deepcopy(section["init_args"].as_dict()) if section.get("init_args") else {},
        }
        if checkpoint and Path(checkpoint).is_file():
            flags = [
                flag.replace(".init_args.", ".") for flag in self._arguments if flag.startswith("--model.")
            ]
            given = {re.split(r"[.=]", flag)[1] for flag in flags}
            _take_arguments_from_checkpoint(config["model"], Path(checkpoint), given)
            if config.get("split") != "all":
                _warn_of_other_splits(config.get("data") or {}, Path(checkpoint))

    def instantiate_classes(self) -> None:
        """Make data, model and trainer."""
        with usage_errors():
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        with usage_errors(is_setup=lambda: not self._loop_marker.is_running):
            super()._run_subcommand(subcommand)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Wrap the model if it trains with ASK, and make the trainer."""
        callbacks = self._get(self.config_init, "trainer")["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        section = self._get(self.config_init, SECTION)
        # ASK takes part in training only.
        if section["enabled"] and self.subcommand == "fit":
            self.model = ask_module(self.model, section)
            check_knowledge_flags(self.model.loss, self._arguments)
            callbacks = [*ask_callbacks(self.model.loss, self.datamodule, section), *callbacks]
        elif self.subcommand in ("encode", "predict") or self.config_init[self.subcommand].get("calibrate"):
            check_encoders(self.model, section, str(self.subcommand))
        callbacks += [MonitorCheck(), ResumeHint(), self._loop_marker]
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        assert isinstance(trainer, RetrievalTrainer)
        if section["enabled"] and self.subcommand == "fit":
            check_compilation(section, trainer.strategy)
        trainer.model_section = self._model_section
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # no other one was asked for
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Keep the clips on which the model will be tested out of the knowledge."""
        if not self._held_out:
            return
        if isinstance(self.datamodule, ask_lightning.data.PublishedDataModule):
            self.datamodule.hold_out(self._held_out)
        elif isinstance(self.model, ASKModule):
            rank_zero_warn(
                f"{type(self.datamodule).__name__} is no PublishedDataModule: nobody checks whether its "
                "knowledge holds evaluation clips of the target."
            )

    def predict(self, model: pl.LightningModule, datamodule: Any, **options: Any) -> None:
        """Write the embeddings of the test split to `predictions.safetensors` in the folder of the run."""
        assert isinstance(self.trainer, RetrievalTrainer)
        output = str(Path(self.trainer.default_root_dir) / "predictions.safetensors")
        self.trainer.encode(model, datamodule, output=output, ckpt_path=options.get("ckpt_path"))


def _monitors_of_validation(trainer: pl.Trainer) -> list[tuple[str, str]]:
    """The names of the callbacks that go by a metric of validation, and that metric."""
    # `RecallTable` marks what the others choose.
    callbacks = [one for one in trainer.callbacks if not isinstance(one, RecallTable)]  # type: ignore[attr-defined]
    monitors = [(type(callback).__name__, getattr(callback, "monitor", None)) for callback in callbacks]
    return [(name, monitor) for name, monitor in monitors if monitor and _is_of_validation(monitor)]


def _is_of_validation(name: str) -> bool:
    return name.startswith(("val/", "val_"))


def _obstacle_to_calibration(
    model: pl.LightningModule | None, datamodule: pl.LightningDataModule | None
) -> str | None:
    """Why a test cannot be calibrated, or None if it can."""
    if model is None or not any(isinstance(part, AudioTextRetrieval) for part in model.modules()):
        return f"{type(model).__name__} has no metric AudioTextRetrieval"
    if find_interaction(model) is not None:
        return f"{type(model).__name__} compares tokens"
    try:
        find_encoders(model)
    except ValueError:
        return f"{type(model).__name__} has no methods `encode_audio` and `encode_text`"
    if not isinstance(datamodule, ask_lightning.data.RetrievalDataModule):
        return f"{type(datamodule).__name__} is no RetrievalDataModule"
    missing = [split for split in ("train", "val") if split not in datamodule.datasets]
    return f"the data have no split {' and '.join(missing)}" if missing else None


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


def _check_sample_rates(config: Any) -> None:
    """Refuse a model and data with different sample rates, which the batches would not reveal."""
    model_rate, data_rate = (
        (config.get(section) or {}).get("init_args", {}).get("sample_rate") for section in ("model", "data")
    )
    if model_rate is not None and data_rate is not None and model_rate != data_rate:
        raise UsageError(
            f"The model is told that waveforms have {model_rate} Hz, but the data have {data_rate} Hz. Pass "
            "the same as `--model.sample_rate` and `--data.sample_rate`."
        )


def _check_prediction(command: str, config: Any) -> None:
    """Refuse arguments of Lightning's `predict` that have no effect here."""
    given = [name for name in ("return_predictions", "weights_only") if config.get(name) is not None]
    if command == "predict" and given:
        raise UsageError(
            f"{', '.join(f'--{name}' for name in given)} has no effect, because `predict` writes a file. "
            "Leave it out."
        )


def _check_features(config: Any) -> None:
    """Refuse spectrograms for a model that computes its own from waveforms."""
    features = (config.get("data") or {}).get("init_args", {}).get("features")
    path = str((config.get("model") or {}).get("class_path"))
    if features is not None and issubclass(load_class(path), FineTunedRetriever):
        raise UsageError(
            f"{path} takes waveforms, but the data make {features!r} of them. Leave out `--data.features`."
        )


def _take_arguments_from_checkpoint(section: Any, path: Path, given: Collection[str]) -> None:
    """Replace the model's arguments by those in a checkpoint, which needs no published weights.

    Args:
        section: The section `model` of the config.
        path: Path of the checkpoint.
        given: Names of the arguments that the command line gives. Each one that is replaced is told.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        stored: dict[str, Any] = dict(checkpoint.get("hyper_parameters", {}))
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"{path} is no checkpoint that can be read: {reason}") from error
    arguments = section.get("init_args") or {}  # a class may have no arguments
    unknown = sorted(name for name in stored if name not in arguments)
    if unknown:
        raise UsageError(
            f"{path} is a checkpoint of another model than {section['class_path']}, which has no "
            f"{', '.join(f'`{name}`' for name in unknown)}. Pass the config with which it was trained."
        )
    changed = []
    for name, value in stored.items():
        if arguments[name] == value:
            continue
        if name in _BATCH_PARAMETERS:
            # The others resample to a rate of their own.
            kind = load_class(str(section["class_path"]))
            if not issubclass(kind, FineTunedRetriever):
                rank_zero_warn(
                    f"{path} was trained with {name}={value}, but it is {arguments[name]} now, which "
                    f"changes what {kind.__name__} hears. Pass `--model.{name} {value}` and the same as "
                    f"`--data.{name}`."
                )
            continue
        # Other arguments of a config name files that the checkpoint replaces.
        if isinstance(value, int | float) or name in given:
            changed.append(f"{name}={value!r} in place of {arguments[name]!r}")
        arguments[name] = value
    if changed:
        rank_zero_info(f"The model is built as its checkpoint says: {', '.join(changed)}.")


def _warn_of_other_splits(section: Any, checkpoint: Path) -> None:
    """Warn if the clips of a training are divided otherwise than in it.

    Args:
        section: The section `data` of the config.
        checkpoint: Path of the checkpoint, in the folder of its run.
    """
    trained = training_config(run_of_checkpoint(checkpoint)).get("data") or {}
    before, now = trained.get("init_args") or {}, section.get("init_args") or {}
    is_same = trained.get("class_path") == section.get("class_path")
    if not is_same or any(before.get(name) != now.get(name) for name in _PLACE):
        return
    changed = [
        f"{name}={now[name]!r} in place of {before[name]!r}"
        for name in _SPLITTING
        if name in before and name in now and _as_list(before[name]) != _as_list(now[name])
    ]
    if changed:
        rank_zero_warn(
            f"{checkpoint} was trained on other splits ({', '.join(changed)}): validation and test may hold "
            "its training clips. Pass the flags of the training."
        )


def _as_list(value: Any) -> Any:
    """A sequence as a list, as a file has it."""
    return list(value) if isinstance(value, tuple) else value


def make_model(section: Mapping[str, Any]) -> pl.LightningModule:
    """Make the model that a config describes.

    Args:
        section: Class and arguments of the model, as `class_path` and `init_args`. Arguments may be classes
            with arguments of their own.

    Returns:
        The model.

    Raises:
        UsageError: There is no such class, or it refuses an argument.

    Examples:
        >>> section = {"class_path": "ask_lightning.models.TinyRetriever", "init_args": {"width": 8}}
        >>> make_model(section).hparams["width"]
        8
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model")
    parser.add_instantiator(construct, object)
    with usage_errors():
        model = parser.instantiate_classes(parser.parse_object({"model": dict(section)}))["model"]
    assert isinstance(model, pl.LightningModule)
    return model


def load_class(path: str) -> Any:
    """Import a class by its dotted name.

    Args:
        path: The dotted name, such as `"ask_lightning.models.CEDSonar"`.

    Returns:
        The class.

    Raises:
        UsageError: There is no such class.

    Examples:
        >>> load_class("ask_lightning.models.TinyRetriever").__name__
        'TinyRetriever'
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"There is no class {path!r}: {error}.") from error

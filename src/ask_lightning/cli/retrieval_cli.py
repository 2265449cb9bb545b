"""LightningCLI with a section for ASK."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

import ask_lightning.data
import ask_lightning.models  # so that their classes can be named without their modules
from ask_lightning import ASKModule
from ask_lightning.callbacks import RandomStateCallback
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
from ask_lightning.cli.errors import UsageError, construct, usage_errors
from ask_lightning.cli.model_section import load_class, take_arguments_from_checkpoint
from ask_lightning.cli.run_callbacks import (
    LoopMarker,
    MonitorCheck,
    ResumeHint,
    SavePortableConfig,
)
from ask_lightning.cli.run_config import warn_of_other_data
from ask_lightning.cli.trainer import RetrievalTrainer
from ask_lightning.data.clips import Clip
from ask_lightning.models.retriever import FineTunedRetriever


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
            take_arguments_from_checkpoint(config["model"], Path(checkpoint), given)
            warn_of_other_data(
                config.get("data") or {},
                Path(checkpoint),
                uses_splits=config.get("split") != "all",
                goes_on=command == "fit",
            )

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
        callbacks += [MonitorCheck(), RandomStateCallback(), ResumeHint(), self._loop_marker]
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


def _check_prediction(command: str, config: Any) -> None:
    """Refuse arguments of Lightning's `predict` that have no effect here."""
    given = [name for name in ("return_predictions", "weights_only") if config.get(name) is not None]
    if command == "predict" and given:
        raise UsageError(
            f"{', '.join(f'--{name}' for name in given)} has no effect, because `predict` writes a file. "
            "Leave it out."
        )


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


def _check_features(config: Any) -> None:
    """Refuse spectrograms for a model that computes its own from waveforms."""
    features = (config.get("data") or {}).get("init_args", {}).get("features")
    path = str((config.get("model") or {}).get("class_path"))
    if features is not None and issubclass(load_class(path), FineTunedRetriever):
        raise UsageError(
            f"{path} takes waveforms, but the data make {features!r} of them. Leave out `--data.features`."
        )

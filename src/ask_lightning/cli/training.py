"""LightningCLI with a section for ASK, and a trainer that also encodes."""

import importlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

import ask_lightning.data
import ask_lightning.models  # so that their classes can be named without their modules
from ask_lightning import ASKModule
from ask_lightning.callbacks.snapshots import checkpoint_directories
from ask_lightning.cli.ask import SECTION, add_ask_arguments, ask_callbacks, ask_module, check_ask
from ask_lightning.cli.encoded import EncodedPairs, check_output, encode_pairs
from ask_lightning.cli.errors import UsageError
from ask_lightning.data.clips import Clip
from ask_lightning.data.splits import Split

# What describes the batches and not the model.
_OF_THE_DATA = ("sample_rate",)


class RetrievalTrainer(pl.Trainer):
    """Lightning's trainer, which can also write down the embeddings of a split."""

    def encode(
        self,
        model: pl.LightningModule,
        datamodule: ask_lightning.data.RetrievalDataModule,
        split: Split = "test",
        output: str | None = None,
        ckpt_path: str | None = None,
    ) -> EncodedPairs:
        """Encode a split of the data into a file that `ask-lightning search` reads.

        Args:
            model: With methods that encode audio and text, such as `encode_audio` and `encode_text`.
            datamodule: The data.
            split: Which; training clips without random crops.
            output: The file, `.safetensors`. None: `encoded-{split}.safetensors` in the folder of the run.
            ckpt_path: The checkpoint with the weights. None: those that the model was made with.

        Returns:
            What was written.
        """
        path = Path(output or Path(self.default_root_dir) / f"encoded-{split}.safetensors")
        check_output(path)
        loader = datamodule.ordered_dataloader(split)
        pairs = encode_pairs(self, model, loader, ckpt_path)
        pairs.save(path)
        print(f"{len(pairs.names)} clips and {len(pairs.captions)} captions are in {path}.")
        return pairs


class SavePortableConfig(SaveConfigCallback):
    """Saves the config of a run so that `--run` puts what it repeats into another folder.

    For arguments see Lightning's `SaveConfigCallback`.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any) -> None:
        run = config["trainer"]["default_root_dir"]
        if run is not None:
            config = config.clone()
            config["trainer"] = _with_placeholder(config["trainer"], str(run))
        super().__init__(parser, config, *args, **kwargs)


class HowToGoOn(Callback):
    """Says after Ctrl-C from where the run can go on."""

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Look for the last checkpoint."""
        if not (isinstance(exception, KeyboardInterrupt) and trainer.training):
            return
        if any((folder / "last.ckpt").is_file() for folder in checkpoint_directories(trainer)):
            rank_zero_info("The same command with `--ckpt_path last` goes on from the last finished epoch.")
        else:
            rank_zero_info("No epoch was finished, so there is no checkpoint to go on from.")


class RetrievalCLI(LightningCLI):
    """The commands that train and evaluate a model.

    Args:
        arguments: A command and its arguments. The command is run.
        held_out: Evaluation clips of other datasets, to be kept out of the knowledge.

    Attributes:
        model: What was trained: with ASK an `ASKModule`, else the model itself.
        trainer: The trainer after the command.
        datamodule: Its data.
    """

    def __init__(self, arguments: Sequence[str], held_out: Sequence[Clip] = ()) -> None:
        self._arguments = list(arguments)
        self._held_out = held_out
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
            # The models have their own.
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands and `encode`."""
        return {**LightningCLI.subcommands(), "encode": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the section `ask`."""
        add_ask_arguments(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; without the warning that the program has a command line as well."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    def _add_instantiators(self) -> None:
        # They would note in checkpoints how this command line made the model; its class shall be enough.
        pass

    def _parse_ckpt_path(self) -> None:
        # Newer versions of Lightning build the model by what the checkpoint says; here that is done below.
        pass

    def before_instantiate_classes(self) -> None:
        """Check the section `ask`; build the model as it was built for the checkpoint."""
        command = self.subcommand
        assert command is not None
        config = self.config[command]
        check_ask(config[SECTION]["enabled"], self._arguments)
        _check_rates(config)
        checkpoint = config.get("ckpt_path")
        if checkpoint is None and command != "fit":
            rank_zero_warn(f"There is no --ckpt_path: `{command}` uses the model as the config builds it.")
        if checkpoint and Path(checkpoint).is_file():
            _build_as_in_checkpoint(config["model"], Path(checkpoint))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Wrap the model where it shall train with ASK, and make the trainer."""
        callbacks = self._get(self.config_init, "trainer")["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        section = self._get(self.config_init, SECTION)
        # A trained model is evaluated as it is: ASK has no part in it.
        if section["enabled"] and self.subcommand == "fit":
            self.model = ask_module(self.model, section)
            callbacks = [*ask_callbacks(self.datamodule, section), *callbacks]
        callbacks.append(HowToGoOn())
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def before_fit(self) -> None:
        """Keep what the model will be tested on elsewhere out of the knowledge."""
        if not self._held_out:
            return
        if isinstance(self.datamodule, ask_lightning.data.PublishedDataModule):
            self.datamodule.hold_out(self._held_out)
        elif isinstance(self.model, ASKModule):
            rank_zero_warn(
                f"{type(self.datamodule).__name__} is no PublishedDataModule: nobody checks whether its "
                "knowledge holds evaluation clips of the target."
            )

    def predict(self, model: pl.LightningModule, datamodule: pl.LightningDataModule, **options: Any) -> None:
        """Write the embeddings of the test split to `predictions.safetensors` in the folder of the run."""
        assert isinstance(self.trainer, RetrievalTrainer)
        assert isinstance(datamodule, ask_lightning.data.RetrievalDataModule)
        output = str(Path(self.trainer.default_root_dir) / "predictions.safetensors")
        self.trainer.encode(model, datamodule, output=output, ckpt_path=options.get("ckpt_path"))


def _with_placeholder(value: Any, run: str) -> Any:
    """A section in which `{run}` stands for the folder of the run."""
    if isinstance(value, Namespace):
        entries = {name: _with_placeholder(entry, run) for name, entry in vars(value).items()}
        return Namespace(**entries)  # type: ignore[no-untyped-call]
    if isinstance(value, dict):
        return {name: _with_placeholder(entry, run) for name, entry in value.items()}
    if isinstance(value, list):
        return [_with_placeholder(entry, run) for entry in value]
    if isinstance(value, str) and (value == run or value.startswith(f"{run}/")):
        return "{run}" + value.removeprefix(run)
    return value


def _check_rates(config: Any) -> None:
    """Models resample from the rate that they are told; batches do not say theirs."""
    heard, given = (
        (config.get(section) or {}).get("init_args", {}).get("sample_rate") for section in ("model", "data")
    )
    if heard is not None and given is not None and heard != given:
        raise UsageError(
            f"The model is told that waveforms have {heard} Hz, but the data have {given} Hz. Pass the same "
            "as `--model.sample_rate` and `--data.sample_rate`."
        )


def _build_as_in_checkpoint(section: Any, path: Path) -> None:
    """Take the model's arguments from a checkpoint: it needs no published weights and knows all sizes."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        stored: dict[str, Any] = dict(checkpoint.get("hyper_parameters", {}))
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"{path} is no checkpoint that can be read: {reason}") from error
    arguments = section["init_args"]
    unknown = sorted(name for name in stored if name not in arguments)
    if unknown:
        raise UsageError(
            f"{path} is a checkpoint of another model than {section['class_path']}, which has no "
            f"{', '.join(f'`{name}`' for name in unknown)}. Pass the config with which it was trained."
        )
    changed = []
    for name, value in stored.items():
        if name in _OF_THE_DATA or arguments[name] == value:
            continue
        if isinstance(value, int | float):  # others say where the weights of before came from
            changed.append(f"{name}={value!r} in place of {arguments[name]!r}")
        arguments[name] = value
    if changed:
        rank_zero_info(f"The model is built as its checkpoint says: {', '.join(changed)}.")


def load_class(path: str) -> Any:
    """The class of a dotted name.

    Args:
        path: Such as `ask_lightning.models.CEDSonar`.

    Raises:
        UsageError: There is none.

    Examples:
        >>> load_class("ask_lightning.models.TinyRetriever").__name__
        'TinyRetriever'
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"There is no class {path!r}: {error}.") from error

"""A trainer that also tests calibrated search and encodes."""

import contextlib
import json as json_module
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

import ask_lightning.data
from ask_lightning.callbacks import RecallTable, SearchCalibration
from ask_lightning.cli.encode_split import SplitEncoder, encode_split
from ask_lightning.cli.encoded_pairs import EncodedPairs, check_output
from ask_lightning.cli.errors import UsageError
from ask_lightning.cli.model_section import make_model
from ask_lightning.cli.run_lock import is_first_process, locked_run
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.splits import Split
from ask_lightning.encoding.encoders import find_encoders, find_interaction
from ask_lightning.metrics import AudioTextRetrieval, Calibration, QueryBank
from ask_lightning.metrics.table import percentages, score_table, write_scores
from ask_lightning.utilities.arguments import check_choice
from ask_lightning.utilities.distributed import Ranks
from ask_lightning.utilities.text_tables import print_table


class RetrievalTrainer(pl.Trainer):
    """Lightning's trainer, which also tests calibrated search and writes down the embeddings of a split.

    Attributes:
        model_section: Class and arguments of the model as the config builds it, before any checkpoint. The
            command line sets it.
        calibration: Kind and parameters of calibrated search in the last test, or None.
        calibration_bank: The training pairs that calibrated it, or None.
        encoded_file: Path of the file that the last `encode` has written, or None.
    """

    callbacks: list[Callback]  # which Lightning sets outside of its class
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
        callbacks, loggers = self.callbacks, self.loggers
        # The config is written beside the logs, which are those of the test with the checkpoint.
        self.callbacks = [one for one in callbacks if not isinstance(one, (RecallTable, SaveConfigCallback))]
        self.loggers = []
        try:
            (metrics,) = super().test(model, datamodule=datamodule, verbose=False)
        finally:
            self.callbacks, self.loggers = callbacks, loggers
        return percentages(metrics, "test/")

    def _test_calibrated(
        self,
        model: pl.LightningModule | None,
        datamodule: pl.LightningDataModule | None,
        calibrate: bool,
        options: Mapping[str, Any],
    ) -> list[Mapping[str, float]]:
        """Test a model by cosine similarity and, if it shall be and can be, in calibrated search."""
        callbacks = self.callbacks
        calibration = SearchCalibration()
        if calibrate and (obstacle := _obstacle_to_calibration(model, datamodule)):
            rank_zero_info(f"Calibrated search is left out: {obstacle}.")
        elif calibrate:
            rank_zero_info(
                "The training and the validation split are encoded first, for calibrated search; "
                "`--calibrate false` leaves it out."
            )
            self.callbacks = [*callbacks, calibration]
        try:
            return super().test(model, datamodule=datamodule, **options)
        finally:
            self.calibration, self.calibration_bank = calibration.calibration, calibration.bank
            self.callbacks = callbacks

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

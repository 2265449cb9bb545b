"""`results.json`: what a test has measured, by which protocol, of which weights and with which packages."""

import json
import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from ask_lightning.data.clip_parts import clip_parts
from ask_lightning.metrics import Calibration
from ask_lightning.metrics.table import CALIBRATED
from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.clip_ids import integer_ids
from ask_lightning.utilities.weights import weights_fingerprint

RESULTS_FILE = "results.json"
"""Name of the file in the folder of a run, and in that of an exported model."""

FORMAT = "ask-lightning results 1"
"""Format of the file."""

_PACKAGES = (
    *("ask-lightning", "torch", "lightning", "torchmetrics", "torchaudio", "transformers", "tokenizers"),
    *("soundfile", "numpy", "safetensors"),
)
_TIES = "a candidate of another clip that scores as high as the query's own one ranks ahead of it"
_PREFIX = "test/"


def results_of_test(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    datamodule: pl.LightningDataModule | None,
    *,
    checkpoint: str | None,
    calibration: Calibration | None = None,
    excluded_from_training: str | Sequence[str] | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """The results of the test that a trainer has just run.

    Args:
        trainer: The trainer, with the metrics of the test.
        model: The model that was tested.
        datamodule: The data of the test.
        checkpoint: Path of the checkpoint that was tested. None: the model as it was built.
        calibration: Kind and parameters of calibrated search. None: there was none.
        excluded_from_training: Clips that were kept out of training: their ids, or the path of a list.
        command: The command and its arguments.

    Returns:
        What JSON can hold: `"metrics"`, by `"raw"` and `"calibrated"`, as fractions and ranks, `"protocol"`,
        `"model"`, `"versions"` and so on.
    """
    logged = {
        name.removeprefix(_PREFIX): _finite(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(_PREFIX)
    }
    calibrated = {
        name.removeprefix(CALIBRATED): value for name, value in logged.items() if name.startswith(CALIBRATED)
    }
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "metrics": {
            "raw": {name: value for name, value in logged.items() if not name.startswith(CALIBRATED)},
            "calibrated": calibrated or None,
        },
        "calibration": None if calibration is None else dict(calibration.parameters),
        "protocol": _protocol(trainer, datamodule) | {"excluded_from_training": excluded_from_training},
        "model": {
            "class_path": f"{type(model).__module__}.{type(model).__qualname__}",
            "interaction": _name_of(getattr(model, "interaction", None)),
            "checkpoint": None if checkpoint is None else str(Path(checkpoint).absolute()),
            "fingerprint": weights_fingerprint(model),
        },
        "versions": {"python": platform.python_version()} | _versions(),
    }


def write_results(folder: Path, results: Mapping[str, Any]) -> Path:
    """Write the results of a test into the folder of a run, in place of those of an earlier test.

    Args:
        folder: Folder of the run; it is created if it does not exist.
        results: What `results_of_test` returned.

    Returns:
        Path of the file.
    """
    path = folder / RESULTS_FILE
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read_results(path: Path) -> dict[str, Any] | None:
    """Read the results of a test.

    Args:
        path: Path of the file.

    Returns:
        The results; None if there is no file, or one of another format.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_known = isinstance(results, dict) and results.get("format") == FORMAT
    return results if is_known else None


def find_results(run: Path) -> list[dict[str, Any]]:
    """The results of all tests of a run, of which each leaves its own in the folder of its logs.

    Args:
        run: Folder of the run.

    Returns:
        The results, the latest first. Of tests of the same weights by the same protocol the latest counts.
    """
    paths = [run / RESULTS_FILE, *run.glob(f"logs/version_*/{RESULTS_FILE}")]
    found = [results for path in paths if (results := read_results(path)) is not None]
    found.sort(key=lambda results: str(results["created"]), reverse=True)
    by_protocol: dict[str, dict[str, Any]] = {}
    for results in found:
        tested = {"protocol": results["protocol"], "fingerprint": results["model"]["fingerprint"]}
        by_protocol.setdefault(json.dumps(tested, sort_keys=True), results)
    return list(by_protocol.values())


def public_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results without paths of this machine.

    Args:
        results: What `results_of_test` returned.

    Returns:
        Results without the command, and with the mere names of files.
    """
    protocol, model = dict(results["protocol"]), dict(results["model"])
    if isinstance(protocol["excluded_from_training"], str):
        protocol["excluded_from_training"] = Path(protocol["excluded_from_training"]).name
    if model["checkpoint"] is not None:
        model["checkpoint"] = Path(model["checkpoint"]).name
    kept = {name: value for name, value in results.items() if name != "command"}
    return kept | {"protocol": protocol, "model": model}


def _protocol(trainer: pl.Trainer, datamodule: pl.LightningDataModule | None) -> dict[str, Any]:
    """What was tested, and how."""
    loader: Any = trainer.test_dataloaders
    dataset = getattr(loader, "dataset", None)
    parts = clip_parts(dataset)
    recordings = [clip.recording for part in parts for clip in part.clips]
    # What `limit_test_batches` has cut off was not tested.
    planned = trainer.num_test_batches
    tested = int(sum(planned)) if all(math.isfinite(count) for count in planned) else None
    whole = len(loader) if hasattr(loader, "__len__") else None
    report = getattr(datamodule, "reports", {}).get("test")
    return {
        "data": type(datamodule).__name__,
        "dataset": getattr(datamodule, "dataset_name", None),
        "split": "test",
        "clips": len(set(integer_ids(recordings).tolist())) if recordings else None,
        "captions": None if dataset is None or not hasattr(dataset, "__len__") else len(dataset),
        "limited_to_batches": tested if whole is not None and tested != whole else None,
        "clips_without_audio": None if report is None else list(report.missing),
        "caption_style": parts[0].caption_style if parts else None,
        "ties": _TIES,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _name_of(part: Any) -> str | None:
    return None if part is None else type(part).__name__

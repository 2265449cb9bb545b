"""Calibrated search that travels with a model: its kind and parameters, and the bank of training queries."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ask_lightning.metrics import Calibration, QueryBank
from ask_lightning.models.exported import CALIBRATION_FILE, CONFIG_FILE, SECTION, find_pretrained
from ask_lightning.utilities.atomic_files import atomic_write

_FORMAT = "ask-lightning calibration 1"


def save_calibration(folder: Path, bank: QueryBank, calibration: Calibration, fingerprint: str) -> Path:
    """Write a calibration into a folder, as a whole or not at all.

    Args:
        folder: The folder; it is created if it does not exist.
        bank: The training queries, which are stored in float16.
        calibration: Kind and parameters.
        fingerprint: Fingerprint of the weights that encoded the bank.

    Returns:
        Path of the file.

    Raises:
        OSError: The file cannot be written.
    """
    path = folder / CALIBRATION_FILE
    metadata = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "parameters": json.dumps(calibration.parameters),
    }
    tensors = {name: getattr(bank, name).half().cpu().contiguous() for name in ("audio", "text")}
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    return path


def calibration_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the weights to which the calibration in a folder belongs.

    Args:
        folder: Folder of a run or of an exported model.

    Returns:
        The fingerprint; None where there is no such file, or one of another kind.
    """
    try:
        with safe_open(folder / CALIBRATION_FILE, framework="pt") as stored:
            metadata = stored.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return metadata.get("fingerprint") if metadata.get("format") == _FORMAT else None


def load_calibration(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> tuple[QueryBank, Calibration] | None:
    """Load the calibration of an exported model, with which its own searches are calibrated.

    Args:
        source: Path of a folder, or name of a repository on the Hugging Face hub.
        revision: Branch, tag or commit of the repository.
        token: Access token of a private repository. None or True: that of `hf auth login`.

    Returns:
        The training queries and the kind with its parameters, for `HubCalibration.from_bank`; None for a
        model that was exported without.

    Raises:
        FileNotFoundError: There is no such folder or repository.
        ValueError: The file is damaged, of another version, or of other weights than the model beside it.

    Examples:
        >>> folder = getfixture("tmp_path")
        >>> load_calibration(folder) is None
        True
        >>> _ = save_calibration(folder, QueryBank(torch.eye(2), torch.eye(2)), Calibration(), "0" * 16)
        >>> bank, calibration = load_calibration(folder)
        >>> bank.text.shape, str(calibration)
        (torch.Size([2, 2]), 'inverted_softmax, temperature=0.1')
    """
    folder = find_pretrained(str(source), revision, token)
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return None
    of_weights, weights = calibration_fingerprint(folder), _fingerprint_of_model(folder)
    if None not in (of_weights, weights) and of_weights != weights:
        raise ValueError(
            f"{path} is the calibration of other weights than those of the model beside it, which were "
            "written later. Remove it, or export the model anew."
        )
    try:
        with safe_open(path, framework="pt") as stored:
            parameters = json.loads((stored.metadata() or {})["parameters"])
            audio, text = (stored.get_tensor(name).to(torch.float32) for name in ("audio", "text"))
        return QueryBank(audio, text), Calibration(**parameters)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or of another version ({error}). Export the model anew."
        ) from error


def _fingerprint_of_model(folder: Path) -> str | None:
    """The fingerprint of the weights of an exported model; None where there is no model, or it has none."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return str(config[SECTION]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None

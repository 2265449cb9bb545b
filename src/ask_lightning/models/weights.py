"""Complete published weights from a file, a folder or the Hugging Face hub."""

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ask_lightning.utilities.optional_imports import import_optional

Kind = Literal["weights", "tokenizer"]

# How the error about something missing names it, and refers to it.
_KINDS = {"weights": ("weights that are", "them"), "tokenizer": ("a tokenizer that is", "it")}
# Number of names that an error lists.
_LISTED = 5
# Entries that `to_dict` adds, under names that differ between versions of transformers.
_BOOKKEEPING = ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file; no code in it is run.

    Args:
        path: Path of a `.safetensors` file, or of a file by `torch.save` that holds a state dict, or a dict
            with a state dict under `"model"` or `"state_dict"`.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        ValueError: The file is not of this kind.

    Examples:
        >>> path = getfixture("tmp_path") / "weights.pth"
        >>> torch.save({"iteration": 7, "model": {"bn0.weight": torch.ones(3)}}, path)
        >>> read_state_dict(path)
        {'bn0.weight': tensor([1., 1., 1.])}
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        # The checkpoints of PANNs also hold the state of their sampler, arrays of integers.
        with torch.serialization.safe_globals(_numpy_globals()):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{str(path)!r} is no checkpoint that can be read: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{str(path)!r} has to hold a state dict, but got a {type(content).__name__}.")
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{str(path)!r} has to hold tensors by name, but {_join_names(others)} are none.")
    return dict(content)


def load_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    skip: Sequence[str] = (),
    rename: Callable[[str], str] = str,
) -> None:
    """Load a published state dict; every name and every shape has to fit.

    Args:
        module: Module to load the tensors into.
        state: Tensors by published name.
        source: Name of the file or repository that the tensors come from, for the message.
        skip: Prefixes of published names that are not needed.
        rename: Function from a published name to the name in the module.

    Raises:
        ValueError: Tensors are missing, of another shape, or unknown; the message lists them.

    Examples:
        >>> state = {"weight": torch.ones(1, 3), "fc.bias": torch.ones(1)}
        >>> load_weights(nn.Linear(2, 1), state, source="w.pt")
        Traceback (most recent call last):
        ...
        ValueError: The weights of 'w.pt' do not fit Linear. Missing: 'bias'. Of another shape: 'weight' is \
(1, 3), not (1, 2). Unknown: 'fc.bias'. Check that it is the right file, and that the arguments that set \
sizes are at their defaults.
    """
    given = {rename(name): value for name, value in state.items() if not name.startswith(tuple(skip))}
    own = module.state_dict()
    missing = [repr(name) for name in own if name not in given]
    unknown = [repr(name) for name in given if name not in own]
    other = [
        f"{name!r} is {tuple(given[name].shape)}, not {tuple(value.shape)}"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    ]
    faults = {"Missing": missing, "Of another shape": other, "Unknown": unknown}
    if any(faults.values()):
        listed = " ".join(f"{fault}: {_join_names(names)}." for fault, names in faults.items() if names)
        raise ValueError(
            f"The weights of {source!r} do not fit {type(module).__name__}. {listed} Check that it is the "
            "right file, and that the arguments that set sizes are at their defaults."
        )
    module.load_state_dict(given)


def find_file(name: str, *, argument: str, remedy: str, hub_file: str | None = None) -> Path:
    """Find a checkpoint file on disk or on the Hugging Face hub.

    Args:
        name: Path of the file or of a folder with `hub_file` in it, or name of a repository on the hub.
        argument: Name of the argument that `name` was passed as, for the message.
        remedy: Advice where to get the file and what else can be done, for the message.
        hub_file: Name of the file in the folder or repository. None: it is not on the hub.

    Returns:
        Path of a file that exists.

    Raises:
        FileNotFoundError: The file was not found; the message says what was tried and what to do.

    Examples:
        >>> find_file("weights.pth", argument="audio_weights", remedy="Download it.")
        Traceback (most recent call last):
        ...
        FileNotFoundError: Argument `audio_weights` names weights that are not there: no file \
'weights.pth'. Download it.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if hub_file is None:
        raise _not_found(argument, f"no file {name!r}", remedy)
    if path.is_dir():
        if (path / hub_file).is_file():
            return path / hub_file
        raise _not_found(argument, f"no file {hub_file!r} in the folder {name!r}", remedy)
    hub = import_optional("huggingface_hub")
    try:
        return Path(hub.hf_hub_download(name, hub_file))
    except (OSError, ValueError) as error:
        raise _not_found(argument, _tried_hub(name, error), remedy) from error


def load_from_transformers(
    loader: Any, name: str, *, argument: str, remedy: str, kind: Kind = "weights", **options: Any
) -> Any:
    """Call `from_pretrained` of a class of transformers.

    Args:
        loader: Class of models, configurations or tokenizers.
        name: Path of a folder, or name of a repository on the Hugging Face hub.
        argument: Name of the argument that `name` was passed as, for the message.
        remedy: Advice what can be done, for the message.
        kind: What is loaded, for the message; `"weights"` includes their configuration.
        **options: Arguments of `from_pretrained`.

    Returns:
        The loaded model, configuration or tokenizer.

    Raises:
        FileNotFoundError: It was not found, or is of another kind; the message says what was tried.
    """
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        tried = _tried_hub(name, error)
        if Path(name).is_dir():
            tried = f"the folder {name!r} does not hold {_KINDS[kind][1]} ({_first_line(error)})"
        raise _not_found(argument, tried, remedy, kind) from error


def pretrained_model(loader: Any, name: str, *, argument: str, remedy: str, **options: Any) -> Any:
    """Load a model of transformers: complete, in float32 and in training mode.

    Args:
        loader: Class of models.
        name: Path of a folder, or name of a repository on the Hugging Face hub.
        argument: Name of the argument that `name` was passed as, for the message.
        remedy: Advice what can be done, for the message.
        **options: Arguments of `from_pretrained`.

    Returns:
        The model, without BERT's pooler.

    Raises:
        FileNotFoundError: It was not found; the message says what was tried.
        ValueError: The checkpoint lacks weights of the model, which would stay random.
    """
    model, report = load_from_transformers(
        loader, name, argument=argument, remedy=remedy, output_loading_info=True, **options
    )
    remove_pooler(model)
    weights = {key for key, _ in model.named_parameters()}
    missing = [repr(key) for key in sorted(report["missing_keys"]) if key in weights]
    if missing:
        raise ValueError(
            f"Argument `{argument}` has to name all weights of {type(model).__name__}, but {name!r} lacks "
            f"{_join_names(missing)}, which would stay random. {remedy}"
        )
    # transformers returns models in evaluation mode, in which they would train without dropout, and since
    # version 5 in the precision of the file.
    return model.float().train()


def remove_pooler(model: Any) -> None:
    """Remove the layer that BERT puts on its first token: weights without a gradient stop DDP.

    Args:
        model: Model of transformers.
    """
    if getattr(model, "pooler", None) is not None:
        model.pooler = None


def make_config(base: Any, entries: Mapping[str, Any], *, argument: str) -> Any:
    """Make a configuration of transformers from another one and entries that override it.

    Args:
        base: Configuration to start from.
        entries: Entries by names that `base` knows.
        argument: Name of the argument that `entries` was passed as, for the message.

    Returns:
        A new configuration.

    Raises:
        ValueError: A name is unknown.
    """
    known = base.to_dict()
    unknown = [repr(name) for name in entries if name not in known]
    if unknown:
        raise ValueError(
            f"Argument `{argument}` has to hold entries of {type(base).__name__}, but got "
            f"{_join_names(unknown)}."
        )
    return type(base).from_dict(known | dict(entries))


def config_entries(config: Any, always: Sequence[str] = ()) -> dict[str, Any]:
    """The entries of a configuration of transformers that differ from the defaults of its class.

    Args:
        config: Configuration of a model.
        always: Names of entries that are included even if they do not differ.

    Returns:
        Primitives by name, as JSON and YAML can hold them, with `"model_type"`.
    """
    entries, defaults = (json.loads(one.to_json_string(use_diff=False)) for one in (config, type(config)()))
    return {"model_type": config.model_type} | {
        name: value
        for name, value in entries.items()
        if name not in _BOOKKEEPING and (name in always or value != defaults.get(name))
    }


def _tried_hub(name: str, error: Exception) -> str:
    offline = import_optional("huggingface_hub.constants").HF_HUB_OFFLINE
    hub = "was not asked, for HF_HUB_OFFLINE is set" if offline else "did not give it"
    return f"no file or folder {name!r}, and the Hugging Face hub {hub} ({_first_line(error)})"


def _not_found(argument: str, tried: str, remedy: str, kind: Kind = "weights") -> FileNotFoundError:
    return FileNotFoundError(f"Argument `{argument}` names {_KINDS[kind][0]} not there: {tried}. {remedy}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _join_names(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _numpy_globals() -> list[Any]:
    """The NumPy functions and classes that checkpoint files may refer to."""
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in ("i2", "i4", "i8", "u1", "f4", "f8", "?")}
    return [
        np.ndarray,
        np.dtype,
        *dtypes,
        *((function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")
          for function, name in ((reconstruct, "_reconstruct"), (scalar, "scalar"))),
    ]  # fmt: skip

"""Models as folders in the layout of the Hugging Face hub: weights, hyperparameters and tokenizer."""

import inspect
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ask_lightning.data.clips import abbreviate
from ask_lightning.models.tokens import TOKENIZER_FILE, VocabularyTokenizer
from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.optional_imports import import_optional
from ask_lightning.utilities.weights import weights_fingerprint

CONFIG_FILE = "config.json"
"""Class and hyperparameters, under the key of `SECTION`."""

WEIGHTS_FILE = "model.safetensors"
"""All weights and buffers of the model."""

CALIBRATION_FILE = "calibration.safetensors"
"""What calibrates searches by the model, in the folder of a run or of an exported model."""

SECTION = "ask_lightning"
"""Key of `config.json` under which this library reads; other libraries may read the other keys."""

_EXTRA_STATE = "_extra_state"


def save_pretrained(model: L.LightningModule, folder: str | Path) -> None:
    """Write a model into a folder from which `from_pretrained` makes it anew.

    The folder holds `config.json`, `model.safetensors` and, where the model has a tokenizer of transformers,
    its files. A model whose class names a `transformers_part` is written so that transformers loads that part
    from the same files.

    Args:
        model: Model whose `__init__` calls `save_hyperparameters()`, unless it needs no argument.
        folder: Folder to write into; it is created if it does not exist.

    Raises:
        ValueError: The model could not be made anew: its class is defined in a function or in a script,
            hyperparameters are missing or not to be written as JSON, or its extra state is no tensor.
        OSError: The folder cannot be written; a model that was in it does not load any more.

    Examples:
        >>> from ask_lightning.models import TinyRetriever
        >>> folder = getfixture("tmp_path") / "model"
        >>> save_pretrained(TinyRetriever(width=8), folder)
        >>> sorted(file.name for file in folder.iterdir())
        ['config.json', 'model.safetensors']
    """
    section = {
        "class_path": _class_path(type(model)),
        "init_args": _init_args(model),
        "version": import_module("ask_lightning").__version__,
        "fingerprint": weights_fingerprint(model),
    }
    part = _transformers_part(type(model))
    config: dict[str, Any] = {"architectures": [type(model).__name__]}
    if part is not None:
        inner = getattr(model, part).config
        config = json.loads(inner.to_json_string(use_diff=False))
        config["architectures"] = [type(getattr(model, part)).__name__]
    tensors = _tensors_to_save(model, "" if part is None else f"{part}.")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # Without a config, which is written last, nothing loads an unfinished folder or two models' files.
    (path / CONFIG_FILE).unlink(missing_ok=True)
    try:
        metadata = {"format": "pt", "fingerprint": section["fingerprint"]}
        save_file(tensors, path / WEIGHTS_FILE, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path / WEIGHTS_FILE} cannot be written: {error}") from error
    tokenizer = _vocabulary_tokenizer(model)
    if tokenizer is not None:
        tokenizer[1].save_files(path)
    save_processor = getattr(model, "save_processor", None)
    if part is not None and save_processor is not None:
        save_processor(path)
    with atomic_write(path / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(config | {SECTION: section}, indent=2) + "\n", encoding="utf-8")


def from_pretrained(
    source: str | Path,
    kind: type[L.LightningModule] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    **hyperparameters: Any,
) -> Any:
    """Load a model that `save_pretrained` or `ask-lightning export` wrote.

    Neither the encoders' own published weights nor a network are needed where `source` is a folder. The class
    that the folder names is imported and has to be a LightningModule; no other code is run.

    Args:
        source: Path of a folder, or name of a repository on the Hugging Face hub.
        kind: Class to make, or a base class of it. None: the class that the folder names.
        revision: Branch, tag or commit of the repository.
        token: Access token of a private repository. None or True: that of `hf auth login`.
        **hyperparameters: Arguments of the class that replace those of the folder, such as `sample_rate`, the
            rate of your waveforms. A warning tells if the class does not resample them.

    Returns:
        The model, on the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: There is no such folder or repository, or it lacks a file.
        ImportError: The class that the folder names cannot be imported, or needs a package that is missing.
        ValueError: The folder holds something else, arguments that the class refuses, or weights that do not
            fit, are not finite or belong to another config.

    Examples:
        >>> from ask_lightning.models import TinyRetriever
        >>> folder = getfixture("tmp_path") / "model"
        >>> save_pretrained(TinyRetriever(width=8), folder)
        >>> from_pretrained(folder).encode_text({"caption": ["rain"]}).shape
        torch.Size([1, 8])
    """
    folder = find_pretrained(str(source), revision, token)
    section = _read_section(folder)
    chosen = _choose_class(section["class_path"], kind, folder)
    arguments = {**section["init_args"], **hyperparameters}
    unknown = sorted(set(hyperparameters) - _parameters(chosen).keys())
    if unknown and not _takes_any(chosen):
        raise ValueError(f"{chosen.__name__} has no argument {', '.join(f'`{name}`' for name in unknown)}.")
    try:
        model = chosen(**arguments)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if hyperparameters:  # which may be what is refused
            raise
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{folder / CONFIG_FILE} makes no {chosen.__name__} ({reason}). Undo what was changed in its "
            "`init_args`, or export the model anew."
        ) from error
    trained_rate = section["init_args"].get("sample_rate")
    if hyperparameters.get("sample_rate", trained_rate) != trained_rate and not _resamples(chosen):
        rank_zero_warn(
            f"{folder} was trained with sample_rate={trained_rate}, and {chosen.__name__} does not resample: "
            f"with sample_rate={hyperparameters['sample_rate']} it hears other pitches than it has learnt. "
            f"Leave `sample_rate` out, and pass waveforms of {trained_rate} Hz."
        )
    language = section["init_args"].get("language")
    if hyperparameters.get("language", language) != language and _vocabulary_tokenizer(model) is not None:
        raise ValueError(
            f"Argument `language` cannot be changed to {hyperparameters['language']!r}: the tokenizer in "
            f"{folder} marks captions as {language!r}. Export a model that was made with your language."
        )
    _load(model, folder, section.get("fingerprint"))
    return model.eval()


def _tensors_to_save(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The state dict without a prefix and without the tokenizer, which has files of its own."""
    tokenizer = _vocabulary_tokenizer(model)
    left_out = None if tokenizer is None else f"{tokenizer[0]}.{_EXTRA_STATE}"
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in model.state_dict().items():
        if name == left_out:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{type(model).__name__} cannot be written: {name!r} in its state dict is a "
                f"{type(value).__name__} and no tensor. Let `get_extra_state` return a tensor."
            )
        if not name.startswith(prefix):
            raise ValueError(
                f"{type(model).__name__} cannot be written: {name!r} is not part of {prefix[:-1]!r}, which "
                "is its `transformers_part`. Set that to None in your class."
            )
        tensor = value.detach().cpu().contiguous()
        # Two names may share one tensor, which safetensors refuses.
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name.removeprefix(prefix)] = tensor
    return tensors


def _load(model: nn.Module, folder: Path, fingerprint: str | None) -> None:
    """Load weights and tokenizer; every name and every shape has to fit.

    The weights have to be those to which the config belongs, as far as they say so themselves.
    """
    part = _transformers_part(type(model))
    prefix = "" if part is None else f"{part}."
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as stored:
            written = (stored.metadata() or {}).get("fingerprint", fingerprint)
        if fingerprint is not None and written != fingerprint:
            raise ValueError(
                f"{folder / WEIGHTS_FILE} holds other weights than those that {CONFIG_FILE} beside it was "
                "written with. Copy the whole folder of a model, or export it anew."
            )
        state = {prefix + name: tensor for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged: {error}. Export the model anew.") from error
    _check_values(model, state, folder / WEIGHTS_FILE)
    tokenizer = _vocabulary_tokenizer(model)
    if tokenizer is not None:
        name, module = tokenizer
        if not (folder / TOKENIZER_FILE).is_file():
            raise FileNotFoundError(f"{folder} lacks {TOKENIZER_FILE}, the model's tokenizer.")
        module.load_file(folder)
        state[f"{name}.{_EXTRA_STATE}"] = module.get_extra_state()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"The weights in {folder} do not fit {type(model).__name__} as {CONFIG_FILE} makes it: {error}"
        ) from error


def _check_values(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse parameters that are not finite, and point at those of fewer bits than the model's."""
    parameters = {name: value for name, value in model.named_parameters() if name in state}
    broken = [name for name in parameters if not bool(state[name].isfinite().all())]
    if broken:
        raise ValueError(
            f"{path} holds NaN or infinity, in {abbreviate(broken)}, so that the model finds nothing: its "
            "training diverged, or the file was changed. Export an earlier checkpoint."
        )
    rounded = [
        name for name, value in parameters.items() if state[name].element_size() < value.element_size()
    ]
    if rounded:
        stored = ", ".join(sorted({str(state[name].dtype).removeprefix("torch.") for name in rounded}))
        rank_zero_warn(
            f"{path} holds {len(rounded)} weights in {stored}, in which they were rounded, such as "
            f"{rounded[0]!r}. The model computes in the precision of its class, and finds what the rounded "
            "weights find. Export the checkpoint of the training for the weights in full."
        )


def _init_args(model: L.LightningModule) -> dict[str, Any]:
    """The arguments that make a model of the same kind and shape, as JSON can hold them."""
    kind = type(model)
    known = _parameters(kind)
    stored = {
        name: value
        for name, value in dict(model.hparams).items()
        if name in known or (_takes_any(kind) and not name.startswith("_"))
    }
    missing = [
        f"`{name}`"
        for name, parameter in known.items()
        if parameter.default is inspect.Parameter.empty and name not in stored
    ]
    if missing:
        raise ValueError(
            f"{kind.__name__} needs {', '.join(missing)} to be made, which its hyperparameters do not hold. "
            "Call `save_hyperparameters()` in its `__init__`."
        )
    for name, value in stored.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The hyperparameter `{name}` of {kind.__name__} cannot be written as JSON, because it is a "
                f"{type(value).__name__} ({error}). Pass names and numbers and make the object in `__init__`."
            ) from error
    return stored


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """The named parameters of a constructor."""
    parameters = inspect.signature(kind).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {parameter.name: parameter for parameter in parameters if parameter.kind not in variable}


def _takes_any(kind: type) -> bool:
    parameters = inspect.signature(kind).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _resamples(kind: type) -> bool:
    """Whether a model brings waveforms of any rate to that of its training; False if it does not say so."""
    return bool(getattr(kind, "resamples", False))


def _class_path(kind: type) -> str:
    """The dotted name of a class by which another process can import it."""
    if kind.__module__ == "__main__" or "." in kind.__qualname__:
        raise ValueError(
            f"{kind.__name__} cannot be made anew from a folder, because it is defined in a script, a class "
            "or a function. Define it at the top of a module that can be imported."
        )
    public = import_module("ask_lightning.models")
    if getattr(public, kind.__name__, None) is kind:
        return f"{public.__name__}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__name__}"


def _choose_class(path: str, kind: type[L.LightningModule] | None, folder: Path) -> type[L.LightningModule]:
    """The class to make: `kind` if it is the one that the folder names, else the named one."""
    module, _, name = path.rpartition(".")
    if kind is not None and not inspect.isabstract(kind) and kind.__name__ == name:
        return kind
    try:
        named = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(
            f"{folder} holds a {name}, whose class {path} cannot be imported ({error}). Put the module that "
            "defines it on the Python path, or pass the class: `from_pretrained(folder, MyClass)`."
        ) from error
    if not (isinstance(named, type) and issubclass(named, L.LightningModule)):
        raise ValueError(f"{folder / CONFIG_FILE} names {path}, which is no LightningModule.")
    if kind is not None and not issubclass(named, kind):
        raise ValueError(
            f"{folder} holds a {name}, not a {kind.__name__}. Load it by `{name}.from_pretrained`, or by "
            "`ask_lightning.models.from_pretrained`."
        )
    return named


def _read_section(folder: Path) -> dict[str, Any]:
    """What this library wrote into `config.json`."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} lacks {file}. Write it with `ask-lightning export`.")
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{folder / CONFIG_FILE} is damaged: {error}. Undo the change, or export the model anew."
        ) from error
    section = content.get(SECTION) if isinstance(content, Mapping) else None
    if not isinstance(section, Mapping) or not {"class_path", "init_args"} <= section.keys():
        raise ValueError(
            f"{folder} holds no model of this library: its {CONFIG_FILE} has no section {SECTION!r}. Models "
            "of transformers are loaded by name as the encoders of a new model, see `CLAPRetriever`."
        )
    if not isinstance(section["class_path"], str) or not isinstance(section["init_args"], Mapping):
        raise ValueError(
            f"{folder / CONFIG_FILE} has to hold a name as `class_path` and an object as `init_args`, but "
            f"got {section['class_path']!r} and {section['init_args']!r}. Undo the change, or export the "
            "model anew."
        )
    return dict(section)


def find_pretrained(source: str, revision: str | None, token: str | bool | None) -> Path:
    """Find the folder of an exported model.

    Args:
        source: Path of a folder, or name of a repository on the Hugging Face hub.
        revision: Branch, tag or commit of the repository.
        token: Access token of a private repository. None or True: that of `hf auth login`.

    Returns:
        The folder, or that of the snapshot of the repository.

    Raises:
        FileNotFoundError: There is no such folder or repository.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {source!r}.")
    hub = import_optional("huggingface_hub")
    wanted = [CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, CALIBRATION_FILE]
    try:
        snapshot = hub.snapshot_download(source, revision=revision, token=token, allow_patterns=wanted)
    except (OSError, ValueError) as error:
        offline = import_optional("huggingface_hub.constants").HF_HUB_OFFLINE
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"There is no folder {source!r}, and the Hugging Face hub "
            f"{'was not asked, for HF_HUB_OFFLINE is set' if offline else 'did not give it'} ({reason})."
        ) from error
    rank_zero_info(f"{source} is in {snapshot}.")
    return Path(snapshot)


def _vocabulary_tokenizer(model: nn.Module) -> tuple[str, VocabularyTokenizer] | None:
    """Name and module of the only tokenizer of transformers in a model; None if there is none or several."""
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, VocabularyTokenizer)]
    return found[0] if len(found) == 1 else None


def _transformers_part(kind: type) -> str | None:
    """Name of the attribute that transformers loads from the same files."""
    part: str | None = getattr(kind, "transformers_part", None)
    return part

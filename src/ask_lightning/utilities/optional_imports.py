"""Import of optional packages, which the extras install, at the moment when they are needed."""

import importlib
import threading
from typing import Any

# Package: the extra that installs it, and what it is for.
_PACKAGES = {
    "soundfile": ("audio", "to read and write audio files"),
    "av": ("media", "to read m4a, mp4 and other files that soundfile does not read"),
    "torchaudio": ("audio", "to resample audio and to compute spectrograms"),
    "transformers": ("audio", "for pretrained encoders and their tokenizers"),
    "tokenizers": ("audio", "for pretrained tokenizers"),
    "huggingface_hub": ("audio", "to download published weights"),
    "h5py": ("data", "to read HDF5 files"),
    "pyarrow": ("data", "to read parquet files"),
    "datasets": ("data", "to read parquet files and datasets of the Hugging Face hub"),
    "matplotlib": ("plot", "to draw pictures"),
    "jsonargparse": ("cli", "for the command line"),
    "rich": ("cli", "to draw tables in a terminal"),
    "ot": ("pot", "for the transport solvers of POT"),
    "gradio": ("page", "for the page to search sounds"),
    "fastapi": ("page", "for the page to search sounds"),
    "starlette": ("page", "for the page to search sounds"),
    "uvicorn": ("page", "for the page to search sounds"),
    "mteb": ("mteb", "to evaluate on its tasks"),
    "wandb": ("track", "to log to Weights & Biases"),
}

# Threads that import parts of a large package at once may find it half initialised.
_ONE_AT_A_TIME = threading.RLock()


def import_optional(name: str) -> Any:
    """Import a package of an extra, or one of its submodules; threads do so one after another.

    Args:
        name: Name of the module, such as `"soundfile"` or `"torchaudio.transforms"`.

    Raises:
        ImportError: The package is missing or does not load; the message says what it is needed for and
            what to install.

    Examples:
        >>> import_optional("soundfile").SoundFile.__name__
        'SoundFile'
    """
    try:
        with _ONE_AT_A_TIME:
            return importlib.import_module(name)
    # Beside a missing package: a missing libsndfile is an OSError, a torchaudio built for another CUDA
    # version than torch a RuntimeError.
    except (ImportError, OSError, RuntimeError) as error:
        extra, purpose = _PACKAGES[package := name.partition(".")[0]]
        raise ImportError(
            f"`{package}` is needed {purpose}, but it did not load: {error}. "
            f'Install it with: pip install "ask-lightning[{extra}]"'
        ) from error

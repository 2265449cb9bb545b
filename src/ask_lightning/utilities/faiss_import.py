"""Faiss, imported when first needed and after torch, whose CUDA libraries have to be loaded first."""

import sys
from functools import cache
from importlib.metadata import distributions
from types import ModuleType
from warnings import warn

import torch

_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")
_INSTALL = (
    "Install exactly one of its packages, `pip install faiss-gpu` (Linux with an NVIDIA GPU) or "
    '`pip install faiss-cpu`, or use `index="exact"`, which needs none.'
)


@cache
def import_faiss() -> ModuleType:
    """Import faiss and return the module.

    Raises:
        ImportError: It is absent or cannot be loaded, with what to install.
    """
    installed = sorted(
        {name for found in distributions() if (name := (found.name or "").lower()) in _PACKAGES}
    )
    clash = (
        f"{' and '.join(installed)} are installed together and overwrite each other's files; "
        f"uninstall all of them first. "
        if len(installed) > 1
        else ""
    )
    try:
        import faiss
    except Exception as error:  # a half-overwritten or mislinked build fails in many ways
        raise ImportError(f"Faiss cannot be loaded ({error}). {clash}{_INSTALL}") from error
    if clash:
        warn(f"Faiss may be corrupt: {clash}{_INSTALL}", stacklevel=2)
    if sys.platform == "darwin":
        # Faiss and torch each bring an OpenMP runtime on macOS; two of them with threads crash.
        faiss.omp_set_num_threads(1)
    return faiss


def faiss_is_available() -> bool:
    """Whether `import_faiss` succeeds."""
    try:
        import_faiss()
    except ImportError:
        return False
    return True


def faiss_has_gpu() -> bool:
    """Whether Faiss is a GPU build, and both Faiss and torch find a device."""
    if not torch.cuda.is_available() or not faiss_is_available():
        return False
    faiss = import_faiss()
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0

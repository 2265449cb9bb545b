"""The packages that only some layouts of datasets need, imported when one of them is read."""

import importlib
from typing import Any


def require_data_package(name: str) -> Any:
    """Import an optional package at the moment it is needed.

    Args:
        name: `"h5py"`, `"pyarrow.parquet"` or `"datasets"`.

    Raises:
        ImportError: The package is missing or does not load; the message says what to install.

    Examples:
        >>> require_data_package("h5py").File.__name__
        'File'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        extra = "hub" if package == "datasets" else "data"
        raise ImportError(
            f"`{package}` is needed to read this layout of the dataset, but it did not load: {error}. "
            f'Install it with: pip install "ask-lightning[{extra}]"'
        ) from error

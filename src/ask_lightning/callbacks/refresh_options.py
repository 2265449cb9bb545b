"""What a refresh may be asked for: its modes, and which options exclude each other."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from ask_lightning.callbacks.auto_period import AutoPeriod
from ask_lightning.callbacks.base_builder import BaseBuilder
from ask_lightning.knowledge.base_settings import check_memmap
from ask_lightning.knowledge.mapping import MappedRefresh

Mode = Literal["full", "rolling", "mapped"]
MODES: tuple[str, ...] = get_args(Mode)


def mode_option(mode: str | MappedRefresh) -> str:
    """The argument `mode` as it is written.

    Args:
        mode: `"full"`, `"rolling"` or a `MappedRefresh`.
    """
    return f'mode="{mode}"' if isinstance(mode, str) else 'mode="mapped"'


def row_finding_option(T: object, write_back: bool) -> str | None:
    """The option by which a refresh finds the rows of training samples, as it is written; `None` without one.

    Args:
        T: Number of epochs between refreshes, `"auto"`, or an `AutoPeriod`.
        write_back: Whether steps store their embeddings.

    Examples:
        >>> row_finding_option("auto", write_back=False)
        'T="auto"'
    """
    if write_back:
        return "write_back=True"
    return None if isinstance(T, int) else 'T="auto"'


def check_combination(
    builder: BaseBuilder,
    *,
    T: int | AutoPeriod,
    mode: str | MappedRefresh,
    write_back: bool,
    in_background: bool,
    storage_directory: str | Path | None,
) -> None:
    """Refuse options that exclude each other.

    Args:
        builder: The options of the base.
        T: Number of epochs between refreshes, or what decides.
        mode: What a refresh encodes.
        write_back: Whether steps store their embeddings.
        in_background: Whether a refresh encodes while training goes on.
        storage_directory: The directory of knowledge in files.

    Raises:
        ValueError: Two of them exclude each other.
    """
    is_auto = isinstance(T, AutoPeriod)
    if is_auto and mode == "rolling":
        raise ValueError(
            'Argument `T` has to be a number of epochs with mode="rolling", which encodes a T-th of the '
            f"rows in each epoch, but got {T}."
        )
    if is_auto and write_back:
        raise ValueError(
            'Arguments `T="auto"` and `write_back=True` exclude each other: rows that were just written '
            "back do not tell how old the others and the prototypes are. Pass a number for `T`."
        )
    if isinstance(mode, MappedRefresh) and write_back:
        raise ValueError(
            'Arguments `mode="mapped"` and `write_back=True` exclude each other: one map cannot follow '
            "rows that were encoded at different times. Leave one of them out."
        )
    if builder.storage == "memmap":
        check_memmap(builder.prototype_pairing, builder.placement, 1)
        if builder.refine is not None:
            raise ValueError(
                'Argument `refine` compares every pair with every other, for which storage="memmap" is '
                "meant to be too large. Leave it out."
            )
        if mode != "full":
            raise ValueError(
                f'Arguments `{mode_option(mode)}` and `storage="memmap"` exclude each other: rows in '
                "files are renewed all at once, or by write_back=True. Leave one of them out."
            )
    elif storage_directory is not None:
        raise ValueError(
            'Argument `storage_directory` is for storage="memmap" alone, '
            f"but got {str(storage_directory)!r} with storage={builder.storage!r}. Leave it out."
        )
    mixed = "momentum" if builder.momentum else "refine" if builder.refine is not None else None
    partly = "write_back=True" if write_back else mode_option(mode)
    if mixed and (write_back or mode != "full"):
        raise ValueError(
            f"Arguments `{mixed}` and `{partly}` exclude each other: rows that are stored one by one are "
            f"stored as they are encoded. Leave `{mixed}` out."
        )
    if write_back and builder.index not in ("auto", "exact"):
        raise ValueError(
            'Argument `index` has to be "auto" or "exact" with write_back=True, because an index of '
            f"Faiss would be built anew in each step, but got {builder.index!r}."
        )
    if in_background and (write_back or mode != "full"):
        raise ValueError(
            f"Arguments `in_background=True` and `{partly}` exclude each other: rows that are renewed "
            "while a refresh encodes in the background would become older by it. Leave one of them out."
        )
    if in_background and builder.storage == "memmap":
        raise ValueError(
            'Arguments `in_background=True` and `storage="memmap"` exclude each other: what is encoded '
            "in the background stays in memory until it is used, and memory is what the files are to "
            "save. Leave one of them out."
        )
    if in_background and is_auto:
        raise ValueError(
            'Arguments `in_background=True` and `T="auto"` exclude each other: the drift of an epoch in '
            "which a refresh is in flight would ask for another one. Pass a number for `T`."
        )

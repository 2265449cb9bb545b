"""Which errors are the user's to mend, decided by their class and by the phase in which they arise."""

import errno
import inspect
import os
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

TRACEBACK_VARIABLE = "ASK_LIGHTNING_TRACEBACK"
"""Environment variable that shows the traceback of every error."""

# Lines of jsonargparse that repeat the whole value or name types that were tried besides.
_PARSER_NOISE = (
    "Does not validate against",
    "- Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value",
    "- Expected a <class 'NoneType'>",
)

# How the operating system and libraries that do not pass its error on say that a disk is full, or takes no
# file as large.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAYS_FULL = re.compile(r"no space left|quota exceeded|file too large|os error (27|28|122)\b", re.IGNORECASE)
_REMEDY_OF_FULL = "Free space there, or write to another disk. What is complete stays."
# An argument with a value, as messages of constructors write it.
_ARGUMENT = re.compile(r"`(\w+)=(\"?)([\w.-]+)\2`")


class UsageError(Exception):
    """The command line asks for something that cannot be done; the message says what, and what to do."""


class _ConstructorError(BaseException):
    """Carries what a constructor raised through jsonargparse, which replaces each `Exception` by its own."""


@contextmanager
def usage_errors(is_setup: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Turn errors that the user can mend into `UsageError`, for a phase in which a command is set up.

    Args:
        is_setup: Whether the command is still being set up, asked when an error arises. Afterwards errors
            pass unchanged.

    Raises:
        UsageError: The parser, a constructor or a check refuses what the user has passed.

    Examples:
        >>> with usage_errors():
        ...     raise ValueError("Argument `T` has to be at least 1.")
        Traceback (most recent call last):
            ...
        ask_lightning.cli.errors.UsageError: Argument `T` has to be at least 1.
    """
    try:
        yield
    except _ConstructorError as carrier:
        error = carrier.__cause__
        assert error is not None
        if isinstance(error, _mendable_in_setup()):
            raise UsageError(str(carrier)) from error
        raise error from error.__cause__
    except ArgumentError as error:
        raise UsageError(_parser_message(error)) from error
    except _mendable_in_setup() as error:
        if not is_setup():
            raise
        raise UsageError(_message(error)) from error


def check_writable(path: Path, remedy: str = "") -> None:
    """Refuse a path that cannot be written to, before the work is done.

    Args:
        path: Path of a file or a folder, which need not exist, nor the folders above it.
        remedy: Sentence that says what else to pass.

    Raises:
        UsageError: The folder in which it would be is none, or a read-only one.
    """
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        message = f"{path} cannot be written: {existing} is no folder, or a read-only one."
        raise UsageError(f"{message} {remedy}".rstrip())


def construct(kind: type, *arguments: Any, **options: Any) -> Any:
    """Make an object for jsonargparse, so that what its constructor raises keeps its class and message.

    Args:
        kind: The class of the object.
        *arguments: Positional arguments of the constructor.
        **options: Keyword arguments of the constructor.

    Returns:
        The object.
    """
    try:
        return kind(*arguments, **options)
    except ImportError as error:
        from lightning.pytorch.loggers import Logger

        message = f"{kind.__module__}.{kind.__qualname__} needs a package that is missing: {_message(error)}"
        if issubclass(kind, Logger):
            message += ' Install what loggers need: pip install "ask-lightning[track]".'
        raise _ConstructorError(message) from error
    except Exception as error:
        raise _ConstructorError(_with_flags(_message(error), kind)) from error


def _with_flags(message: str, kind: type) -> str:
    """A message of a constructor with the flags of the arguments that it asks for."""
    from lightning.pytorch import LightningDataModule, LightningModule

    sections = {"model": LightningModule, "data": LightningDataModule}
    section = next((name for name, base in sections.items() if issubclass(kind, base)), None)
    if section is None:
        return message
    arguments = inspect.signature(kind).parameters

    def as_flag(found: re.Match[str]) -> str:
        name, _, value = found.groups()
        if name not in arguments:
            return found[0]
        return f"`--{section}.{name} {'null' if value == 'None' else value}`"

    return _ARGUMENT.sub(as_flag, message)


def explain(error: Exception) -> str | None:
    """The message of an error that the user can mend, as one line.

    Args:
        error: An error that ended a command.

    Returns:
        One line; None for an error whose traceback is needed.

    Examples:
        >>> explain(UsageError("There is no such thing."))
        'There is no such thing.'
        >>> explain(ZeroDivisionError("division by zero")) is None
        True
    """
    if os.environ.get(TRACEBACK_VARIABLE):
        return None
    quickly = (UsageError, ImportError, OSError)
    if not isinstance(error, quickly) and not isinstance(error, _always_mendable()):
        return None
    return _message(error)


# What these functions name takes seconds to import, which a wrong flag need not wait for.
@cache
def _always_mendable() -> tuple[type[Exception], ...]:
    """Errors that the user can mend whenever they arise: files, folders, packages are missing or damaged."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from ask_lightning.data.audio.decoding import AudioFileError
    from ask_lightning.knowledge.snapshot_file import SnapshotError

    return AudioFileError, ImportError, MisconfigurationException, OSError, SnapshotError


def _mendable_in_setup() -> tuple[type[Exception], ...]:
    """Errors that come from checks of what the user has passed while a command is being set up.

    Once batches run, a RuntimeError or a ValueError is as likely a bug, whose traceback is needed.
    """
    return (*_always_mendable(), RuntimeError, TypeError, ValueError)


def _message(error: Exception) -> str:
    """The message of an error as one line.

    A process that loads data sends the class of its error and, as the message, its whole traceback, in which
    the class stands before the message proper.
    """
    text = str(error)
    if "Traceback (most recent call last)" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    text = " ".join(text.split()) or type(error).__name__
    is_full = isinstance(error, OSError) and error.errno in _FULL
    if (is_full or _SAYS_FULL.search(text)) and _REMEDY_OF_FULL not in text:
        text = f"{text.removesuffix('.')}. {_REMEDY_OF_FULL}"
    return text


def _parser_message(error: ArgumentError) -> str:
    """What the parser refuses, as one line.

    jsonargparse tries every type that an argument may have, and puts the reasons for which each one failed
    into one text. Where a class was named but one of its arguments is wrong, an `ArgumentError` for that
    argument is among the causes, and what wraps it names the class: that is the reason. Other texts have no
    exception of their own for each reason, so the lines that explain nothing are left out of them.
    """
    reason: BaseException = error
    cause = error.__cause__
    while cause is not None:
        if isinstance(cause.__cause__, ArgumentError) and not isinstance(cause, ArgumentError):
            reason = cause
        cause = cause.__cause__
    lines = [line.strip() for line in str(reason).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(_PARSER_NOISE))

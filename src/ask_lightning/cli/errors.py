"""Mistakes of the user in one readable line; everything else with its traceback."""

import linecache
import os
import re
from argparse import ArgumentError
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

TRACEBACK_VARIABLE = "ASK_LIGHTNING_TRACEBACK"
"""Environment variable that shows the traceback of every error."""

_PACKAGE = Path(__file__).parents[1]
_IN_WORKER = "in DataLoader worker process"
# What jsonargparse writes around the reason.
_WRAPPING = re.compile(
    r"\s*(Does not validate against|Subtypes:|Errors:|Given value|- Expected a <class 'None)"
)


class UsageError(Exception):
    """The command line asks for something that cannot be done; the message says what and what to do."""


def explain(error: BaseException) -> str | None:
    """The message of an error that the user can mend, as one line.

    Mendable are what the parser refuses, what the operating system refuses, and what this library raises on
    purpose; an error that arises by itself somewhere in the code is none of them.

    Args:
        error: As caught, with its traceback.

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
    if isinstance(error, ArgumentError):
        return _of_parser(str(error))
    # The parser makes its own of what a constructor raises.
    wrapped = str(error)
    while error.__cause__ is not None and _is_of_parser(error):
        error = error.__cause__
    if _is_of_parser(error):
        return _of_parser(wrapped)
    if _IN_WORKER in str(error):
        return _of_worker(error)
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UsageError | OSError | MisconfigurationException) or _raised_on_purpose(error):
        return message
    return None


def _of_parser(message: str) -> str:
    """The reason in what the parser says, without the ways that it tried in vain."""
    tried = re.split(r"^\s*- ", message, flags=re.MULTILINE)
    reasons = [one for one in tried if one.startswith("Problem with given class_path")]
    if reasons:
        message = tried[0] + "\n" + reasons[0]
    lines = [line.strip() for line in message.splitlines() if not _WRAPPING.match(line)]
    reason = " ".join(line for line in lines if line)
    if any(package in reason for package in ("wandb", "tensorboard")) and "Requirement" in reason:
        reason += ' Install what loggers need: pip install "ask-lightning[track]".'
    return reason


def _of_worker(error: BaseException) -> str | None:
    """What a process that loads data could not do, without the traceback that its message holds."""
    ours = type(error).__module__.partition(".")[0] == _PACKAGE.name
    reason = str(error).strip().splitlines()[-1].partition(": ")[2]
    return reason if ours or isinstance(error, OSError) else None


def _is_of_parser(error: BaseException) -> bool:
    return "jsonargparse" in Path(_file_and_line(error)[0]).parts


def _raised_on_purpose(error: BaseException) -> bool:
    """Whether a `raise` statement of this package made the error."""
    path, line = _file_and_line(error)
    return Path(path).is_relative_to(_PACKAGE) and linecache.getline(path, line).strip().startswith("raise")


def _file_and_line(error: BaseException) -> tuple[str, int]:
    """Where an error arose."""
    trace = error.__traceback__
    if trace is None:
        return "", 0
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename, trace.tb_lineno

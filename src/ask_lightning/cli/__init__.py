"""The command `ask-lightning`; `docs/cli.md` describes it."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ask_lightning

__all__ = ["main", "run"]

_HELP = """\
usage: ask-lightning COMMAND [--config NAME_OR_PATH ...] [flags]

Train and evaluate audio–text retrieval models, with ASK, with other losses, and without.

commands:
  fit         train; goes on with --ckpt_path last
  validate    metrics of the validation split
  test        metrics of the test split, by cosine and calibrated: --calibrate false
  predict     embeddings of the test split, in the folder of the run
  encode      embeddings of a split into a file: --split, --output, --calibrate true
  search      a text against encoded clips, or an audio file against captions: --raw
  transfer    train on one dataset, test on it and on another: --target
  reproduce   tables and figures of the paper, and first experiments: table1 … figure7, all --data NAME

ask-lightning COMMAND --help lists the flags of a command, ask-lightning --version says the version.

flags of all commands but search:
  --config X     a shipped config by name, or the path of a .yaml file; several are merged
  --run X        folder of the run (default: runs/NAME)
  --datasets X   folder in which AudioCaps, Clotho and WavCaps are (default: data)
  --weights X    folder of weights that are on no hub (default: weights)
  --monitor X    metric that the best epoch is chosen by (default: that of the config)
  --ckpt_path X  a checkpoint: a path, or last or best of the folder of the run
  --demo[=X]     synthetic data, in folder X, and shrunken models: a minute on a CPU
  --ask.loss X   the loss: the name of a class of ask_lightning.losses, or the import path of one of yours
  --model.X, --data.X, --trainer.X, --ask.loss.X, --ask.refresh.X: see ask-lightning fit --help

shipped configs: DATASET_MODEL_LOSS and DATASET_MODEL_LOSS_KNOWLEDGE, such as audiocaps_resnet38_bert_ask
"""

_INTERRUPTED = 130  # the exit status that shells give after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: The arguments of the command line; None for those of the process.

    Returns:
        0 after success, 2 after an error in the command line or in what it names, 1 after another error that
        the user can mend, 130 after Ctrl-C. Other errors are raised.
    """
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except SystemExit as end:
        # Lightning ends the process this way after Ctrl-C.
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        return _INTERRUPTED


def _main(arguments: list[str]) -> int:
    """Run the program; Ctrl-C passes."""
    if arguments[:1] == ["--version"]:
        print(f"ask-lightning {ask_lightning.__version__}")
        return 0
    with _ctrl_c_ends_the_process():  # imports take seconds
        from ask_lightning.cli.errors import UsageError, explain

        with suppress(ImportError):  # `run` says which package is missing, if the command needs it
            from ask_lightning.cli import commands  # noqa: F401
    # As with `python -m`: a config may name classes in modules of the current folder.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        run(arguments)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"ask-lightning: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


@contextmanager
def _ctrl_c_ends_the_process() -> Iterator[None]:
    """End the process at once after Ctrl-C: packages that are interrupted in their import go on and fail."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run(arguments: Sequence[str]) -> Any:
    """Run a command and raise what goes wrong.

    Args:
        arguments: The command and what follows it.

    Returns:
        The `RetrievalCLI` after a command that trains or evaluates; the hits of `search`; the scores of
        `transfer`.

    Raises:
        UsageError: The command line cannot be used.
    """
    from ask_lightning.cli.compose import describe_names
    from ask_lightning.cli.errors import UsageError
    from ask_lightning.utilities.optional_imports import import_optional

    command, rest = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(_HELP + "\n".join(f"  {word:<12} {names}" for word, names in describe_names().items()))
        return None
    commands = ("fit", "validate", "test", "predict", "encode", "search", "transfer", "reproduce")
    if command not in commands:
        raise UsageError(f"There is no command {command!r}, only {', '.join(commands)}.")
    try:
        import_optional("jsonargparse")
    except ImportError as error:
        raise UsageError(str(error)) from error
    if command == "search":
        from ask_lightning.cli.search import search

        return search(rest)
    if command == "transfer":
        from ask_lightning.cli.transfer import transfer

        return transfer(rest)
    if command == "reproduce":
        from ask_lightning.cli.reproduce import reproduce

        return reproduce(rest)
    from ask_lightning.cli.commands import run_command

    return run_command(command, rest)

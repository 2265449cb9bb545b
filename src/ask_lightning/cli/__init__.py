"""The command `ask-lightning`; `docs/cli.md` describes it."""

import io
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
To begin: ask-lightning fit --config my_recordings --data.root FOLDER, or --demo for --data.root FOLDER.

commands:
  inspect     what there is in the data: lengths, rates, captions, copies, leaks, and a picture; --json
  fit         train; goes on with --ckpt_path last
  validate    metrics of the validation split
  test        metrics of the test split, also calibrated; --untrained true: before and after; --json true
  predict     embeddings of the test split, in the folder of the run
  encode      embeddings of a split into a file: --split, --output, --calibrate true
  search      a text against encoded clips, or an audio file against captions: --raw, --json
  serve       a local page to search and hear encoded clips: --audio, --port
  export      a trained model as a folder to load or to publish: RUN --output FOLDER, --push REPO
  transfer    train on one dataset, test on it and on another: --target
  reproduce   tables and figures of the paper, and first experiments: table1 … figure7, all --data NAME

ask-lightning COMMAND --help lists the flags of a command, ask-lightning --version says the version.

flags of all commands but search, serve and export:
  --config X     a shipped config by name, or the path of a .yaml file; several are merged
  --data.root X  folder of your recordings; --data.annotations X: their table, if it is not the only one there
  --run X        folder of the run (default: runs/NAME)
  --datasets X   folder in which AudioCaps, Clotho and WavCaps are (default: data)
  --weights X    folder of weights that are on no hub (default: weights)
  --monitor X    metric that the best epoch is chosen by (default: that of the config)
  --ckpt_path X  a checkpoint: a path, or last or best of the folder of the run
  --demo[=X]     synthetic data, in folder X, and shrunken models: a minute on a CPU
  --ask.loss X   the loss: the name of a class of ask_lightning.losses, or the import path of one of yours
  --model.X, --data.X, --trainer.X, --ask.loss.X, --ask.refresh.X: see ask-lightning fit --help, of a class
                 fit --data.help FolderData, fit --model.help TinyRetriever, fit --ask.loss.help NTXentLoss

shipped configs: my_recordings, and DATASET_MODEL_LOSS[_KNOWLEDGE], such as clap_ask or audiocaps_clap_ask; a
MODEL alone, such as clap, is that model on your recordings with its own loss
"""

COMMANDS = (
    *("fit", "validate", "test", "predict", "encode", "search"),
    *("serve", "export", "transfer", "inspect", "reproduce"),
)
"""The commands."""

_HELP_FLAGS = ("-h", "--help")
# Their flags are those of LightningCLI.
_OF_LIGHTNING = ("fit", "validate", "test", "predict", "encode")
# Of which a part is of no use; `fit`, `transfer`, `encode` and `predict` say themselves what they keep.
_KEEPING_NOTHING = ("validate", "test", "search", "export", "inspect")
_WITH_DATA = (*_OF_LIGHTNING, "inspect")
# The exit statuses that shells give after Ctrl-C and SIGTERM.
_INTERRUPTED = 130
_TERMINATED = 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: The arguments of the command line; None for those of the process.

    Returns:
        0 after success, 2 after an error in the command line or in what it names, 1 after another error that
        the user can mend, 130 after Ctrl-C, 143 after SIGTERM. Other errors are raised.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    ctrl_c = _CtrlC(given)
    try:
        with ctrl_c.noticed():
            return _main(given, ctrl_c)
    except BaseException as error:
        if ctrl_c.is_cause_of(error):
            _say_how_to_go_on(given)
            return _INTERRUPTED
        # Lightning ends the process this way after SIGTERM, as if it had succeeded.
        if type(error).__name__ == "SIGTERMException":
            print("ask-lightning: ended by SIGTERM", file=sys.stderr)
            return _TERMINATED
        raise


class _CtrlC:
    """Notices Ctrl-C, which a library may turn into an error of its own.

    Args:
        arguments: The command and what follows it.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments
        self._has_come = False

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Notice it, where this is the main thread and nobody else does."""
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._raise)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def ends_the_process(self) -> Iterator[None]:
        """Let it end the process at once: packages that are interrupted in their import go on and fail."""
        if signal.getsignal(signal.SIGINT) != self._raise:
            yield
            return
        signal.signal(signal.SIGINT, self._exit)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self._raise)

    def is_cause_of(self, error: BaseException) -> bool:
        """Whether an error that ends the command comes from Ctrl-C."""
        # Lightning ends the process by a `SystemExit` after Ctrl-C.
        is_plain = isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
        return self._has_come or is_plain

    def _raise(self, *_: object) -> None:
        self._has_come = True
        raise KeyboardInterrupt

    def _exit(self, *_: object) -> None:
        _say_how_to_go_on(self._arguments)
        sys.stderr.flush()
        os._exit(_INTERRUPTED)


def _say_how_to_go_on(arguments: Sequence[str]) -> None:
    """Say that Ctrl-C has ended a command, and where it has not said so itself, what the same one does."""
    from ask_lightning.cli.run_lock import is_first_process

    command = arguments[0] if arguments else ""
    if not command or command == "serve" or not is_first_process():  # nothing else ends `serve`
        return
    follows = ""
    if command in _KEEPING_NOTHING:
        follows = "; the same command begins anew"
    elif command == "reproduce":
        follows = "; the same command goes on after the finished runs"
    print(f"ask-lightning: {command} was ended by Ctrl-C{follows}.", file=sys.stderr)


def _main(arguments: list[str], ctrl_c: _CtrlC) -> int:
    """Run the program; Ctrl-C passes."""
    if arguments[:1] == ["--version"]:
        print(f"ask-lightning {ask_lightning.__version__}")
        return 0
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A file name or a caption may have characters that the terminal has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    # As with `python -m`: a config may name classes in modules of the current folder.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    from ask_lightning.cli.errors import UsageError, explain

    try:
        with ctrl_c.ends_the_process():  # imports take seconds
            check(arguments)
            if arguments and arguments[0] in COMMANDS:
                with suppress(ImportError):  # `run` says which package is missing, if the command needs it
                    from ask_lightning.cli import commands  # noqa: F401
        run(arguments)
    except Exception as error:
        message = None if ctrl_c.is_cause_of(error) else explain(error)
        if message is None:
            raise
        print(f"ask-lightning: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def check(arguments: Sequence[str]) -> None:
    """Refuse what can be refused before packages are imported that take seconds.

    Args:
        arguments: The command and what follows it.

    Raises:
        UsageError: The command does not exist, a flag is unknown, or a config is missing or not readable.
    """
    from ask_lightning.cli.errors import UsageError

    if not arguments or arguments[0] in _HELP_FLAGS:
        return
    command, *rest = arguments
    if command not in COMMANDS:
        raise UsageError(f"There is no command {command!r}, only {', '.join(COMMANDS)}.")
    if command in _WITH_DATA and not (command == "inspect" and set(rest) & set(_HELP_FLAGS)):
        from ask_lightning.cli.run_options import RunOptions

        RunOptions.parse(rest).check_flags(command)
    elif command in ("search", "serve"):
        from ask_lightning.cli import search_flags

        parse = search_flags.parse_search_flags if command == "search" else search_flags.parse_serve_flags
        parse(rest)


def run(arguments: Sequence[str]) -> Any:
    """Run a command and raise what goes wrong.

    Args:
        arguments: The command and what follows it.

    Returns:
        The `RetrievalCLI` after a command that trains or evaluates; the hits of `search`; the folder of
        `export`; the scores of `transfer`.

    Raises:
        UsageError: The command line cannot be used.
    """
    from ask_lightning.cli.compose import describe_names
    from ask_lightning.cli.errors import UsageError
    from ask_lightning.utilities.optional_imports import import_optional

    command, rest = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
    if command in _HELP_FLAGS:
        print(_HELP + "\n".join(f"  {word:<12} {names}" for word, names in describe_names().items()))
        return None
    check(arguments)
    try:
        import_optional("jsonargparse")
    except ImportError as error:
        raise UsageError(str(error)) from error
    if command == "search":
        from ask_lightning.cli.search import search

        return search(rest)
    if command == "export":
        from ask_lightning.cli.export import export

        return export(rest)
    if command == "inspect":
        from ask_lightning.cli.inspect_data import inspect_data

        return inspect_data(rest)
    if command == "serve":
        from ask_lightning.cli.serve import serve

        return serve(rest)
    if command == "transfer":
        from ask_lightning.cli.transfer import transfer

        return transfer(rest)
    if command == "reproduce":
        from ask_lightning.cli.reproduce import reproduce

        return reproduce(rest)
    from ask_lightning.cli.commands import run_command

    return run_command(command, rest)

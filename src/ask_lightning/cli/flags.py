"""Refuses flags that no command knows before the packages are imported that would say so seconds later.

The arguments of classes are read from the text of their modules. What that leaves open is the parser's.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ask_lightning.cli.errors import UsageError

_SECTIONS = ("model", "data", "trainer", "ask")
_ASK = (
    *("enabled", "audio", "text", "ids", "caption_ids", "chunk_size", "compile_loss", "monitors", "loss"),
    "refresh",
)
_OF_CLASSES = ("class_path", "init_args", "dict_kwargs", "help")
# What the parser of every command has besides, and the flags that are read before.
_COMMON = (
    *("help", "print_config", "seed_everything", "config", "run", "datasets", "weights", "monitor"),
    *("ckpt_path", "demo"),
)
_OF_COMMANDS = {
    "fit": ("weights_only",),  # where Lightning has it
    "validate": ("verbose", "weights_only"),
    "test": ("verbose", "calibrate", "untrained", "json"),
    "predict": ("return_predictions", "weights_only"),
    "encode": ("split", "output", "calibrate", "tokens"),
    "inspect": ("json", "picture"),
}
_OF_ANY_COMMAND = frozenset(name for names in _OF_COMMANDS.values() for name in names)
_SHORT = 3  # shorter flags, such as -h, are the parser's


def without_options_of_others(command: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what only other commands understand, such as that which one of them has written.

    Args:
        command: The command.
        config: The composed config.

    Examples:
        >>> without_options_of_others("test", {"model": {}, "weights_only": None, "calibrate": False})
        {'model': {}, 'calibrate': False}
    """
    others = _OF_ANY_COMMAND.difference(_OF_COMMANDS[command])
    return {name: value for name, value in config.items() if name not in others}


def check_flags(command: str, config: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Refuse flags that cannot be right.

    Args:
        command: The command.
        config: The composed config, whose classes decide which arguments there are.
        arguments: The arguments for the parser.

    Raises:
        UsageError: A flag is unknown; the message names one that is written alike.

    Examples:
        >>> check_flags("fit", {}, ["--trainer.max_epoch", "3"])
        Traceback (most recent call last):
            ...
        ask_lightning.cli.errors.UsageError: unrecognized arguments: --trainer.max_epoch 3. Did you mean \
--trainer.max_epochs?
    """
    given = [argument.partition("=")[0].removeprefix("--") for argument in arguments if argument[:2] == "--"]
    renamed = {name.partition(".")[0] for name in given if name in _SECTIONS or name.endswith(".class_path")}
    for place, argument in enumerate(arguments):
        if argument[:2] != "--" or len(argument) < _SHORT:
            continue
        name = argument.partition("=")[0].removeprefix("--").rstrip("+")
        known = _known(command, config, name, renamed)
        if known is None or name in known:
            continue
        value = arguments[place + 1 : place + 2] if "=" not in argument else []
        said = " ".join([argument, *(text for text in value if text[:2] != "--")])
        section, dot, rest = name.partition(".")
        if section not in _SECTIONS and dot:
            name, known = section, list(_SECTIONS)
        near = [
            f"{one}{dot}{rest}" if name == section else one for one in get_close_matches(name, known, n=1)
        ]
        hint = f" Did you mean --{near[0]}?" if near else f" See `ask-lightning {command} --help`."
        raise UsageError(f"unrecognized arguments: {said}.{hint}")


def _known(command: str, config: Mapping[str, Any], name: str, renamed: set[str]) -> list[str] | None:
    """The names that may stand in the place of a flag's name, or None if it is right or nobody knows."""
    section, *rest = name.split(".")
    if not rest or section not in _SECTIONS:
        extra = _OF_COMMANDS.get(command)
        known = None if extra is None else [*_SECTIONS, *_COMMON, *extra]
        return [name] if known and section in known else known
    if section == "trainer":
        return _as_names(section, rest, arguments_of("lightning.pytorch.trainer.trainer.Trainer"))
    if section == "ask":
        if rest[0] == "refresh" and len(rest) > 1:
            refresh = arguments_of("ask_lightning.callbacks.refresh.KnowledgeRefreshCallback")
            return _as_names("ask.refresh", rest[1:], refresh)
        return _as_names(section, rest, frozenset(_ASK))
    kind = (config.get(section) or {}).get("class_path")
    if kind is None or section in renamed:
        return None
    if rest[0] == "init_args":
        section, rest = f"{section}.init_args", rest[1:]
    known_arguments = arguments_of(str(kind))
    if known_arguments is None or not rest:
        return None
    return _as_names(section, rest, known_arguments | set(_OF_CLASSES))


def _as_names(section: str, rest: Sequence[str], known: frozenset[str] | set[str] | None) -> list[str] | None:
    """Full names of the arguments of a section, or None if the flag's is among them or they are unknown."""
    if known is None or rest[0] in known:
        return None
    return sorted(f"{section}.{argument}" for argument in known)


@cache
def arguments_of(path: str) -> frozenset[str] | None:
    """The names of the arguments of a class, without importing its module.

    Args:
        path: Dotted name of the class, such as `"ask_lightning.models.TinyRetriever"`.

    Returns:
        The names; None if the text of the modules does not tell all of them.

    Examples:
        >>> "batch_size" in arguments_of("ask_lightning.data.FolderData")
        True
        >>> arguments_of("no.such.Thing") is None
        True
    """
    package, _, name = path.rpartition(".")
    root = package.partition(".")[0]
    found = _class_in(_package_folder(root), package, name) if root else None
    if found is None:
        return None
    tree, definition = found
    function = next(
        (one for one in definition.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None
    )
    bases = [base.id for base in definition.bases if isinstance(base, ast.Name)]
    own: set[str] = set()
    if function is not None:
        given = function.args
        own = {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)} - {"self"}
        if given.kwarg is None and given.vararg is None:
            return frozenset(own)
    for base in bases:
        module = _imported_from(tree, base) or package
        if (inherited := arguments_of(f"{module}.{base}")) is not None:
            return frozenset(own | inherited)
    return None


@cache
def _package_folder(root: str) -> Path | None:
    """The folder of a package, found without importing it."""
    try:
        spec = find_spec(root)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


@cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _class_in(folder: Path | None, package: str, name: str) -> tuple[ast.Module, ast.ClassDef] | None:
    """The definition of a class in a module, or in the module that its package takes it from."""
    if folder is None:
        return None
    place = folder.joinpath(*package.split(".")[1:])
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if not file.is_file():
            continue
        tree = _parse(file)
        for node in _definitions(tree):
            if node.name == name:
                return tree, node
        module = _imported_from(tree, name)
        return None if module is None or module == package else _class_in(folder, module, name)
    return None


def _definitions(tree: ast.Module) -> Iterator[ast.ClassDef]:
    return (node for node in tree.body if isinstance(node, ast.ClassDef))


def _imported_from(tree: ast.Module, name: str) -> str | None:
    """The module from which a name is imported, if it is."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return node.module
    return None

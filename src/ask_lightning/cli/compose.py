"""Configs made of parts: shipped ones by name, the user's by path, merged in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ask_lightning.cli.errors import UsageError

CONFIGS = Path(__file__).parents[1] / "configs"
"""Where the shipped configs are; their parts are below in `parts`, what shrinks a part in `demo`."""

COMPOSE = "compose"
"""The key under which a config lists what it is made of."""


@dataclass
class Composition:
    """A config and what it was made of.

    Attributes:
        config: The sections for LightningCLI.
        parts: Names of the shipped parts, in the order in which they were merged.
    """

    config: dict[str, Any] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)


def shipped_configs() -> list[str]:
    """The names that `--config` takes.

    Examples:
        >>> "audiocaps_resnet38_bert_ask" in shipped_configs()
        True
    """
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def shipped_parts() -> list[str]:
    """The names that `compose` takes besides those of whole configs.

    Examples:
        >>> "clotho" in shipped_parts()
        True
    """
    return sorted(path.stem for path in (CONFIGS / "parts").glob("*.yaml"))


def compose(
    names: Sequence[str],
    places: Mapping[str, str],
    *,
    demo: bool = False,
    instead: Mapping[str, str] | None = None,
) -> Composition:
    """Read configs and merge them, the later over the earlier.

    A config may begin with `compose:`, a list of names and paths that it is laid over. Sections are merged
    key by key; lists are replaced, but appended to under a key that ends with `+`; a section with another
    `class_path` replaces the arguments of the class before. Paths in `compose` are relative to the file.

    Args:
        names: Shipped names or paths of YAML files.
        places: What stands for `{run}` and the like in texts.
        demo: Whether to lay over each shipped part, in the end, what shrinks it.
        instead: Parts by the name of the part that they take the place of.

    Returns:
        The merged config and its parts.

    Raises:
        UsageError: A name is unknown, a file is no YAML mapping, or configs are made of each other.

    Examples:
        >>> made = compose(["audiocaps_ced_sonar_ask"], {"run": "runs/1", "datasets": "data", "weights": "w"})
        >>> made.parts
        ['run', 'audiocaps', 'ced_sonar', 'ask']
        >>> made.config["data"]["init_args"]["sample_rate"], made.config["trainer"]["max_epochs"]
        (16000, 10)
    """
    made = Composition()
    for name in names:
        _lay_over(made, _find(name, None), instead or {}, ())
    if demo:
        for part in list(made.parts):
            overlay = CONFIGS / "demo" / f"{part}.yaml"
            if overlay.is_file():
                _merge(made.config, _read(overlay))
    made.config = _filled(made.config, places)
    return made


def _lay_over(made: Composition, path: Path, instead: Mapping[str, str], above: tuple[Path, ...]) -> None:
    if path in above:
        raise UsageError(f"{path} is made of itself: {' → '.join(str(one) for one in (*above, path))}.")
    if path.parent == CONFIGS / "parts":
        path = path.with_stem(instead.get(path.stem, path.stem))
        made.parts.append(path.stem)
    content = _read(path)
    listed = content.pop(COMPOSE, [])
    if not isinstance(listed, list):
        raise UsageError(f"{path}: `{COMPOSE}` has to be a list of names and paths, but got {listed!r}.")
    for name in listed:
        _lay_over(made, _find(str(name), path), instead, (*above, path))
    if "ask" in content:
        content["ask"] = _switched(content["ask"])
    _merge(made.config, content)


def _find(name: str, named_in: Path | None) -> Path:
    folder = named_in.parent if named_in is not None else Path()
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = folder / name
        shipped = CONFIGS / path.name
        if not path.is_file() and shipped.is_file() and name in (path.name, f"configs/{path.name}"):
            return shipped
        if not path.is_file():
            where = f" (named in {named_in})" if named_in is not None else ""
            raise UsageError(f"There is no config file {str(path)!r}{where}.")
        return path
    for shipped in (CONFIGS / f"{name}.yaml", CONFIGS / "parts" / f"{name}.yaml"):
        if shipped.is_file():
            return shipped
    if named_in is None and (folder / name).is_file():
        return folder / name
    raise UsageError(
        f"There is no config {name!r}. Shipped are {', '.join(shipped_configs())}, and the parts "
        f"{', '.join(shipped_parts())}. Other configs are named by the path of a .yaml file."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML that can be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UsageError(f"{path} has to hold sections such as `model:`, but holds a {kind}.")
    return content


def _switched(section: Any) -> Any:
    """A section `ask` that is there switches ASK on, an empty one off."""
    if section is None:
        return {"enabled": False}
    return {"enabled": True, **section} if isinstance(section, dict) else section


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for key, value in above.items():
        if key.endswith("+"):
            key = key[:-1]
            before = below.get(key) or []
            below[key] = (before if isinstance(before, list) else [before]) + value
        elif isinstance(value, Mapping) and isinstance(below.get(key), dict):
            if "class_path" in value and value["class_path"] != below[key].get("class_path"):
                below[key] = {}
            _merge(below[key], value)
        elif isinstance(value, Mapping):
            below[key] = {}
            _merge(below[key], value)
        else:
            below[key] = value


def _filled(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(entry, places) for key, entry in value.items()}
    if isinstance(value, list):
        return [_filled(entry, places) for entry in value]
    if isinstance(value, str):
        for name, place in places.items():
            value = value.replace(f"{{{name}}}", place)
    return value

"""Configs composed of parts: shipped ones by name, the user's by path, merged in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ask_lightning.cli.errors import UsageError

CONFIGS = Path(__file__).parents[1] / "configs"
"""Folder of the shipped configs, with their parts in `parts` and what shrinks a part in `demo`."""

COMPOSE = "compose"
"""The key under which a config lists the configs that it is composed of."""


@dataclass
class Composition:
    """A merged config and the parts that it was composed of.

    Attributes:
        config: The sections that LightningCLI reads.
        parts: Names of the shipped parts, in the order in which they were merged.
    """

    config: dict[str, Any] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)


def shipped_configs() -> list[str]:
    """The names of shipped configs, which `--config` takes.

    Examples:
        >>> "audiocaps_resnet38_bert_ask" in shipped_configs()
        True
    """
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def shipped_parts() -> list[str]:
    """The names of parts, which `compose` takes besides those of whole configs.

    Examples:
        >>> "clotho" in shipped_parts()
        True
    """
    return sorted(path.stem for path in (CONFIGS / "parts").glob("*.yaml"))


def shipped_classes(parts: Sequence[str]) -> set[str]:
    """The classes of models and data that shipped parts name.

    Args:
        parts: Names of parts.

    Examples:
        >>> shipped_classes(["clotho", "run"])
        {'ask_lightning.data.ClothoData'}
    """
    contents = [_read_yaml(CONFIGS / "parts" / f"{part}.yaml") for part in parts]
    sections = [content.get(name) or {} for content in contents for name in ("model", "data")]
    return {section["class_path"] for section in sections if "class_path" in section}


def compose(
    names: Sequence[str],
    placeholders: Mapping[str, str],
    *,
    demo: bool = False,
    replacements: Mapping[str, str] | None = None,
) -> Composition:
    """Read configs and merge them, the later over the earlier.

    A config may begin with `compose:`, a list of names and paths of configs that are merged before it.
    Sections are merged key by key. A list replaces the list before; under a key that ends with `+` it is
    appended. A section with another `class_path` drops the arguments of the class before. Paths in `compose`
    are relative to the file.

    Args:
        names: Shipped names or paths of YAML files.
        placeholders: Texts by the name under which they stand in configs, `run` for `{run}`.
        demo: Whether to merge, in the end, the config that shrinks each shipped part.
        replacements: Names of parts, by the name of the part that each one replaces.

    Returns:
        The merged config and its parts.

    Raises:
        UsageError: A name is unknown, a file is no YAML mapping, or a config includes itself.

    Examples:
        >>> places = {"run": "runs/1", "datasets": "data", "weights": "w"}
        >>> composition = compose(["audiocaps_ced_sonar_ask"], places)
        >>> composition.parts
        ['run', 'audiocaps', 'ced_sonar', 'ask']
        >>> composition.config["data"]["init_args"]["sample_rate"]
        16000
    """
    composition = Composition()
    for name in names:
        _merge_file(composition, _find_config(name, None), replacements or {}, ())
    if demo:
        for part in list(composition.parts):
            shrunken = CONFIGS / "demo" / f"{part}.yaml"
            if shrunken.is_file():
                _merge(composition.config, _read_yaml(shrunken))
    composition.config = _fill_placeholders(composition.config, placeholders)
    return composition


def _merge_file(
    composition: Composition, path: Path, replacements: Mapping[str, str], included_by: tuple[Path, ...]
) -> None:
    """Merge a file, and before it the configs that it is composed of, into a composition."""
    if path in included_by:
        chain = " → ".join(str(file) for file in (*included_by, path))
        raise UsageError(f"{path} is made of itself: {chain}.")
    if path.parent == CONFIGS / "parts":
        path = path.with_stem(replacements.get(path.stem, path.stem))
        composition.parts.append(path.stem)
    content = _read_yaml(path)
    listed = content.pop(COMPOSE, [])
    if not isinstance(listed, list):
        raise UsageError(f"{path}: `{COMPOSE}` has to be a list of names and paths, but got {listed!r}.")
    for name in listed:
        _merge_file(composition, _find_config(str(name), path), replacements, (*included_by, path))
    if "ask" in content:
        content["ask"] = _with_ask_enabled(content["ask"])
    _merge(composition.config, content)


def _find_config(name: str, named_in: Path | None) -> Path:
    """The file of a config that is named on the command line or in another config."""
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


def _read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a config file."""
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


def _with_ask_enabled(section: Any) -> Any:
    """The section `ask` with its switch: a section turns ASK on, `ask: null` off."""
    if section is None:
        return {"enabled": False}
    return {"enabled": True, **section} if isinstance(section, dict) else section


def _merge(config: dict[str, Any], update: Mapping[str, Any]) -> None:
    """Merge `update` into `config`, in place, by the rules that `compose` states."""
    for key, value in update.items():
        if key.endswith("+"):
            key = key[:-1]
            before = config.get(key) or []
            config[key] = (before if isinstance(before, list) else [before]) + value
        elif isinstance(value, Mapping) and isinstance(config.get(key), dict):
            if "class_path" in value and value["class_path"] != config[key].get("class_path"):
                config[key] = {}
            _merge(config[key], value)
        elif isinstance(value, Mapping):
            config[key] = {}
            _merge(config[key], value)
        else:
            config[key] = value


def _fill_placeholders(value: Any, placeholders: Mapping[str, str]) -> Any:
    """A config with texts in place of `{run}` and the like, at any depth."""
    if isinstance(value, dict):
        return {key: _fill_placeholders(entry, placeholders) for key, entry in value.items()}
    if isinstance(value, list):
        return [_fill_placeholders(entry, placeholders) for entry in value]
    if isinstance(value, str):
        for name, text in placeholders.items():
            value = value.replace(f"{{{name}}}", text)
    return value

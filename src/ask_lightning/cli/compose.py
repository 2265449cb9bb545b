"""Configs composed of parts: shipped ones by name, the user's by path, merged in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from ask_lightning import losses
from ask_lightning.cli.errors import UsageError

CONFIGS = Path(__file__).parents[1] / "configs"
"""Folder of what shipped configs are made of: `parts`, and in `demo` what shrinks a part."""

COMPOSE = "compose"
"""The key under which a config lists the configs that it is composed of."""

MONITOR = "monitor"
"""The key under which a config names the metric that the best epoch is chosen by, and its placeholder."""

OWN_RECORDINGS = "recordings"
"""The dataset that a name may leave out."""

FIRST_CONFIG = "my_recordings"
"""The config to begin with: one's own recordings, a small model, the loss with the best recall."""

_FIRST_MODEL, _FIRST_LOSS = "tiny", "teacher"
_DEFAULT_MONITOR = "val/mean_recall"


@dataclass
class Composition:
    """A merged config and the parts that it was composed of.

    Attributes:
        config: The sections that LightningCLI reads.
        parts: Names of the shipped parts, in the order in which they were merged.
    """

    config: dict[str, Any] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)


def shipped_parts() -> list[str]:
    """The names of parts, which `compose` takes besides those of whole configs.

    Examples:
        >>> "clotho" in shipped_parts()
        True
    """
    return sorted(path.stem for path in (CONFIGS / "parts").glob("*.yaml"))


@dataclass(frozen=True)
class Roles:
    """Which parts the names of configs are made of, told by what is in them.

    Attributes:
        datasets: Parts that name a class of data.
        models: Parts that name a class of a model.
        losses: Parts that name a class of a loss.
        of_sources: Those losses that look up the pairs of another source of knowledge than the training set.
        sources: Parts that name such a source. One whose name begins with that of a dataset
            is for that dataset alone.
        of_tokens: Those models that compare clips and captions by an interaction of tokens.
        with_tokens: Those losses that do so as well; only they go with such models.
    """

    datasets: tuple[str, ...]
    models: tuple[str, ...]
    losses: tuple[str, ...]
    of_sources: tuple[str, ...]
    sources: tuple[str, ...]
    of_tokens: tuple[str, ...]
    with_tokens: tuple[str, ...]


@cache
def shipped_roles() -> Roles:
    """The roles of the shipped parts in the names of configs.

    Examples:
        >>> shipped_roles().datasets
        ('audiocaps', 'clotho', 'recordings')
    """
    parts = {name: _read_yaml(_part_file(name)) for name in shipped_parts()}

    def with_entry(*keys: str) -> tuple[str, ...]:
        return tuple(name for name, content in parts.items() if _has_entry(content, keys))

    loss_parts = with_entry("ask", "loss", "class_path")
    return Roles(
        datasets=with_entry("data", "class_path"),
        models=with_entry("model", "class_path"),
        losses=loss_parts,
        of_sources=tuple(name for name in loss_parts if _reads_source(parts[name])),
        sources=with_entry("data", "init_args", "knowledge") + with_entry("data", "init_args", "enriched"),
        of_tokens=with_entry("model", "init_args", "interaction"),
        with_tokens=tuple(name for name in loss_parts if _loss_of(parts[name]).takes_tokens),
    )


@cache
def shipped_configs() -> dict[str, list[str]]:
    """The parts of each shipped config, by the names that `--config` takes.

    A name is `DATASET_MODEL_LOSS`, where `baseline` is the model's own loss; after a loss that looks it up
    another source of knowledge may follow. Without a dataset it is for one's own recordings.

    Examples:
        >>> shipped_configs()["clap_ask"]
        ['run', 'recordings', 'clap', 'ask']
        >>> shipped_configs()["clotho_ced_sonar_ask_enriched"]
        ['run', 'clotho', 'ced_sonar', 'ask', 'clotho_enriched']
        >>> shipped_configs()["audiocaps_resnet38_bert_baseline"]
        ['run', 'audiocaps', 'resnet38_bert']
    """
    roles = shipped_roles()
    configs = {FIRST_CONFIG: ["run", OWN_RECORDINGS, _FIRST_MODEL, _FIRST_LOSS]}
    for dataset, model in product(roles.datasets, roles.models):
        backbone = ["run", dataset, model]
        fitting = [loss for loss in roles.losses if loss in roles.with_tokens or model not in roles.of_tokens]
        named = {f"{model}_baseline": backbone} | {f"{model}_{loss}": [*backbone, loss] for loss in fitting}
        of_sources = [loss for loss in roles.of_sources if loss in fitting]
        for loss, (ending, source) in product(of_sources, _sources_of(dataset).items()):
            named[f"{model}_{loss}_{ending}"] = [*backbone, loss, source]
        configs |= {f"{dataset}_{name}": parts for name, parts in named.items()}
        if dataset == OWN_RECORDINGS:
            configs |= named
    return dict(sorted(configs.items()))


def describe_names() -> dict[str, str]:
    """What the names of shipped configs are made of, for messages: the choices for each word of a name.

    Examples:
        >>> describe_names()["DATASET"]
        'audiocaps, clotho, recordings (which may be left out)'
    """
    roles = shipped_roles()
    endings = sorted({ending for dataset in roles.datasets for ending in _sources_of(dataset)})
    return {
        "DATASET": f"{', '.join(roles.datasets)} (which may be left out)",
        "MODEL": ", ".join(roles.models),
        "LOSS": ", ".join(["baseline", *roles.losses]),
        "KNOWLEDGE": f"{', '.join(endings)} (after {', '.join(roles.of_sources)})",
    }


def _loss_of(part: Mapping[str, Any]) -> type[losses.RetrievalLoss]:
    """The class of the loss that a part names."""
    name = str(part["ask"]["loss"]["class_path"]).rpartition(".")[2]
    kind: type[losses.RetrievalLoss] = getattr(losses, name)
    return kind


def _reads_source(part: Mapping[str, Any]) -> bool:
    """Whether the loss that a part names looks up the pairs of another source."""
    return _loss_of(part).needs_knowledge and _loss_of(part).reads_other_clips


def _sources_of(dataset: str) -> dict[str, str]:
    """The parts with knowledge for a dataset, by what the name of a config ends with."""
    roles = shipped_roles()
    endings: dict[str, str] = {}
    if dataset == OWN_RECORDINGS:  # whose clips are the knowledge
        return endings
    for source in roles.sources:
        owner = next((name for name in roles.datasets if source.startswith(f"{name}_")), None)
        if owner in (None, dataset):
            endings[source if owner is None else source.removeprefix(f"{owner}_")] = source
    return endings


def _part_file(name: str) -> Path:
    """The file of a shipped part."""
    return CONFIGS / "parts" / f"{name}.yaml"


def _has_entry(content: Any, keys: Sequence[str]) -> bool:
    """Whether a config has an entry under nested keys."""
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            return False
        content = content[key]
    return True


def shipped_classes(parts: Sequence[str]) -> set[str]:
    """The classes of models and data that shipped parts name.

    Args:
        parts: Names of parts.

    Examples:
        >>> shipped_classes(["clotho", "run"])
        {'ask_lightning.data.ClothoData'}
    """
    contents = [_read_yaml(_part_file(part)) for part in parts]
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
    are relative to the file. The metric under `monitor` is no section; it stands in others as `{monitor}`.

    Args:
        names: Shipped names or paths of YAML files. A model alone in the first place, such as `clap`, stands
            for that model on one's own recordings.
        placeholders: Texts by the name under which they stand in configs, `run` for `{run}`.
        demo: Whether to merge, in the end, the config that shrinks each shipped part.
        replacements: Names of parts, by the name of the part that each one replaces.

    Returns:
        The merged config and its parts.

    Raises:
        UsageError: A name is unknown, a file is no YAML mapping, a config includes itself, or the monitor is
            no name.

    Examples:
        >>> places = {"run": "runs/1", "datasets": "data", "weights": "w"}
        >>> composition = compose(["audiocaps_ced_sonar_ask"], places)
        >>> composition.parts
        ['run', 'audiocaps', 'ced_sonar', 'ask']
        >>> composition.config["data"]["init_args"]["sample_rate"]
        16000
    """
    composition = Composition()
    roles = shipped_roles()
    if names and names[0] in roles.models and not set(names) & set(roles.datasets):
        names = [f"{names[0]}_baseline", *names[1:]]
    for name in names:
        for path in _find_configs(name, None):
            _merge_file(composition, path, replacements or {}, ())
    if demo:
        for part in list(composition.parts):
            shrunken = CONFIGS / "demo" / f"{part}.yaml"
            if shrunken.is_file():
                _merge(composition.config, _read_yaml(shrunken))
    if MONITOR in placeholders and f"{{{MONITOR}}}" not in str(composition.config):
        raise UsageError(
            f"--{MONITOR} has no effect, because nothing in the config says {{{MONITOR}}}. Name the metric "
            "where the config has its `ModelCheckpoint`."
        )
    monitor = composition.config.pop(MONITOR, _DEFAULT_MONITOR)
    if not isinstance(monitor, str):
        raise UsageError(f"`{MONITOR}` has to be the name of a metric, but got {monitor!r}.")
    composition.config = _fill_placeholders(composition.config, {MONITOR: monitor, **placeholders})
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
        for included in _find_configs(str(name), path):
            _merge_file(composition, included, replacements, (*included_by, path))
    if "ask" in content:
        content["ask"] = _with_ask_enabled(content["ask"])
    _merge(composition.config, content)


def _find_configs(name: str, named_in: Path | None) -> list[Path]:
    """The files of a config that is named on the command line or in another config."""
    folder = named_in.parent if named_in is not None else Path()
    path = folder / name
    configs = shipped_configs()
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if path.is_file():
            return [path]
        if path.stem in configs and name in (path.name, f"configs/{path.name}"):
            return [_part_file(part) for part in configs[path.stem]]
        where = f" (named in {named_in})" if named_in is not None else ""
        raise UsageError(f"There is no config file {str(path)!r}{where}.")
    if name in configs:
        return [_part_file(part) for part in configs[name]]
    if _part_file(name).is_file():
        return [_part_file(name)]
    if named_in is None and path.is_file():
        return [path]
    choices = "; ".join(f"{word}: {names}" for word, names in describe_names().items())
    raise UsageError(
        f"There is no config {name!r}. {_near(name, configs)}Shipped are DATASET_MODEL_LOSS and "
        f"DATASET_MODEL_LOSS_KNOWLEDGE, such as clap_ask ({choices}), {FIRST_CONFIG} to begin with, and the "
        f"parts {', '.join(shipped_parts())}. Other configs are named by the path of a .yaml file."
    )


def _near(name: str, configs: Mapping[str, object]) -> str:
    """A sentence that asks whether a similar name is meant, or nothing."""
    near = get_close_matches(name, configs, n=1, cutoff=0.8)
    return f"Is it {near[0]}? " if near else ""


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

"""docs/paper.md: every equation is on it, and every option that it names exists, with the default it says."""

import ast
import importlib
import importlib.util
import inspect
import json
import re
from pathlib import Path

import lightning
import pytest
import yaml

import ask_lightning
from ask_lightning import ASKModule, KnowledgeRefreshCallback, ReliabilityOTLoss

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", PROSE)))
OPTION = re.compile(r"(\w+)=(.+)")
OWNERS = (ReliabilityOTLoss, KnowledgeRefreshCallback)
NAMESPACES = ("losses", "callbacks", "functional", "knowledge", "metrics", "reproduce", "data", "models")
NUM_EQUATIONS = 36


def parameters(owner: object) -> dict[str, inspect.Parameter]:
    return {name: value for name, value in inspect.signature(owner).parameters.items() if name != "self"}


def owner_of(option: str) -> type:
    (owner,) = (owner for owner in OWNERS if option in parameters(owner))
    return owner


def public(name: str) -> object:
    """What a name stands for among the public names of the library."""
    for module in (ask_lightning, *(importlib.import_module(f"ask_lightning.{room}") for room in NAMESPACES)):
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(f"docs/paper.md names {name}, which does not exist")


def check_call(span: str) -> None:
    """`Class(name=value)`: the class takes these arguments."""
    call = ast.parse(span, mode="eval").body
    names = [keyword.arg for keyword in call.keywords]
    assert set(names) <= set(parameters(public(call.func.id))), span


def check_name(span: str) -> None:
    """A bare name: an option, a public name, or one of Lightning's."""
    options = {name for owner in OWNERS for name in parameters(owner)}
    models = {"freeze_audio", "freeze_text"}
    assert models <= set(parameters(public("ResNet38BERT")))
    known = options | models | set(parameters(lightning.Trainer.__init__))
    if span not in known and span != "max_epochs" and not hasattr(lightning, span):
        public(span)


def check_dotted(span: str) -> None:
    """A dotted name: a key of a config with the section `ask`, or something that can be imported."""
    first, *rest = span.split(".")
    if first == "ask":
        value = yaml.safe_load((ROOT / "src/ask_lightning/configs/parts/ask.yaml").read_text())["ask"]
        for key in rest:
            value = value[key]
    elif importlib.util.find_spec(span if first == "ask_lightning" else first) is None:
        raise AssertionError(span)
    elif first != "ask_lightning":
        assert hasattr(importlib.import_module(first), rest[0]), span


def check_option(span: str) -> None:
    """`name=value`: the option exists, and its owner takes the value."""
    name, value = OPTION.fullmatch(span).groups()
    owner = owner_of(name)
    owner(**{name: ast.literal_eval(value)})


@pytest.mark.parametrize("span", SPANS)
def test_what_is_named_exists(span):
    if span.startswith("ask/"):
        assert f"`{span}`" in (ROOT / "docs" / "logging.md").read_text(encoding="utf-8")
    elif "/" in span:
        assert (ROOT / span).exists()
    elif span.startswith("--"):
        assert f'"{span}"' in (ROOT / "examples" / "paper_options.py").read_text(encoding="utf-8")
    elif OPTION.fullmatch(span):
        check_option(span)
    elif "(" in span:
        check_call(span)
    elif "." in span:
        check_dotted(span)
    else:
        check_name(span)


@pytest.mark.parametrize("owner", OWNERS)
def test_every_option_is_on_the_page_first_with_its_default(owner):
    mentioned: dict[str, str] = {}
    for span in re.findall(r"`([^`\n]+)`", PROSE):
        if option := OPTION.fullmatch(span):
            mentioned.setdefault(*option.groups())
    for name, parameter in parameters(owner).items():
        assert name in mentioned, f"docs/paper.md lacks `{name}`"
        assert ast.literal_eval(mentioned[name]) == parameter.default, name


def test_every_equation_is_on_the_page():
    rows = re.findall(r"^\| ([\d–, ]+) \|", PROSE, re.MULTILINE)
    (rest,) = re.findall(r"^Equations ([\d–, ]+ and \d+) need none", PROSE, re.MULTILINE)
    found = set()
    for first, last in re.findall(r"(\d+)(?:–(\d+))?", " ".join([*rows, rest])):
        found |= set(range(int(first), int(last or first) + 1))
    assert found == set(range(1, NUM_EQUATIONS + 1))


def test_variants_of_the_command_exist_and_are_in_the_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    assert "python examples/paper_options.py" in PAGE
    table = PAGE[PAGE.index("| ASK with |") :]
    for variant in importlib.import_module("paper_options").VARIANTS:
        cells = []
        for option in variant.split():
            name, value = OPTION.fullmatch(option).groups()
            value = json.loads(value) if re.fullmatch(r"[\d.]+|true|false", value) else value
            owner_of(name)(**{name: value})
            cells.append(f"`{name}={json.dumps(value) if isinstance(value, str) else value}`")
        assert f"\n| {', '.join(cells)} |" in table, variant


def test_it_is_found():
    assert "paper.md" in (ROOT / "mkdocs.yml").read_text()
    for page in ("README.md", "docs/guide.md", "docs/index.md"):
        assert "paper.md" in (ROOT / page).read_text(encoding="utf-8")
    assert ASKModule.__name__ in PAGE

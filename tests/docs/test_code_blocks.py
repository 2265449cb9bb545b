"""Code blocks of README.md and of the pages use what exists, and tests that a page names exist."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
ROOMS = ("losses", "callbacks", "interaction", "metrics", "data", "models", "knowledge", "functional")
PUBLIC = {
    name: getattr(room, name)
    for room in (importlib.import_module(f"ask_lightning.{name}") for name in ROOMS)
    for name in room.__all__
} | {"ASKModule": importlib.import_module("ask_lightning").ASKModule}


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if BLOCK.search(text)])
def test_names_and_arguments(page):
    for code in BLOCK.findall(PAGES[page]):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ask_lightning"):
                for alias in node.names:
                    assert hasattr(importlib.import_module(node.module), alias.name), alias.name
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PUBLIC:
                named = {word.arg: None for word in node.keywords if word.arg}
                signature = inspect.signature(PUBLIC[node.func.id])
                signature.bind_partial(*node.args, **named)


@pytest.mark.parametrize("page", PAGES)
def test_calls_in_the_text(page):
    for code in re.findall(r"`((?:\w+)\([^`…]*\))`", BLOCK.sub("", PAGES[page])):
        name = code.partition("(")[0]
        if name in PUBLIC:
            (call,) = ast.parse(re.sub(r"\s+", " ", code).replace("=...", "=None")).body
            named = {word.arg: None for word in call.value.keywords}
            inspect.signature(PUBLIC[name]).bind_partial(*call.value.args, **named)


def test_tests_that_reliability_names_exist():
    file = ""  # `…` is the file that is named before
    for named, test in re.findall(r"`(…(?=::)|[\w/]+\.py)(?:::(\w+))?", PAGES["docs/reliability.md"]):
        file = file if named == "…" else (ROOT / "tests" / named).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in file, f"{named}::{test}"

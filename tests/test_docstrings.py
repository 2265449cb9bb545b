"""Docstrings say what things are: no entry is a fragment, no docstring only points elsewhere."""

import ast
import re
from pathlib import Path

import pytest

import ask_lightning

SOURCE = Path(ask_lightning.__file__).parent
# An argument's entry, with the lines that belong to it.
ENTRY = re.compile(r"^    (\w+): (.+?)(?=^    \S|\Z)", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^(Args|Attributes):\n((?:    .*\n?|\n)+)", re.MULTILINE)
FRAGMENT = re.compile(r"(Of|See|The same|As|Whose|Same) ")
POINTER = re.compile(r"See `[^`]+`[^.]*\.?\Z")


def docstrings(path: Path) -> list[tuple[str, str]]:
    """Each documented thing of a file and its docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            found.append((f"{path.name}:{getattr(node, 'lineno', 1)} {getattr(node, 'name', '')}", text))
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_each_says_what_it_is(path):
    wrong = []
    for place, text in docstrings(path):
        if POINTER.match(text):
            wrong.append(f"{place}: {text}")
        for _, entries in SECTION.findall(text):
            wrong += [
                f"{place}: `{name}`: {entry.strip()}"
                for name, entry in ENTRY.findall(entries)
                if FRAGMENT.match(entry)
            ]
    assert not wrong, "\n".join(wrong)

"""The messages that docs/faq.md explains are messages of the library."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUOTED = re.findall(r'^### "(.+)"$', (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)


@cache
def messages() -> list[str]:
    """All strings of the source, with a mark in the place of what is filled in."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize("quoted", QUOTED)
def test_message_is_in_the_source(quoted):
    parts = [re.escape(part.strip()) for part in quoted.split("…")]
    pattern = re.compile(r"\s?.*?\0.*?\s?".join(parts), re.DOTALL)
    assert any(pattern.search(message) for message in messages()), quoted


def test_there_are_messages():
    assert len(QUOTED) > 20

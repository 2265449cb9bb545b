"""The tutorials run as they are printed.

Python blocks of a page run one after another, `bash` blocks as well (marked `slow`). Blocks named `sh` need
data, GPUs, a cluster or a browser, so only the flags of their lines are checked.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "tutorials").glob("*.md")}
BLOCK = re.compile(r'^```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PROGRAMS = {
    "python": "",
    "ask-lightning": "-m ask_lightning",
    "torchrun": "-m torch.distributed.run",
}


def blocks(page: str, language: str) -> list[str]:
    return [code for kind, _, code in BLOCK.findall(PAGES[page]) if kind == language]


def pages_with(language: str) -> list[str]:
    return sorted(page for page in PAGES if blocks(page, language))


def lines_of_the_command() -> list[str]:
    lines = [
        line
        for page in PAGES
        for kind in ("bash", "sh")
        for code in blocks(page, kind)
        for line in code.splitlines()
    ]
    return sorted({line for line in lines if line.startswith("ask-lightning ")})


@pytest.fixture
def run_python(tmp_path, monkeypatch):
    """Runs the Python blocks of a page and returns what they leave."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # `seed_everything` sets it; the test takes it back

    def run(page: str) -> dict:
        names = {"__name__": "__main__"}
        monkeypatch.syspath_prepend(tmp_path)
        for kind, title, code in BLOCK.findall(PAGES[page]):
            if title:  # a later one may import it
                (tmp_path / title).write_text(code, encoding="utf-8")
                monkeypatch.delitem(sys.modules, Path(title).stem, raising=False)
            if kind != "python":
                continue
            exec(compile(code, f"docs/tutorials/{page}.md", "exec"), names)
        return names

    return run


def test_wrap_your_model(run_python):
    names = run_python("wrap_your_model")
    plain = names["plain"].state_dict()
    assert set(plain) == set(names["MyRetrievalModel"]().state_dict())
    assert names["trainer"].callback_metrics["val/a2t/recall_at_10"] > 0.5, "chance is 0.16"


def test_other_modalities(run_python):
    scores = run_python("other_modalities")["trainer"].callback_metrics
    assert scores["val/image_to_text_at_5"] > 0.5, "chance is 0.16"
    assert scores["val/text_to_image_at_5"] > 0.5


def test_several_gpus_with_one_process(run_python, capsys):
    run_python("several_gpus")
    assert len(re.findall(r"1 processes, loss \d", capsys.readouterr().out)) == 2


def test_no_page_with_python_is_forgotten():
    assert pages_with("python") == ["other_modalities", "several_gpus", "wrap_your_model"]


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("bash"))
def test_shell(page, tmp_path):
    for _, title, code in BLOCK.findall(PAGES[page]):
        if title:
            (tmp_path / title).write_text(code, encoding="utf-8")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, module in PROGRAMS.items():
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        program.chmod(0o755)
    paths = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    script = "set -eu\n" + "".join(blocks(page, "bash"))
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if page == "several_gpus":
        assert re.findall(r"(\d) processes, loss", done.stdout) == ["1", "2", "2"]


@pytest.mark.parametrize("line", lines_of_the_command(), ids=str)
def test_flags_and_configs_exist(line):
    pytest.importorskip("jsonargparse")
    from ask_lightning.cli import check

    without_checkpoint = re.sub(r" --ckpt_path \S+", "", line)  # which no run has written here
    check(shlex.split(without_checkpoint)[1:])


def test_every_tutorial_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"tutorials/{page}.md" in navigation

"""The tutorials run as they are printed.

Python blocks of a page run one after another, `bash` blocks as well (marked `slow`). Blocks named `sh` need
data, GPUs, a cluster or a browser: their lines run among those of `bash` in the short form of `SHORT`. Those
of `ONLY_PARSED` cannot run here; bash and the programs' own parsers read them. There is no third kind.
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
    "serve_until_it_answers": f"{ROOT / 'tests' / 'helpers' / 'served_page.py'}",
}


_CLUSTER = "ask-lightning fit --config clotho_ced_sonar_ask"
SHORT = {
    "ask-lightning fit --config clap_teacher --data.root sounds": (
        "ask-lightning fit --config clap_teacher --demo=demo --trainer.max_epochs 1"
    ),
    "ask-lightning serve sounds.safetensors --audio sounds": (
        "serve_until_it_answers sounds.safetensors --audio sounds"
    ),
    "ask-lightning fit --config audiocaps_resnet38_bert_ask --datasets /data --weights /weights": (
        "ask-lightning fit --config audiocaps_resnet38_bert_ask --demo=demo"
    ),
    "ask-lightning test --config audiocaps_resnet38_bert_ask --datasets /data --weights /weights "
    "--ckpt_path best": (
        "ask-lightning test --config audiocaps_resnet38_bert_ask --demo=demo --ckpt_path best"
    ),
    "ask-lightning fit --config audiocaps_resnet38_bert_baseline --datasets /data --weights /weights": (
        "ask-lightning fit --config audiocaps_resnet38_bert_baseline --demo=demo"
    ),
    "ask-lightning fit --config audiocaps_resnet38_bert_ask --datasets /data --model.temperature 0.05 "
    "--run runs/colder": (
        "ask-lightning fit --config audiocaps_resnet38_bert_ask --demo=demo --model.temperature 0.05 "
        "--run runs/colder"
    ),
    "ask-lightning fit --config audiocaps_resnet38_bert_ask --datasets /data --weights /weights "
    "--seed_everything 1 --run runs/ask-1": (
        "ask-lightning fit --config audiocaps_resnet38_bert_ask --demo=demo --seed_everything 1 "
        "--run runs/ask-1"
    ),
    "ask-lightning test --config audiocaps_resnet38_bert_ask --datasets /data --run runs/ask-1 "
    "--ckpt_path best": (
        "ask-lightning test --config audiocaps_resnet38_bert_ask --demo=demo --run runs/ask-1 "
        "--ckpt_path best"
    ),
    "ask-lightning transfer --config audiocaps_resnet38_bert_ask --datasets /data --weights /weights "
    "--target clotho": (
        "ask-lightning transfer --config audiocaps_resnet38_bert_ask --demo=demo --target clotho --run moved"
    ),
    f"{_CLUSTER} --trainer.devices 8 --trainer.strategy ddp --ask.loss.gather true": (
        f"{_CLUSTER} --demo=demo --trainer.devices 2 --trainer.strategy ddp --ask.loss.gather true"
    ),
}
"""What is run in the place of a line that needs published data, a hub, eight GPUs, or runs until Ctrl-C."""

ONLY_PARSED = {
    "torchrun --nnodes 2 --nproc-per-node 8 --node-rank 0 --master-addr first.machine --master-port 29500 "
    "train.py": "two machines with eight GPUs",
    "srun python train.py": "SLURM",
    f"{_CLUSTER} --trainer.devices 8 --trainer.num_nodes 2 --trainer.strategy ddp --ask.loss.gather true "
    "--ask.refresh.placement sharded": "two machines",
    "ask-lightning reproduce table1 table2 --data audiocaps --root /data/AudioCaps --wavcaps /data/WavCaps": (
        "AudioCaps and WavCaps"
    ),
}
"""Lines that are not run, and what they would need."""


def blocks(page: str, language: str) -> list[str]:
    return [code for kind, _, code in BLOCK.findall(PAGES[page]) if kind == language]


def pages_with(language: str) -> list[str]:
    return sorted(page for page in PAGES if blocks(page, language))


def lines_of(code: str) -> list[str]:
    """The commands of a block of shell."""
    return [line for line in code.splitlines() if line and not line.startswith("#")]


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
    script = ["set -eu"]
    for kind, title, code in BLOCK.findall(PAGES[page]):
        if title:
            (tmp_path / title).write_text(code, encoding="utf-8")
        if kind == "bash":
            script.append(code)
        if kind == "sh":
            script += [SHORT[line] for line in lines_of(code) if line in SHORT]
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, module in PROGRAMS.items():
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        program.chmod(0o755)
    paths = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    given = ["bash", "-c", "\n".join(script)]
    done = subprocess.run(given, cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    if page == "several_gpus":
        assert re.findall(r"(\d) processes, loss", done.stdout) == ["1", "2", "2"]
    if page == "own_recordings":
        assert "The page answers." in done.stdout


def test_every_line_of_shell_is_run_or_parsed():
    lines = {line for page in PAGES for code in blocks(page, "sh") for line in lines_of(code)}
    assert lines == SHORT.keys() | ONLY_PARSED.keys(), "a line is new, has changed or is gone"
    assert not SHORT.keys() & ONLY_PARSED.keys()
    assert {page for page in PAGES if blocks(page, "sh")} <= set(pages_with("bash")), (
        "which `test_shell` runs"
    )
    kinds = {kind for page in PAGES.values() for kind, _, _ in BLOCK.findall(page)}
    assert kinds == {"python", "bash", "sh", "text"}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_shell_is_that_of_bash(page):
    for kind in ("bash", "sh"):
        for code in blocks(page, kind):
            done = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
            assert done.returncode == 0, f"{done.stderr}\n{code}"


@pytest.mark.parametrize("line", sorted(ONLY_PARSED), ids=lambda line: line.split()[0])
def test_what_is_not_run_is_read_by_the_parsers(line, capsys):
    pytest.importorskip("jsonargparse")
    program, *arguments = shlex.split(line)
    scripts = [title for page in PAGES.values() for _, title, _ in BLOCK.findall(page) if title]
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(arguments)
        assert given.training_script in scripts
        assert (given.nnodes, given.nproc_per_node, given.node_rank) == ("2", "8", 0)
    elif program == "srun":
        assert arguments[0] in PROGRAMS
        assert arguments[1] in scripts
    elif arguments[0] == "reproduce":
        from ask_lightning.cli.reproduce import parse_flags

        options, task = parse_flags(arguments[1:])
        assert options.data == "audiocaps"
        assert str(task["root"]) == "/data/AudioCaps"
    else:
        from ask_lightning.cli import run

        with pytest.raises(SystemExit) as end:  # which ends the process once the config is printed
            run([*arguments, "--print_config"])
        assert end.value.code in (None, 0)
        assert "num_nodes: 2" in capsys.readouterr().out


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

"""Tables, figures and experiments of a small study."""

import csv
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from ask_lightning.losses import ReliabilityOTLoss
from ask_lightning.reproduce.artifacts import ARTIFACTS
from ask_lightning.reproduce.artifacts.corrupted import CorruptedPairs
from ask_lightning.reproduce.artifacts.entries import ask
from ask_lightning.reproduce.artifacts.sweeps import periods
from ask_lightning.reproduce.published import published_row, published_rows
from ask_lightning.reproduce.study import Study, with_origins
from tests.reproduce.small_tasks import small_task


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return Study(small_task(folder), folder / "runs", seeds=(0, 1), num_candidates=1, log=lambda line: None)


def make(study, name, folder):
    artifact = ARTIFACTS[name]
    assert artifact.obstacle(study.task) is None
    return artifact.write(study, study.train(artifact.entries(study.task)), folder)


def rows_of(markdown):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]


def test_table_5_has_the_frameworks_beside_the_papers_numbers(study, tmp_path):
    text = make(study, "table5", tmp_path)
    lines = {row[0]: row for row in rows_of(text.split("\n\n")[0])}
    assert lines["MoCo"][-2:] == ["37.2 / 68.5 / 82.0", "32.9 / 67.4 / 80.9"]
    assert lines["Teacher (beyond the paper)"][-2:] == ["–", "–"]
    assert "minus NT-Xent" in text
    with open(tmp_path / "table5.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == 2 * 7
    nt_xent = [100 * float(run["test/a2t/recall_at_1"]) for run in runs if run["method"] == "NT-Xent"]
    mean, _, deviation = lines["NT-Xent"][2].partition(" ± ")
    assert float(mean) == pytest.approx(sum(nt_xent) / 2, abs=0.05)
    assert float(deviation) == pytest.approx(torch.tensor(nt_xent).std().item(), abs=0.05)
    assert (tmp_path / "table5.md").read_text().startswith("# Table 5: ")
    latex = (tmp_path / "table5.tex").read_text()
    assert latex.count(r"\\") == 1 + 7
    assert r"$\pm$" in latex


def test_figures_of_one_observed_run(study, tmp_path):
    make(study, "figure6", tmp_path)
    ElementTree.parse(tmp_path / "figure6.svg")
    assert (tmp_path / "figure6.png").stat().st_size > 10_000
    table = make(study, "table6", tmp_path)
    assert "thunder query, clean" in table
    assert sum("| ours |" in line for line in table.splitlines()) == 4
    retrieved = rows_of(make(study, "table3", tmp_path))
    assert len(retrieved) == 2 + 12  # six pairs, two directions


def test_transfer_to_the_same_data_is_the_test_itself(study, tmp_path):
    make(study, "figure4", tmp_path)
    trained = study.train(ARTIFACTS["figure4"].entries(study.task))
    for one in trained.values():
        for run in one.runs:
            (path,) = run.folder.glob("transfer-the same-*.json")
            kept = json.loads(path.read_text())
            assert kept == pytest.approx(dict(run.metrics.test))


def test_nt_xent_has_no_influence_from_outside_and_is_the_plain_one(study, tmp_path):
    lines = {row[0]: row for row in rows_of(make(study, "locality", tmp_path))}
    assert float(lines["NT-Xent"][1]) == 0
    assert float(lines["ASK"][1]) > 0
    trained = study.train(
        [*ARTIFACTS["locality"].entries(study.task), *ARTIFACTS["table5"].entries(study.task)]
    )
    for switched_off, plain in zip(trained["NT-Xent, influence"].runs, trained["NT-Xent"].runs, strict=True):
        assert switched_off.metrics == plain.metrics


def test_sweeps_hold_the_task_and_the_papers_values(study, tmp_path):
    text = make(study, "figure5", tmp_path)
    assert [row[0] for row in rows_of(text)[2:5]] == ["NT-Xent", "T = static", "T = 1"]
    longer = replace(study.task, max_epochs=30, refresh={"T": 15})
    assert periods(longer) == (3, 9, 15, 18)
    names = list(with_origins(ARTIFACTS["figure7"].entries(study.task)))
    assert names[:3] == ["ASK", "ASK, K=5", "ASK, K=15"]
    assert len(names) == 11  # K = 10 and ρ = 0.2 are ASK itself


def test_what_a_task_lacks_is_said():
    assert "not compared by tokens" in ARTIFACTS["table4"].obstacle(replace_task(transfer={}))
    assert "no other domain" in ARTIFACTS["figure4"].obstacle(replace_task(transfer={}))


def test_figure_7_needs_as_many_pairs_as_neighbors(study):
    class FewPairs:
        datasets: ClassVar = {"train": range(29)}

    few = replace(study.task, make_data=lambda seed: FewPairs)
    assert (
        ARTIFACTS["figure7"].obstacle(few) == "embeddings has 29 training pairs, fewer than the largest K, 30"
    )
    assert ARTIFACTS["figure7"].obstacle(study.task) is None


def replace_task(**options):
    from ask_lightning.reproduce.tasks import embeddings_task

    return replace(embeddings_task("a", "b", "c"), **options)


def test_other_knowledge_becomes_lines_of_table_1():
    task = replace_task(knowledge_sources={"other scenes": list, "other captions": list})
    labels = [row.label for row in ARTIFACTS["table1"].rows(task)]
    assert labels[:6] == [
        "NT-Xent",
        "BLAT (published)",
        "Auto-ACD (published)",
        "ASK, knowledge: other scenes",
        "ASK, knowledge: other captions",
        "ASK, knowledge: training pairs",
    ]
    sources = {entry.name: entry.variant.refresh for entry in ARTIFACTS["table1"].entries(task)}
    assert sources["ASK, knowledge: other scenes"] == {"source": list}
    published = {row.label: row.published for row in ARTIFACTS["table1"].rows(task)}
    assert published["ASK, knowledge: other scenes"].system == "ASK, first source"
    alone = replace_task(knowledge_sources={"training clips, other captions": list})
    lines = {row.label: row for row in ARTIFACTS["table1"].rows(alone)}
    assert lines["ASK, knowledge: training clips, other captions"].published.system == "ASK, second source"
    assert lines["ASK, first source (published)"].entry is None
    without = [row.label for row in ARTIFACTS["table1"].rows(replace_task())]
    assert without[3:5] == ["ASK, first source (published)", "ASK, second source (published)"]


def test_clotho_stands_beside_the_papers_clotho():
    rows = {row.label: row for row in ARTIFACTS["table1"].rows(replace_task(name="clotho"))}
    assert rows["NT-Xent"].published.recalls["a2t/recall_at_1"] == 16.3
    task = replace_task(name="clotho", description={"backbone": "ced_sonar"})
    rows = {row.label: row for row in ARTIFACTS["table1"].rows(task)}
    assert rows["GLAP (published)"].published.recalls["t2a/recall_at_10"] == 54.2


def test_table_4_trains_models_of_tokens():
    def make_model(tokens, learning_rate):
        raise AssertionError

    task = replace_task(make_token_model=make_model, knowledge_sources={"other": list})
    entries = ARTIFACTS["table4"].entries(task)
    assert [(entry.name, entry.tokens) for entry in entries] == [
        ("GPA", "prototypes"),
        ("GPA + ASK, knowledge: other", "prototypes"),
        ("GPA + ASK", "prototypes"),
        ("FLAM", "frames"),
        ("FLAM + ASK, knowledge: other", "frames"),
        ("FLAM + ASK", "frames"),
    ]


def test_options_of_a_changed_ask_reach_the_loss():
    entry = ask("without injection", injection_ratio=0.0)
    assert entry.variant.loss is ReliabilityOTLoss
    assert entry.variant.options == {"injection_ratio": 0.0}
    assert entry.name == "ASK, without injection"


def test_published_numbers_are_complete():
    counts = {}
    for row in published_rows():
        counts[row.table] = counts.get(row.table, 0) + 1
        assert list(row.recalls.values()) == pytest.approx(list(row.recalls.values()))
        assert (
            row.recalls["a2t/recall_at_1"] < row.recalls["a2t/recall_at_5"] < row.recalls["a2t/recall_at_10"]
        )
    assert counts == {"table1": 22, "table2": 8, "table4": 10, "table5": 5}
    assert published_row("table2", "full ASK+", "AudioCaps").recalls["t2a/recall_at_1"] == 35.4
    with pytest.raises(ValueError, match="no line 'WAV'"):
        published_row("table1", "WAV", "Clotho")


def test_corrupted_pairs_lose_their_share_of_texts_and_nothing_else():
    pairs = [{"clip_id": number, "caption": f"caption {number}"} for number in range(40)]
    corrupted = [CorruptedPairs(pairs, 0.25)[row] for row in range(40)]
    wrong = [item for item in corrupted if item["caption"] != f"caption {item['clip_id']}"]
    assert len(wrong) == 10
    assert sorted(item["caption"] for item in corrupted) == sorted(item["caption"] for item in pairs)
    assert [item["clip_id"] for item in corrupted] == list(range(40))
    assert list(CorruptedPairs(pairs, 0.0)) == pairs
    with pytest.raises(ValueError, match="`share`"):
        CorruptedPairs(pairs, 1.5)


@pytest.mark.slow
def test_wrong_knowledge_moves_the_factor_towards_one(study, tmp_path):
    rows = rows_of(make(study, "noise", tmp_path).split("\n\n")[0])[2:]
    factors = {row[0]: float(row[3]) for row in rows if row[1] == "with weighting"}
    assert factors["100%"] > factors["0%"]
    assert {float(row[3]) for row in rows if row[1] == "without weighting"} == {1.0}

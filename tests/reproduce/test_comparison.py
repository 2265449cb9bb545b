"""The protocol of a comparison: equal budgets, tuned on validation only, and the table of its results."""

import pytest

from ask_lightning.reproduce import Run, compare, comparison_markdown, mean_recall
from ask_lightning.reproduce.comparison import RECALLS


def scores(value: float) -> dict[str, float]:
    return dict.fromkeys(RECALLS, value)


def test_every_method_sees_the_same_temperatures_and_seeds_and_is_tuned_on_validation():
    calls = []

    def train(method: str, temperature: float, seed: int) -> Run:
        calls.append((method, temperature, seed))
        best = {"A": 0.05, "B": 0.2}[method]
        # Tests speak for another temperature than validation.
        return Run(method, temperature, seed, scores(1 - abs(temperature - best)), scores(temperature))

    lines = []
    runs = compare(train, ["A", "B"], [0.05, 0.1, 0.2], [7, 8], log=lines.append)
    assert [(run.method, run.temperature, run.seed) for run in runs] == [
        ("A", 0.05, 7),
        ("A", 0.05, 8),
        ("B", 0.2, 7),
        ("B", 0.2, 8),
    ]
    for method, chosen in (("A", 0.05), ("B", 0.2)):
        own = [call[1:] for call in calls if call[0] == method]
        assert own == [(0.05, 7), (0.1, 7), (0.2, 7), (chosen, 8)]
    assert len(lines) == 8
    assert lines[-1].startswith("[8/8] B ")


@pytest.mark.parametrize("empty", range(3))
def test_nothing_to_compare(empty):
    arguments = [["A"], [0.1], [0]]
    arguments[empty] = []
    with pytest.raises(ValueError, match="`methods`, `temperatures` and `seeds` have to hold at least one"):
        compare(lambda *_: None, *arguments)


def test_the_table_has_mean_and_deviation_over_seeds():
    runs = [Run("A", 0.1, seed, {}, scores(value)) for seed, value in enumerate((0.1, 0.2, 0.3))]
    table = comparison_markdown([*runs, Run("B", 0.05, 0, {}, scores(0.5))], ["t2a/recall_at_5"])
    assert table.splitlines() == [
        "| method | τ | seeds | T2A R@5 |",
        "|---|---|---|---|",
        "| A | 0.1 | 3 | 20.0 ± 10.0 |",
        "| B | 0.05 | 1 | 50.0 |",
    ]
    assert mean_recall(runs[0].test) == pytest.approx(0.1)

"""Tables: mean and deviation over seeds, raw and calibrated, and paired differences."""

import pytest

from ask_lightning.metrics.table import RECALLS
from ask_lightning.reproduce import (
    Comparison,
    Metrics,
    Run,
    comparison_markdown,
    differences_markdown,
    tuning_markdown,
)


def compared(*groups):
    """A comparison in which raw and calibrated search chose the same settings."""
    runs = tuple(run for group in groups for run in group)
    return Comparison(tuning=(), raw=runs, calibrated=runs)


def runs(method, raw, calibrated, seeds=None, temperature=0.1):
    return [
        Run(
            method,
            {"temperature": temperature},
            seed,
            "test",
            Metrics(*(value and dict.fromkeys(RECALLS, value) for value in (one, one, other, other))),
        )
        for seed, one, other in zip(seeds or range(len(raw)), raw, calibrated, strict=True)
    ]


def test_the_table_has_mean_and_deviation_over_seeds():
    lines = comparison_markdown(
        compared(runs("A", (0.1, 0.2, 0.3), (0.4, 0.4, 0.4)), runs("B", (0.5,), (0.25,)))
    ).splitlines()
    heading = (
        "| method | settings | seeds | search | A2T R@1 | A2T R@5 | A2T R@10 | T2A R@1 | T2A R@5 | T2A R@10"
    )
    assert lines[0] == f"{heading} | mean |"
    assert lines[2] == "| A | temperature=0.1 | 3 | raw" + 7 * " | 20.0 ± 10.0" + " |"
    assert lines[3] == "| A | temperature=0.1 | 3 | calibrated" + 7 * " | 40.0 ± 0.0" + " |"
    assert lines[4] == "| B | temperature=0.1 | 1 | raw" + 7 * " | 50.0" + " |"
    assert len(lines) == 6


def test_differences_are_paired_by_seed():
    comparison = compared(
        runs("base", (0.30, 0.40, 0.50), (0.30, 0.40, 0.50)),
        runs("better", (0.53, 0.41, 0.32), (0.50, 0.40, 0.30), seeds=[2, 1, 0]),
    )
    assert differences_markdown(comparison, "base").splitlines() == [
        "| method | search | minus base | 95 % interval | p |",
        "|---|---|---|---|---|",
        "| better | raw | +2.00 | -0.48 … +4.48 | 0.074 |",
        "| better | calibrated | +0.00 | +0.00 … +0.00 | 1.000 |",
    ]


def test_one_seed_has_no_interval():
    table = differences_markdown(
        compared(runs("base", (0.3,), (0.3,)), runs("other", (0.2,), (0.4,))), "base"
    )
    assert "| other | raw | -10.00 | – | – |" in table


def test_what_cannot_be_paired():
    one, other = runs("base", (0.3,), (0.3,)), runs("other", (0.2,), (0.4,), seeds=[7])
    with pytest.raises(ValueError, match=r"`reference` has to be one of \['base'\], but got 'basis'"):
        differences_markdown(compared(one), "basis")
    with pytest.raises(ValueError, match="same seeds for each method, but got"):
        differences_markdown(compared(one, other), "base")


def test_each_kind_of_search_has_settings_of_its_own():
    comparison = Comparison(
        tuning=(),
        raw=tuple(runs("A", (0.3,), (0.3,)) + runs("B", (0.2,), (0.2,))),
        calibrated=tuple(runs("A", (0.3,), (0.3,)) + runs("B", (0.1,), (0.5,), temperature=0.2)),
    )
    lines = comparison_markdown(comparison).splitlines()
    assert lines[4] == "| B | temperature=0.1 | 1 | raw" + 7 * " | 20.0" + " |"
    assert lines[5] == "| B | temperature=0.2 | 1 | calibrated" + 7 * " | 50.0" + " |"
    assert differences_markdown(comparison, "A").splitlines()[2:] == [
        "| B | raw | -10.00 | – | – |",
        "| B | calibrated | +20.00 | – | – |",
    ]


def test_the_candidates_and_the_chosen_ones():
    tuning = runs("A", (0.3,), (0.3,)) + runs("A", (0.2,), (0.4,), temperature=0.2)
    lines = tuning_markdown(Comparison(tuple(tuning), (), ())).splitlines()
    assert lines[2:] == [
        "| A | temperature=0.1 | **30.0** | 30.0 |",
        "| A | temperature=0.2 | 20.0 | **40.0** |",
    ]


def test_methods_without_calibrated_search_have_dashes():
    plain, tokens = runs("A", (0.3, 0.4), (0.5, 0.5)), runs("GPA", (0.5, 0.6), (None, None))
    comparison = Comparison(tuning=(*plain, *tokens), raw=(*plain, *tokens), calibrated=tuple(plain))
    lines = comparison_markdown(comparison).splitlines()
    assert lines[4].startswith("| GPA | temperature=0.1 | 2 | raw | 55.0 ± 7.1 |")
    assert lines[5] == "| GPA | – | – | calibrated" + 7 * " | –" + " |"
    for reference, other, difference in (("A", "GPA", "+20.00"), ("GPA", "A", "-20.00")):
        raw, calibrated = differences_markdown(comparison, reference).splitlines()[2:]
        assert raw.startswith(f"| {other} | raw | {difference} |")
        assert calibrated == f"| {other} | calibrated | – | – | – |"
    assert tuning_markdown(comparison).splitlines()[-1] == "| GPA | temperature=0.1 | **60.0** | – |"

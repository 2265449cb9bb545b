"""Tables: mean and deviation over seeds, raw and calibrated, and paired differences."""

import pytest

from ask_lightning.metrics.table import RECALLS
from ask_lightning.reproduce import Metrics, Run, comparison_markdown, differences_markdown


def runs(method, raw, calibrated, seeds=None):
    return [
        Run(
            method,
            {"temperature": 0.1},
            seed,
            "test",
            Metrics({}, dict.fromkeys(RECALLS, one), {}, dict.fromkeys(RECALLS, other)),
        )
        for seed, one, other in zip(seeds or range(len(raw)), raw, calibrated, strict=True)
    ]


def test_the_table_has_mean_and_deviation_over_seeds():
    lines = comparison_markdown(
        [*runs("A", (0.1, 0.2, 0.3), (0.4, 0.4, 0.4)), *runs("B", (0.5,), (0.25,))]
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
    compared = [
        *runs("base", (0.30, 0.40, 0.50), (0.30, 0.40, 0.50)),
        *runs("better", (0.53, 0.41, 0.32), (0.50, 0.40, 0.30), seeds=[2, 1, 0]),
    ]
    assert differences_markdown(compared, "base").splitlines() == [
        "| method | search | minus base | 95 % interval | p |",
        "|---|---|---|---|---|",
        "| better | raw | +2.00 | -0.48 … +4.48 | 0.074 |",
        "| better | calibrated | +0.00 | +0.00 … +0.00 | 1.000 |",
    ]


def test_one_seed_has_no_interval():
    table = differences_markdown([*runs("base", (0.3,), (0.3,)), *runs("other", (0.2,), (0.4,))], "base")
    assert "| other | raw | -10.00 | – | – |" in table


def test_what_cannot_be_paired():
    one, other = runs("base", (0.3,), (0.3,)), runs("other", (0.2,), (0.4,), seeds=[7])
    with pytest.raises(ValueError, match=r"`reference` has to be one of \['base'\], but got 'basis'"):
        differences_markdown(one, "basis")
    with pytest.raises(ValueError, match="same seeds for each method, but got"):
        differences_markdown([*one, *other], "base")

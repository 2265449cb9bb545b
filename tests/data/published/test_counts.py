"""The published counts of clips and captions are recognised."""

import pytest

from ask_lightning.data import (
    PUBLISHED,
    SplitReport,
)
from ask_lightning.data.published.counts import log_report


@pytest.mark.parametrize(
    ("split", "clips", "captions", "publication"),
    [
        ("train", 49_838, 49_838, "version 1"),
        ("train", 49_274, 49_274, "ML-ACT"),
        ("train", 60_000, 91_256, "version 2"),
        ("val", 495, 2_475, "version 1 and 2"),
        ("val", 494, 2_470, "ML-ACT"),
        ("test", 975, 4_875, "version 1 and 2"),
        ("test", 957, 4_785, "ML-ACT"),
        ("test", 957, 4_784, None),
    ],
)
def test_published_counts_are_recognised(split, clips, captions, publication, recwarn):
    report = SplitReport("AudioCaps", split, clips, captions, clips, captions)
    assert report.publication == publication
    log_report(report)
    assert len(recwarn.list) == (publication is None)
    assert ("published are" in str(recwarn.list[0].message)) if recwarn.list else True


def test_published_counts_agree_with_each_other():
    for (dataset, split), publications in PUBLISHED.items():
        for clips, captions in publications.values():
            several = 1 if dataset == "WavCaps" or (dataset, split) == ("AudioCaps", "train") else 5
            assert clips is None or captions == several * clips
    assert sum(PUBLISHED["WavCaps", name]["WavCaps"][1] for _, name in PUBLISHED if _ == "WavCaps") == 403_050

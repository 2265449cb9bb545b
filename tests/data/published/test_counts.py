"""The published counts of clips and captions are recognised."""

import pytest

from ask_lightning.data import (
    PUBLISHED_COUNTS,
    SplitReport,
)
from ask_lightning.data.published.counts import log_report


@pytest.mark.parametrize(
    ("split", "clips", "captions", "publication"),
    [
        ("train", 49_838, 49_838, "version 1"),
        ("train", 49_274, 49_274, "ML-ACT"),
        ("train", 91_254, 91_254, "version 2"),
        ("train", 60_000, 91_256, "version 2 by its README"),
        ("train", 45_180, 45_180, "OpenSound"),
        ("val", 447, 2_220, "OpenSound"),
        ("test", 883, 4_411, "OpenSound"),
        ("test", 882, 4_411, None),
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
    for (dataset, split), publications in PUBLISHED_COUNTS.items():
        for name, (clips, captions) in publications.items():
            several = 1 if dataset == "WavCaps" or (dataset, split) == ("AudioCaps", "train") else 5
            if name != "OpenSound":  # whose clips have lost some captions
                assert clips is None or captions == several * clips
    collections = [counts for (dataset, _), counts in PUBLISHED_COUNTS.items() if dataset == "WavCaps"]
    assert sum(counts["WavCaps"][1] for counts in collections) == 403_050


def test_rounded_counts_are_named_as_such():
    with pytest.warns(UserWarning, match="OpenSound about 45,200 captions") as warned:
        log_report(SplitReport("AudioCaps", "train", 10, 10, 10, 10))
    assert "version 2 91,254 clips with 91,254 captions" in str(warned[0].message)

"""The data modules on a command line: nested flags, and what a wrong one is told."""

import lightning as L
import pytest

from ask_lightning.data import ClothoData, EnrichedCaptions, KnowledgeSource

jsonargparse = pytest.importorskip("jsonargparse")


def parse(*flags):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    return parser.parse_args(["--data=ask_lightning.data.ClothoData", "--data.root=x", *flags]).data.init_args


def test_sections_are_filled_by_their_flags():
    options = parse(
        "--data.knowledge.wavcaps=/data/WavCaps",
        "--data.knowledge.collections=[FreeSound]",
        "--data.enriched.path=more.csv",
        "--data.annotations.train=train.csv",
    )
    data = ClothoData(
        **{
            **options.as_dict(),
            "knowledge": KnowledgeSource(**options.knowledge.as_dict()),
            "enriched": EnrichedCaptions(**options.enriched.as_dict()),
        }
    )
    assert options.seconds == 30, "the default of Clotho"
    assert data._knowledge == KnowledgeSource("/data/WavCaps", collections=["FreeSound"])
    assert data._enriched == EnrichedCaptions("more.csv", used_in="knowledge")
    assert options.annotations == {"train": "train.csv"}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data.knowledge.colections=[FreeSound]", r"unrecognized arguments: --knowledge.colections"),
        ("--data.enriched.mode=replaces", r"\"enriched.mode\".*\s.*'replace', 'add'"),
        ("--data.train_crop=left", r"\"train_crop\".*\s.*'random', 'center', 'full'"),
    ],
)
def test_mistakes_are_named(flag, message):
    with pytest.raises(jsonargparse.ArgumentError, match=message):
        parse(flag)

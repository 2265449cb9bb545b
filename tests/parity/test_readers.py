"""The readers on the annotation files of the public repositories, where a folder of them is named.

`ASK_LIGHTNING_CAPTIONS` names the folder; README.md says what is in it.
"""

import os
from pathlib import Path

import pytest

from ask_lightning.data import SplitReport, read_audiocaps, read_clotho, read_wavcaps
from ask_lightning.data.caption_style import style_clips
from ask_lightning.data.clips import count_captions

FOLDER = Path(os.environ.get("ASK_LIGHTNING_CAPTIONS", "none"))

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="ASK_LIGHTNING_CAPTIONS names no folder")


def file(name: str) -> Path:
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"There is no {name} in the folder that ASK_LIGHTNING_CAPTIONS names.")
    return path


def captions_of(clips, style="raw"):
    return {clip.key: sorted(clip.captions) for clip in style_clips(clips, style)}


@pytest.mark.parametrize("style", ["raw", "plain"])
def test_clotho_of_ml_act_is_the_official_one(style):
    packed = read_clotho(file("ml_act/Clotho_val.csv"))
    official = read_clotho(file("clotho/clotho_captions_validation.csv"))
    assert captions_of(packed, style) == captions_of(official, style)


@pytest.mark.parametrize("style", ["raw", "plain"])
@pytest.mark.parametrize("name", ["ml_act/AudioCaps_val.csv", "wavcaps_repository/AudioCaps_val.json"])
def test_audiocaps_of_others_is_the_official_one_less_a_clip(name, style):
    path = file(name)
    packed = read_wavcaps(path, "AudioCaps") if path.suffix == ".json" else read_audiocaps(path)
    official = captions_of(read_audiocaps(file("audiocaps/val.csv")), style)
    found = captions_of(packed, style)
    assert found.items() <= official.items()
    assert len(official) - len(found) == 1
    report = SplitReport("AudioCaps", "val", len(packed), count_captions(packed), 0, 0)
    assert report.publication == "ML-ACT"


def test_the_test_split_of_ml_clap():
    clips = read_wavcaps(file("ml_clap/AudioCaps_test.json"), "AudioCaps")
    report = SplitReport("AudioCaps", "test", len(clips), count_captions(clips), 0, 0)
    assert report.publication == "ML-ACT", "ML-CLAP evaluates on the clips that ML-ACT has"


def test_most_captions_of_clotho_change_before_a_tokenizer_sees_them():
    clips = read_clotho(file("clotho/clotho_captions_validation.csv"))
    raw = [caption for clip in clips for caption in clip.captions]
    plain = [caption for clip in style_clips(clips, "plain") for caption in clip.captions]
    pairs = list(zip(raw, plain, strict=True))
    assert sum(before != after for before, after in pairs) / len(pairs) == pytest.approx(0.98, abs=0.005)
    changed = sum(before.lower() != after for before, after in pairs)
    assert changed / len(pairs) == pytest.approx(0.89, abs=0.005), "to a tokenizer without capitals"

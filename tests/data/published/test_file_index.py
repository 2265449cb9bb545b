"""Finding the files of clips, whatever tool named them."""

import pytest

from ask_lightning.data import Clip
from ask_lightning.data.published.file_index import (
    FolderIndex,
    audiocaps_names,
    clotho_names,
    match_files,
    wavcaps_names,
)

DUCKS = Clip("youtube:vfY_TJq7n_U", ("ducks",), "vfY_TJq7n_U", aliases=("audiocap:97151",), start=130)
APPLAUSE = Clip("youtube:Y--aE2O5G5W", ("applause",), "Y--aE2O5G5W", aliases=("audiocap:108945",), start=0)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return FolderIndex(folder)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("vfY_TJq7n_U.wav", "{youtube_id}"),
        ("YvfY_TJq7n_U.mp3", "Y{youtube_id}"),
        ("vfY_TJq7n_U_130.flac", "{youtube_id}_{start}"),
        ("YvfY_TJq7n_U_130.ogg", "Y{youtube_id}_{start}"),
        ("vfY_TJq7n_U_130_140.wav", "{youtube_id}_{start}_{end}"),
        ("vfY_TJq7n_U_130000_140000.flac", "{youtube_id}_{start_ms}_{end_ms}"),
        ("YvfY_TJq7n_U_130.000_140.000.wav", "Y{youtube_id}_{start:.3f}_{end:.3f}"),
        ("vfY_TJq7n_U_130.0_140.0.wav", "{youtube_id}_{start:.1f}_{end:.1f}"),
        ("vfY_TJq7n_U_000130.wav", "{youtube_id}_{start:06d}"),
        ("YvfY_TJq7n_U_000130_000140.WAV", "Y{youtube_id}_{start:06d}_{end:06d}"),
        ("97151.wav", "{audiocap_id}"),
    ],
)
@pytest.mark.parametrize("folder", ["", "unbalanced_train_segments/part 01/"])
def test_every_usual_name_of_audiocaps_is_found_and_told(tmp_path, name, pattern, folder):
    index = touch(tmp_path, folder + name, "tdWhHV3X25Q.wav", "notes.txt", "vfY_TJq7n_U.json")
    matches = match_files([DUCKS, APPLAUSE], index, audiocaps_names, prefer=lambda _: ["val"])
    assert matches.files == {DUCKS.key: folder + name}
    assert dict(matches.variants) == {pattern: 1}
    assert matches.missing == ["Y--aE2O5G5W"]
    assert matches.ambiguous == []
    assert index.count == 2


def test_another_stretch_of_the_video_is_not_the_clip(tmp_path):
    assert not match_files([DUCKS], touch(tmp_path, "vfY_TJq7n_U_30_40.wav"), audiocaps_names).files


def test_of_several_files_that_of_the_split_and_then_the_usual_name_is_taken_and_said(tmp_path):
    index = touch(
        tmp_path, "train/vfY_TJq7n_U.wav", "val/YvfY_TJq7n_U.wav", "a/Y--aE2O5G5W.wav", "a/YY--aE2O5G5W.wav"
    )
    matches = match_files([DUCKS, APPLAUSE], index, audiocaps_names, prefer=lambda _: ["val"])
    assert matches.files[DUCKS.key] == "val/YvfY_TJq7n_U.wav"
    assert matches.ambiguous[0] == "val/YvfY_TJq7n_U.wav, not train/vfY_TJq7n_U.wav"
    assert matches.problems()[0].startswith(
        "2 clips have more than one file (val/YvfY_TJq7n_U.wav, not train/"
    )


def test_the_usual_name_is_that_of_most_files(tmp_path):
    names = ["Yabcdefghij1.wav", "Yabcdefghij2.wav", "YvfY_TJq7n_U.wav", "vfY_TJq7n_U_130.wav"]
    clips = [Clip(f"youtube:abcdefghij{i}", ("a",), f"abcdefghij{i}", start=0) for i in (1, 2)]
    matches = match_files([*clips, DUCKS], touch(tmp_path, *names), audiocaps_names)
    assert matches.files[DUCKS.key] == "YvfY_TJq7n_U.wav"


def test_a_file_that_stands_for_two_clips_is_reported(tmp_path):
    later = Clip("youtube:vfY_TJq7n_U@30", ("rain",), "vfY_TJq7n_U", start=30)
    matches = match_files([DUCKS, later], touch(tmp_path, "vfY_TJq7n_U.wav"), audiocaps_names)
    assert matches.problems() == ["1 files stand for more than one clip (vfY_TJq7n_U.wav)"]


def test_clotho_is_found_by_name_by_sound_and_by_likeness(tmp_path):
    clips = [
        Clip("file:a", ("a",), "FR.CTC.08.CoyuyoS.001.wav"),
        Clip("freesound:7", ("b",), "Rain 1.wav"),
        Clip("file:c", ("c",), "Grillons-d&#39;Italie.wav"),
        Clip("file:d", ("d",), "Train.wav"),
    ]
    index = touch(
        tmp_path, "FR.CTC.08.CoyuyoS.001.flac", "7.wav", "grillons-d'italie.wav", "TRAIN.wav", "train_.wav"
    )
    matches = match_files(clips, index, clotho_names)
    assert dict(matches.variants) == {
        "{file_name}": 1,
        "{sound_id}": 1,
        "{file_name} with other punctuation": 1,
    }
    assert matches.missing == ["Train.wav"], "a likeness of two is none"


def test_folders_of_others_are_rejected_unless_they_are_also_its_own(tmp_path):
    clip = Clip("file:rain", ("rain",), "rain.wav")
    options = {"prefer": lambda _: ["validation"], "reject": lambda _: ["development", "dev"]}
    assert not match_files(
        [clip], touch(tmp_path / "a", "development/rain.wav"), clotho_names, **options
    ).files
    index = touch(tmp_path / "b", "dev/validation/rain.wav")
    assert match_files([clip], index, clotho_names, **options).files


def test_wavcaps_is_found_by_id_or_by_the_path_in_its_json(tmp_path):
    clips = [
        Clip("youtube:b0RFKhbpFJA", ("wind",), "Yb0RFKhbpFJA.wav"),
        Clip("youtube:vfY_TJq7n_U", ("ducks",), "YvfY_TJq7n_U.wav"),
        Clip("soundbible:7", ("rain",), "7", path="elsewhere/rain.aiff"),
    ]
    index = touch(tmp_path, "AudioSet_SL/Yb0RFKhbpFJA.flac", "vfY_TJq7n_U.wav", "elsewhere/rain.aiff")
    matches = match_files(clips, index, wavcaps_names)
    assert dict(matches.variants) == {"{id}": 1, "{id} without Y": 1, "{audio}": 1}


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of audio files at .*none"):
        FolderIndex(tmp_path / "none")


@pytest.mark.parametrize("links", [{"x/up": "..", "y/up": "../"}, {"x/other": "../y", "y/other": "../x"}])
def test_links_that_lead_back_are_not_followed_again(tmp_path, links):
    touch(tmp_path, "x/a.wav", "y/b.wav")
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "elsewhere").symlink_to("x")
    assert len(FolderIndex(tmp_path).find("a")) <= 4

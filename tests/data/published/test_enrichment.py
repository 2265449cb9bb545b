"""Captions by id, in every form in which people have them."""

import pytest

from ask_lightning.data import Clip, EnrichedCaptions

CLIPS = [
    Clip("youtube:vfY_TJq7n_U", ("ducks",), "vfY_TJq7n_U", aliases=("audiocap:97151",)),
    Clip("freesound:180913", ("a ringtone", "a phone"), "Rain 1.wav", aliases=("file:rain 1",)),
    Clip("soundbible:2219", ("a plane",), "2219"),
]


ENRICHED = [
    ("a.csv", "youtube_id,caption\nvfY_TJq7n_U,new\n"),
    ("a.csv", "audiocap_id,caption\n97151,new\n"),
    ("a.csv", "file_name,caption\nYvfY_TJq7n_U.wav,new\n"),
    ("a.json", {"vfY_TJq7n_U": "new"}),
    ("a.json", {"YvfY_TJq7n_U.wav": ["new"]}),
    ("a.json", [{"id": "vfY_TJq7n_U", "caption": "new"}]),
    ("a.json", {"num_captions_per_audio": 1, "data": [{"audiocap_id": 97151, "caption": "new"}]}),
]


@pytest.mark.parametrize(("name", "content"), ENRICHED)
def test_captions_replace_or_are_added(write, name, content):
    path = write(name, content)
    with pytest.warns(
        UserWarning, match="captions for 1 of 3 clips of train; 2 keep their own alone, and 0 ids"
    ):
        replaced = EnrichedCaptions(path).apply(CLIPS, "train")
    with pytest.warns(UserWarning, match="captions for 1 of 3 clips"):
        added = EnrichedCaptions(path, mode="add").apply(CLIPS, "train")
    assert [clip.captions for clip in replaced] == [("new",), *(clip.captions for clip in CLIPS[1:])]
    assert added[0].captions == ("ducks", "new")
    assert [clip.keys for clip in added] == [clip.keys for clip in CLIPS]


def test_what_says_that_there_is_no_caption_replaces_none(write):
    path = write("a.csv", "id,caption_1,caption_2\nvfY_TJq7n_U,new,nan\nRain 1.wav,None,\n")
    with pytest.warns(UserWarning, match="captions for 1 of 3 clips of train; 2 keep their own alone"):
        clips = EnrichedCaptions(path).apply(CLIPS, "train")
    assert [clip.captions for clip in clips] == [("new",), *(clip.captions for clip in CLIPS[1:])]


def test_several_captions_of_a_clip(write):
    table = "file_name,caption_1,caption_2\nRain 1.wav,one,two\nRain 1.wav,three, \n"
    with pytest.warns(UserWarning, match="captions for 1 of 3 clips"):
        clips = EnrichedCaptions(write("a.csv", table), mode="replace").apply(CLIPS, "train")
    assert clips[1].captions == ("one", "two", "three")


def test_ids_of_no_clip_are_named(write):
    content = {"vfY_TJq7n_U": "new", **{f"b0RFKhbpF{index:02d}": "x" for index in range(5)}}
    with pytest.warns(
        UserWarning, match=r"5 ids belong to no clip \(b0RFKhbpF00, b0RFKhbpF01, b0RFKhbpF02 and 2 m"
    ):
        EnrichedCaptions(write("a.json", content), mode="add").apply(CLIPS, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            {"b0RFKhbpFJA": "x"},
            r"none of its 1 ids belongs to a clip of train .*like 'vfY_TJq7n_U' or 'yout",
        ),
        ("a.json", [{"title": "x"}], r"entry 0: it has to be an object with an 'id' and a 'caption'"),
        ("a.json", "text", r"not JSON"),
        (
            "a.json",
            {"vfY_TJq7n_U": {"caption": "ducks"}},
            r"a\.json, id 'vfY_TJq7n_U': a caption or a list .* is \{'caption': 'ducks'\}\. Keep the texts",
        ),
        (
            "a.json",
            [{"id": "vfY_TJq7n_U", "caption": [["ducks"]]}],
            r"entry 0: a caption or a list of captions",
        ),
        ("a.json", {"vfY_TJq7n_U": 5}, r"id 'vfY_TJq7n_U': a caption or a list of captions"),
        (
            "a.csv",
            "title,caption\na,b\n",
            r"no column 'id'; it has \['title', 'caption'\]. It needs one of clip_id",
        ),
        ("a.csv", "id,words\na,b\n", r"no column 'caption'"),
        ("a.csv", "id;caption\na;b\n", r"look separated by ';'"),
    ],
)
def test_captions_that_cannot_be_used(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        EnrichedCaptions(write(name, content), mode="replace").apply(CLIPS, "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "`mode` has to be one of .*'replace', 'add'.* but got 'both'"),
        ({"used_in": "test"}, "`used_in` has to be one of .*'knowledge', 'train', 'both'.* but got 'test'"),
    ],
)
def test_arguments_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        EnrichedCaptions("a.json", **options)


def test_a_caption_that_is_null_is_none(write):
    path = write("a.json", {"vfY_TJq7n_U": None, CLIPS[1].name: [None, "rain"]})
    with pytest.warns(UserWarning, match=rf"captions for 1 of {len(CLIPS)} clips"):
        clips = EnrichedCaptions(path).apply(CLIPS, "train")
    assert clips[0] == CLIPS[0]
    assert clips[1].captions == ("rain",)


def test_an_id_of_several_clips_gives_its_captions_to_none_of_them(write):
    video = "youtube:vfY_TJq7n_U"
    clips = [
        Clip(f"{video}@30", ("ducks",), "vfY_TJq7n_U", aliases=(video, "audiocap:1")),
        Clip(f"{video}@130", ("rain",), "vfY_TJq7n_U", aliases=(video, "audiocap:2")),
    ]
    with pytest.raises(
        ValueError, match=r"the id 'vfY_TJq7n_U' stands for 2 clips of train \(youtube:vfY_TJq7n_U@30, .*`aud"
    ):
        EnrichedCaptions(write("a.csv", "youtube_id,caption\nvfY_TJq7n_U,new\n")).apply(clips, "train")
    for table in ("audiocap_id,caption\n1,one\n2,two\n", f"id,caption\n{video}@30,one\n{video}@130,two\n"):
        enriched = EnrichedCaptions(write("a.csv", table)).apply(clips, "train")
        assert [clip.captions for clip in enriched] == [("one",), ("two",)]


def test_titles_that_differ_in_signs_alone_are_told_apart_by_the_exact_name(write):
    clips = [
        Clip("freesound:1", ("a",), "Rain 1.wav", aliases=("file:rain 1",)),
        Clip("freesound:2", ("b",), "rain_1.wav", aliases=("file:rain 1",)),
    ]
    table = "file_name,caption\nRain 1.wav,one\nrain_1.wav,two\n"
    enriched = EnrichedCaptions(write("a.csv", table)).apply(clips, "train")
    assert [clip.captions for clip in enriched] == [("one",), ("two",)]

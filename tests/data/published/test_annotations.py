"""The published annotation files, as they are and as they come when something went wrong."""

import warnings

import pytest

from ask_lightning.data import leaked_ids, read_audiocaps, read_clotho, read_wavcaps
from tests.helpers.annotations import AUDIOCAPS, CLOTHO, wavcaps_json


def test_audiocaps_rows_of_one_video_are_one_clip_in_any_order(write):
    table = (
        AUDIOCAPS + '1,vfY_TJq7n_U,130,"Ducks, then rain"\n2,tdWhHV3X25Q,60,A man\n3,vfY_TJq7n_U,130,Ducks\n'
    )
    clips = read_audiocaps(write("val.csv", table))
    assert [clip.captions for clip in clips] == [("Ducks, then rain", "Ducks"), ("A man",)]
    assert clips[0].key == "youtube:vfY_TJq7n_U"
    assert clips[0].keys == {"youtube:vfY_TJq7n_U", "audiocap:1", "audiocap:3"}
    assert (clips[0].name, clips[0].start) == ("vfY_TJq7n_U", 130)


def test_two_stretches_of_one_video_are_two_clips_that_are_both_found_by_the_video(write):
    clips = read_audiocaps(write("a.csv", AUDIOCAPS + "1,vfY_TJq7n_U,130,Ducks\n2,vfY_TJq7n_U,30,Rain\n"))
    assert [clip.key for clip in clips] == ["youtube:vfY_TJq7n_U@130", "youtube:vfY_TJq7n_U@30"]
    assert all("youtube:vfY_TJq7n_U" in clip.keys for clip in clips)


def test_captions_that_annotators_share_are_all_kept(write):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clips = read_audiocaps(write("a.csv", AUDIOCAPS + "1,vfY_TJq7n_U,0,Ducks\n2,vfY_TJq7n_U,0,Ducks\n"))
    assert clips[0].captions == ("Ducks", "Ducks")


def test_the_tables_of_ml_act(write):
    train = read_audiocaps(write("train.csv", "file_name,caption\nYr1nicOVtvkQ.wav,A woman talks\n"))
    val = read_audiocaps(write("val.csv", CLOTHO + "Yr1nicOVtvkQ.wav,A woman talks,She talks\n"))
    assert train[0].key == val[0].key == "youtube:r1nicOVtvkQ"
    assert val[0].captions == ("A woman talks", "She talks")


def test_clotho_is_known_by_title_or_with_metadata_by_sound(write):
    captions = write("captions.csv", CLOTHO + "Rain 1.wav,rain,it rains\nCrickets.wav,crickets,chirping\n")
    metadata = write(
        "metadata.csv",
        b"file_name,keywords,sound_id\nRain 1.wav,caf\xe9,1234\nCrickets.wav,night,Not found\n",
    )
    assert [clip.key for clip in read_clotho(captions)] == ["file:rain 1", "file:crickets"]
    rain, crickets = read_clotho(captions, metadata)
    assert (rain.key, rain.aliases) == ("freesound:1234", ("file:rain 1",))
    assert (crickets.key, crickets.aliases) == ("file:crickets", ())


def test_two_files_of_one_sound_and_two_spellings_of_one_title_are_two_clips(write):
    captions = write("captions.csv", CLOTHO + "Rain 1.wav,a,b\nrain_1.wav,c,d\nTrain.wav,e,f\n")
    metadata = write("metadata.csv", "file_name,sound_id\nTrain.wav,7\nRain 1.wav,8\nrain_1.wav,8\n")
    for clips in (read_clotho(captions), read_clotho(captions, metadata)):
        assert len({clip.key for clip in clips}) == 3
        assert clips[0].keys & clips[1].keys


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"id": "Yb0RFKhbpFJA.wav"}, "youtube:b0RFKhbpFJA"),
        (
            {"id": "180913", "download_link": "https://freesound.org/people/a/sounds/180913/"},
            "freesound:180913",
        ),
        ({"id": 180913, "download_link": "https://freesound.org/people/a/"}, "freesound:180913"),
        (
            {"id": "NHU05051026", "download_link": "https://sound-effects-media.bbcrewind.co.uk/a.zip"},
            "bbc:NHU05051026",
        ),
        (
            {"id": "2219", "download_link": "http://soundbible.com/grab.php?id=2219&type=wav"},
            "soundbible:2219",
        ),
        ({"wav": "Clotho/waveforms/val/Rain 1.wav", "audio": "/data/Rain 1.wav"}, "file:rain 1"),
    ],
)
def test_wavcaps_entries_say_where_they_are_from(write, entry, key):
    assert read_wavcaps(write("some.json", wavcaps_json({"caption": "rain", **entry})))[0].key == key


def test_wavcaps_files_say_where_they_are_from(write):
    entry = {"id": "2219", "caption": "rain", "audio": "wav_path"}
    assert read_wavcaps(write("fsd_final.json", wavcaps_json(entry)))[0].key == "freesound:2219"
    assert read_wavcaps(write("x.json", wavcaps_json(entry)), "SoundBible")[0].key == "soundbible:2219"
    assert read_wavcaps(write("sb_final.json", wavcaps_json(entry)))[0].path == ""
    with pytest.raises(ValueError, match=r"`collection` has to be one of .*'FreeSound'.* but got 'Spotify'"):
        read_wavcaps(write("x.json", wavcaps_json(entry)), "Spotify")


def test_several_captions_in_json(write):
    entry = {"id": "Yb0RFKhbpFJA.wav", "caption_1": "wind", "caption_2": "it blows", "duration": 10}
    assert read_wavcaps(write("val.json", wavcaps_json(entry, captions=5)))[0].captions == (
        "wind",
        "it blows",
    )
    entry = {"id": "Yb0RFKhbpFJA.wav", "caption": ["wind", "it blows"]}
    assert read_wavcaps(write("val.json", wavcaps_json(entry)))[0].captions == ("wind", "it blows")


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [
        (
            read_audiocaps,
            "audiocap_id,youtube_id,caption\n1,a,b\n",
            r"no column 'start_time'; it has .*AudioCaps has",
        ),
        (
            read_audiocaps,
            "audiocap_id;youtube_id;start_time;caption\n",
            r"look separated by ';': save it with ','",
        ),
        (read_clotho, "file_name\tcaption_1\n", r"look separated by '\\t': save it with ','"),
        (read_clotho, "name,caption_1\na,b\n", r"no column 'file_name'.*The published file has file_name"),
        (read_clotho, "file_name,words\na,b\n", r"no column 'caption_1'"),
        (read_clotho, CLOTHO + "a.wav,rain\n", r"line 2: 2 fields, but the header has 3"),
        (read_clotho, CLOTHO + ",rain,wind\n", r"line 2: column 'file_name' is empty"),
        (
            read_audiocaps,
            (AUDIOCAPS + "1,vfY_TJq7n_U,0,café\n").encode("latin-1"),
            r"line 2: byte 0xe9 is not valid",
        ),
        (
            read_audiocaps,
            AUDIOCAPS + "1,vfY_TJq7n_U,soon,rain\n",
            r"line 2: start_time has to be .* but is 'soon'",
        ),
        (
            read_audiocaps,
            f"{AUDIOCAPS}1,a,inf,b\n",
            r"line 2: start_time has to be .* but is 'inf'",
        ),
        (
            read_audiocaps,
            f"{AUDIOCAPS}1,,30,b\n",
            r"line 2: column 'youtube_id' is empty\. Fill it or remove the row",
        ),
        (read_audiocaps, AUDIOCAPS, r"has no clip with a caption. Is it the right file"),
        (read_audiocaps, AUDIOCAPS + '1,vfY_TJq7n_U,0,"ducks\n', r"double quote that is not closed"),
        (read_audiocaps, "", r"is empty"),
        (read_wavcaps, '{"data": [{"id": "1"', r"line 1: not JSON .*Was the download cut short"),
        (read_wavcaps, "[]", r"no list 'data' of objects"),
        (read_wavcaps, '{"data": ["a"]}', r"no list 'data' of objects"),
        (read_wavcaps, wavcaps_json({"caption": "rain"}), r"entry 0: no 'id'; it has \['caption'\]"),
        (
            read_wavcaps,
            wavcaps_json({"id": "1", "title": "a"}),
            r"entry 0: no 'caption'; it has \['id', 'title'\]",
        ),
        (
            read_wavcaps,
            '{"data": [{"id": "1", "caption": {"text": "rain"}}]}',
            r"entry 0: no 'caption'; it has \['caption', 'id'\]",
        ),
        (read_wavcaps, '{"data": []}', r"has no clip with a caption"),
    ],
)
def test_files_that_are_not_as_published(write, reader, content, message):
    with pytest.raises(ValueError, match=message):
        reader(write("table.json" if reader is read_wavcaps else "table.csv", content))


def test_no_file(tmp_path):
    for reader in (read_audiocaps, read_clotho, read_wavcaps):
        with pytest.raises(FileNotFoundError, match=r"There is no file at .*none"):
            reader(tmp_path / "none.csv")


def test_metadata_of_something_else(write):
    captions = write("captions.csv", CLOTHO + "Rain 1.wav,rain,it rains\n")
    with pytest.raises(ValueError, match=r"no columns 'file_name' and 'sound_id'; it has \['a', 'b'\]"):
        read_clotho(captions, write("metadata.csv", "a,b\n1,2\n"))


def test_one_recording_has_one_key_in_all_datasets(write):
    audiocaps = read_audiocaps(write("a.csv", AUDIOCAPS + "1,b0RFKhbpFJA,30,Wind\n"))
    ml_act = read_audiocaps(write("b.csv", "file_name,caption\nYb0RFKhbpFJA.wav,Wind\n"))
    wav = read_wavcaps(write("as_final.json", wavcaps_json({"id": "Yb0RFKhbpFJA.wav", "caption": "Wind"})))
    assert audiocaps[0].key == ml_act[0].key == wav[0].key


def test_clotho_in_the_form_of_wavcaps(write):
    """Ids are FreeSound's where they are numbers; audio is named by title."""
    folder = "Clotho/waveforms/val/"
    entries = [
        {"id": "103989", "wav": f"{folder}Rain 1.wav", "audio": "/mnt/other.wav", "caption_1": "rain"},
        {"id": "Not found", "wav": f"{folder}Wind.wav", "caption_1": "wind"},
        {"id": "Not found", "audio": "/mnt/sea.wav", "wav": "", "caption_1": "sea"},
        {"id": "9e107d9d372bb6826bd81d3542a419d6", "wav": f"{folder}Sun.wav", "caption_1": "sun"},
        {"id": "8", "wav": f"{folder}Train.wav", "caption_1": "train"},
        {"id": "8", "wav": f"{folder}Train again.wav", "caption_1": "train"},
    ]
    path = write("Clotho_val.json", wavcaps_json(*entries))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clips = read_clotho(path)
    assert [clip.key for clip in clips] == [
        "freesound:103989",
        "file:wind",
        "file:sea",
        "file:sun",
        "file:train",
        "file:train again",
    ]
    assert [clip.name for clip in clips][:3] == ["Rain 1.wav", "Wind.wav", "sea.wav"]
    assert clips[0].aliases == ("file:rain 1",)
    assert clips[4].aliases == clips[5].aliases == ("freesound:8",)
    assert read_wavcaps(path) == read_wavcaps(path, "Clotho") == clips
    found = read_clotho(path, write("metadata.csv", "file_name,sound_id\nWind.wav,7\nRain 1.wav,1\n"))
    assert [clip.key for clip in found][:3] == ["freesound:103989", "freesound:7", "file:sea"]
    leaked = leaked_ids(
        read_wavcaps(write("fsd_final.json", wavcaps_json({"id": "103989", "caption": "x"}))), clips
    )
    assert leaked == ["freesound:103989"]


def test_clotho_without_files_names_nothing(write):
    path = write("Clotho_val.json", wavcaps_json({"id": "7", "caption": "rain", "audio": "wav_path"}))
    with pytest.raises(ValueError, match=r"entry 0: no 'wav' or 'audio' that names a file; it has"):
        read_clotho(path)


def test_null_in_json_is_nothing(write):
    """Not a text `None`, of which all clips with it would be one recording."""
    entries = [
        {"id": None, "file_name": None, "wav": None, "audio": f"{name}.wav", "caption": name}
        for name in ("rain", "wind")
    ]
    path = write("some.json", wavcaps_json(*entries))
    for clips in (read_wavcaps(path), read_clotho(path)):
        assert [(clip.key, clip.captions, clip.path) for clip in clips] == [
            ("file:rain", ("rain",), "rain.wav"),
            ("file:wind", ("wind",), "wind.wav"),
        ]
        assert not any(clip.aliases for clip in clips)


def test_audiocaps_with_checksums_for_ids(write):
    entry = {
        "id": "9e107d9d372bb6826bd81d3542a419d6",
        "audio": "/path/audiocaps/16k/Y7fmOlUlwoNg.wav",
        "caption_1": "a machine",
    }
    (clip,) = read_wavcaps(write("val.json", wavcaps_json(entry)), "AudioCaps")
    assert (clip.key, clip.name) == ("youtube:7fmOlUlwoNg", "Y7fmOlUlwoNg.wav")


def test_carriage_returns_in_captions_of_audiocaps_2(tmp_path):
    """Three training captions of `dataset2.0` hold one, outside of quotes."""
    table = tmp_path / "train.csv"
    table.write_bytes(
        AUDIOCAPS.encode() + b"1,aaaaaaaaaaa,0,a man speaks and\ra dog whimpers\r\n2,bbbbbbbbbbb,30,bang\r\n"
    )
    assert [clip.captions for clip in read_audiocaps(table)] == [
        ("a man speaks and a dog whimpers",),
        ("bang",),
    ]
    table.write_bytes(
        AUDIOCAPS.replace("\n", "\r").encode() + b"1,aaaaaaaaaaa,0,rain\r2,bbbbbbbbbbb,30,bang\r"
    )
    assert [clip.captions for clip in read_audiocaps(table)] == [("rain",), ("bang",)], "rows end with them"

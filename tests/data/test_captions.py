"""Tables of captions: every mistake has an answer that says where it is and what to do."""

import re

import pytest

from ask_lightning.data import Clip, read_captions


def clip(filename, *captions, alias=None, group=""):
    alias = alias or f"file:{filename.removesuffix('.wav')}"
    return Clip(f"file:{filename}", captions, filename, (alias,), group=group, path=filename)


@pytest.fixture
def table(tmp_path):
    def write(text: str | bytes):
        path = tmp_path / "clips.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_one_caption_column(table):
    path = table('filename,caption\na.wav,rain\nb.wav,"wind, then rain"\n')
    assert read_captions(path) == [
        clip("a.wav", "rain"),
        clip("b.wav", "wind, then rain"),
    ]


def test_several_caption_columns_under_other_names(table):
    path = table("file_name;caption_1;caption_2\na.wav;rain;it rains\nb.wav;wind;it blows\n")
    names = {"filename_column": "file_name", "caption_columns": ["caption_1", "caption_2"]}
    clips = read_captions(path, **names, delimiter=";")
    assert [clip.captions for clip in clips] == [("rain", "it rains"), ("wind", "it blows")]


def test_repeated_rows_are_one_clip(table):
    clips = read_captions(table("filename,caption\na.wav,rain\nb.wav,wind\na.wav,it rains\n"))
    assert clips == [clip("a.wav", "rain", "it rains"), clip("b.wav", "wind")]


def test_files_of_one_name_in_two_folders_are_two_clips(table):
    clips = read_captions(table("filename,caption\nx/Rain.wav,rain\ny/rain.wav,wind\n"))
    assert [clip.key for clip in clips] == ["file:x/Rain.wav", "file:y/rain.wav"]
    assert clips[0].recording != clips[1].recording


def test_clip_ids_of_any_text_join_files(table):
    path = table("filename,caption,recording\na1.wav,rain,Y--x\nb.wav,wind,7\na2.wav,rain,Y--x\n")
    clips = read_captions(path, clip_id_column="recording")
    assert [clip.recording for clip in clips] == ["Y--x", "7", "Y--x"]
    assert len({clip.key for clip in clips}) == 3


def test_what_spreadsheets_do_is_understood(table):
    path = table(b"\xef\xbb\xbffilename, caption \r\n a.wav , rain \r\n\r\n")
    assert read_captions(path) == [clip("a.wav", "rain")]


def test_another_encoding(table):
    path = table("filename,caption\na.wav,café\n".encode("latin-1"))
    assert read_captions(path, encoding="latin-1")[0].captions == ("café",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"clips.csv is empty. It needs a header line"),
        ("\n\n", r"clips.csv is empty"),
        ("filename,caption\n", r"clips.csv has a header but no rows"),
        (
            "filename,title\na.wav,rain\n",
            r"no column 'caption' or of another usual .*\['filename', 'title'\].*`caption_columns`",
        ),
        ("title,caption\na.wav,rain\n", r"no column 'filename' or of another .*`filename_column`"),
        ("filename,caption,caption\na.wav,x,y\n", r"more than one column is called 'caption'"),
        (
            "filename,caption\na.wav,wind, then rain\n",
            r"line 2: 3 fields, but the header has 2.*double quotes",
        ),
        ("filename,caption\na.wav\n", r"line 2: 1 fields, but the header has 2"),
        ("filename,caption\na.wav,  \nb.wav,\n", r"clips.csv has no clip with a caption"),
        ("filename,caption\n,rain\n", r"line 2: column 'filename' is empty"),
        ('filename,caption\na.wav,"rain\n', r"line 2: unexpected end of data.*double quote"),
        (b"filename,caption\na.wav,rain\nb.wav,caf\xe9\n", r"line 3: byte 0xe9 is not valid utf-8.*cp1252"),
    ],
)
def test_mistakes_in_a_table(table, text, message):
    with pytest.raises(ValueError, match=message):
        read_captions(table(text))


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_another_delimiter_is_found_or_asked_for(table, delimiter):
    path = table(f"filename{delimiter}caption\na.wav{delimiter}rain, wind\n")
    assert read_captions(path)[0].captions == ("rain, wind",)
    message = f"look separated by {delimiter!r}: pass `delimiter={delimiter!r}`"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_captions(path, filename_column="filename", caption_columns="caption", delimiter=",")


def test_a_file_with_two_clip_ids_would_be_in_two_splits(table):
    path = table("filename,caption,clip\na.wav,rain,1\na.wav,it rains,2\n")
    with pytest.raises(ValueError, match=r"line 3: 'a.wav' has the clip id '2', but had '1' above"):
        read_captions(path, clip_id_column="clip")


def test_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file at .*none.csv"):
        read_captions(tmp_path / "none.csv")


def test_no_caption_column(table):
    with pytest.raises(ValueError, match="`caption_columns` has to name at least one column"):
        read_captions(table("filename\na.wav\n"), caption_columns=[])


def test_an_empty_caption_is_left_out_and_a_clip_without_any_too(table):
    path = table("filename,one,two\na.wav,rain,\nb.wav,,\nc.wav,sea,sun\n")
    with pytest.warns(UserWarning, match=r"3 captions are empty and left out: line 2, line 3, line 3"):
        clips = read_captions(path, caption_columns=["one", "two"])
    assert [clip.captions for clip in clips] == [("rain",), ("sea", "sun")]


def test_a_cell_that_says_that_there_is_nothing_is_no_caption(table):
    """pandas writes `nan` or `None` into the columns of files with fewer captions than others."""
    path = table("filename,one,two,three\na.wav,rain,nan,nan\nb.wav,None,,wind\nc.wav,NA,N/A,None of it\n")
    with pytest.warns(UserWarning, match="clips.csv") as caught:
        clips = read_captions(path, caption_columns=["one", "two", "three"])
    assert [clip.captions for clip in clips] == [("rain",), ("wind",), ("None of it",)]
    (said,) = [str(warning.message) for warning in caught]
    assert said == (
        f"{path}: 1 captions are empty and left out: line 3; 5 captions say that there is none, and are left "
        "out: line 2 ('nan'), line 2 ('nan'), line 3 ('None') and 2 more."
    )


def test_a_list_in_a_cell_is_named(table):
    """As pandas writes a column of lists."""
    path = table("filename,caption\na.wav,\"['rain', 'it rains']\"\nb.wav,[wind]\n")
    with pytest.warns(UserWarning, match="1 captions are written like a list of texts, .*: line 2"):
        assert read_captions(path)[0].captions == ("['rain', 'it rains']",)


def test_a_cell_that_says_that_there_is_nothing_is_no_clip_id(table):
    """All such files would be takes of one recording."""
    path = table("filename,caption,clip\na.wav,rain,1\nb.wav,wind,nan\n")
    with pytest.raises(ValueError, match=r"line 3: column 'clip' says 'nan'. Fill it or remove the row."):
        read_captions(path, clip_id_column="clip")


def test_a_repeated_row_counts_once(table):
    path = table("filename,caption\na.wav,rain\na.wav,wind\na.wav,rain\n")
    with pytest.warns(UserWarning, match=r"1 rows repeat an id, .*: line 4 \('a.wav'\)"):
        assert read_captions(path)[0].captions == ("rain", "wind")


def test_equal_captions_of_a_file_count_once(table):
    path = table("filename,one,two\na.wav,rain,rain\nb.wav,wind,sea\nb.wav,sun,wind\nc.wav,rain,\n")
    with pytest.warns(UserWarning, match="clips.csv") as caught:
        clips = read_captions(path, caption_columns=["one", "two"])
    assert [clip.captions for clip in clips] == [("rain",), ("wind", "sea", "sun"), ("rain",)]
    messages = [str(warning.message).removeprefix(f"{path}: ") for warning in caught]
    assert messages == [
        "2 captions are equal to another one of their file, and count once: line 2, line 4.",
        "1 captions are empty and left out: line 5.",
    ]


@pytest.mark.parametrize("delimiter", ["", "\\t", ";;"])
def test_a_delimiter_of_another_length(table, delimiter):
    with pytest.raises(ValueError, match=r"`delimiter` has to be one character, but got .* A tab is"):
        read_captions(table("filename\tcaption\na.wav\train\n"), delimiter=delimiter)


def test_a_caption_of_ten_thousand_words_is_kept_and_reported(table):
    path = table(f"filename,caption\na.wav,{'rain ' * 10_000}\n")
    with pytest.warns(
        UserWarning, match=r"more than 200 words .*as slow as it is long\): line 2 \(10000 words\)"
    ):
        assert len(read_captions(path)[0].captions[0].split()) == 10_000


@pytest.mark.parametrize("column", ["caption", "note"])
def test_a_lost_quotation_mark_that_swallows_rows(table, column):
    path = table(f'filename,{column},{"caption" if column == "note" else "note"}\n'
                 'a.wav,"rain,x\nb.wav,wind,x\nc.wav,sea",x\nd.wav,sun,x\n')  # fmt: skip
    with pytest.warns(UserWarning, match=r"1 rows span several lines \(up to line 4\).*swallowed the rows"):
        assert [clip.name for clip in read_captions(path)] == ["a.wav", "d.wav"]


def test_all_names_of_a_file_are_one_clip(table, tmp_path):
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).touch()
    (tmp_path / "link.wav").symlink_to("a.wav")
    (tmp_path / "folder").mkdir()
    names = ["./a.wav", "a.wav", "folder/../a.wav", str(tmp_path / "a.wav"), "link.wav", "b.wav"]
    path = table("filename,caption\n" + "".join(f"{name},what {name} is\n" for name in names))
    with pytest.warns(UserWarning, match=r"4 names stand for files .*'a.wav' is './a.wav', .* and 1 more"):
        clips = read_captions(path, root=tmp_path)
    assert [(clip.key, len(clip.captions)) for clip in clips] == [("file:a.wav", 5), ("file:b.wav", 1)]
    # Without the folder, links and absolute paths are other names.
    with pytest.warns(UserWarning, match="2 names"):
        assert len(read_captions(path)) == 4


def test_two_clip_ids_under_two_names(table, tmp_path):
    (tmp_path / "a.wav").touch()
    path = table("filename,caption,clip\na.wav,rain,1\n./a.wav,it rains,2\n")
    with pytest.raises(ValueError, match=r"line 3: './a.wav' has the clip id '2', but had '1' above"):
        read_captions(path, clip_id_column="clip", root=tmp_path)


def test_clips_have_the_same_id_in_every_table_of_a_collection(table, tmp_path):
    def ids(text, **options):
        clips = read_captions(table(text), **options)
        return {clip.path: (clip.key, clip.recording) for clip in clips}

    one = ids("filename,caption\na.wav,rain\nb.wav,wind\n")
    other = ids("filename,caption\nb.wav,sea\nc.wav,sun\n")
    assert one["b.wav"] == other["b.wav"]
    assert len({*one.values(), *other.values()}) == 3
    foreign = ids("filename,caption\nb.wav,sea\n", collection="other")
    assert foreign["b.wav"] == ("file:other/b.wav", "file:other/b.wav")
    grouped = [
        ids("filename,caption,clip\nb.wav,sea,7\n", clip_id_column="clip", collection=name)["b.wav"][1]
        for name in ("", "other")
    ]
    assert grouped == ["7", "other/7"]


def test_a_folder_in_place_of_a_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is a folder, not a table\. Pass the path of a file"):
        read_captions(tmp_path)


def test_spaces_before_a_quotation_mark(tmp_path):
    table = tmp_path / "clips.csv"
    table.write_text('filename, caption\na.wav, "rain, then ""wind"""\nb.wav, a "loud" bell\n')
    assert [clip.captions for clip in read_captions(table)] == [('rain, then "wind"',), ('a "loud" bell',)]

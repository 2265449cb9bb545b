"""Tables of captions: every mistake has an answer that says where it is and what to do."""

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
            "filename,text\na.wav,rain\n",
            r"no column 'caption'; it has \['filename', 'text'\].*`caption_columns`",
        ),
        ("filename;caption\na.wav;rain\n", r"no column .* look separated by ';': pass `delimiter=';'`"),
        ("filename\tcaption\na.wav\train\n", r"look separated by '\\t': pass `delimiter='\\t'`"),
        ("filename,caption,caption\na.wav,x,y\n", r"more than one column is called 'caption'"),
        (
            "filename,caption\na.wav,wind, then rain\n",
            r"line 2: 3 fields, but the header has 2.*double quotes",
        ),
        ("filename,caption\na.wav\n", r"line 2: 1 fields, but the header has 2"),
        ("filename,caption\na.wav,rain\nb.wav,  \n", r"line 3: column 'caption' is empty. Fill it or remove"),
        ("filename,caption\n,rain\n", r"line 2: column 'filename' is empty"),
        ('filename,caption\na.wav,"rain\n', r"line 2: unexpected end of data.*double quote"),
        (b"filename,caption\na.wav,rain\nb.wav,caf\xe9\n", r"line 3: byte 0xe9 is not valid utf-8.*latin1"),
    ],
)
def test_mistakes_in_a_table(table, text, message):
    with pytest.raises(ValueError, match=message):
        read_captions(table(text))


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

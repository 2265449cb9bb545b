"""Tables of captions: every mistake has an answer that says where it is and what to do."""

import pytest

from ask_lightning.data import CaptionedFile, read_captions, split_by_clip


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
        CaptionedFile("a.wav", "rain", 0),
        CaptionedFile("b.wav", "wind, then rain", 1),
    ]


def test_several_caption_columns_under_other_names(table):
    path = table("file_name;caption_1;caption_2\na.wav;rain;it rains\nb.wav;wind;it blows\n")
    pairs = read_captions(path, filename="file_name", captions=["caption_1", "caption_2"], delimiter=";")
    assert [pair.caption for pair in pairs] == ["rain", "it rains", "wind", "it blows"]
    assert [pair.clip_id for pair in pairs] == [0, 0, 1, 1]


def test_repeated_rows_are_one_clip(table):
    pairs = read_captions(table("filename,caption\na.wav,rain\nb.wav,wind\na.wav,it rains\n"))
    assert [pair.clip_id for pair in pairs] == [0, 1, 0]


def test_clip_ids_of_any_text_join_files(table):
    path = table("filename,caption,recording\na1.wav,rain,Y--x\nb.wav,wind,7\na2.wav,rain,Y--x\n")
    assert [pair.clip_id for pair in read_captions(path, clip_id="recording")] == [0, 1, 0]


def test_what_spreadsheets_do_is_understood(table):
    path = table(b"\xef\xbb\xbffilename, caption \r\n a.wav , rain \r\n\r\n")
    assert read_captions(path) == [CaptionedFile("a.wav", "rain", 0)]


def test_another_encoding(table):
    path = table("filename,caption\na.wav,café\n".encode("latin-1"))
    assert read_captions(path, encoding="latin-1")[0].caption == "café"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"clips.csv is empty. It needs a header line"),
        ("\n\n", r"clips.csv is empty"),
        ("filename,caption\n", r"clips.csv has a header but no rows"),
        ("filename,text\na.wav,rain\n", r"no column 'caption'; it has \['filename', 'text'\].*`captions`"),
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
        read_captions(path, clip_id="clip")


def test_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no table of captions at .*none.csv"):
        read_captions(tmp_path / "none.csv")


def test_no_caption_column(table):
    with pytest.raises(ValueError, match="`captions` has to name at least one column"):
        read_captions(table("filename\na.wav\n"), captions=[])


def test_split_keeps_clips_together_and_covers_everything():
    clip_ids = [index // 3 for index in range(300)]
    parts = split_by_clip(clip_ids, (0.8, 0.1, 0.1))
    assert sorted(index for part in parts for index in part) == list(range(300))
    clips = [{clip_ids[index] for index in part} for part in parts]
    assert [len(part) for part in clips] == [80, 10, 10]
    assert not clips[0] & clips[1] | clips[0] & clips[2] | clips[1] & clips[2]


def test_split_depends_on_seed_and_not_on_the_order_of_rows():
    clip_ids = [f"clip {index}" for index in range(50)]
    train, _ = split_by_clip(clip_ids, (0.6, 0.4), seed=1)
    backwards, _ = split_by_clip(clip_ids[::-1], (0.6, 0.4), seed=1)
    assert {clip_ids[index] for index in train} == {clip_ids[::-1][index] for index in backwards}
    assert train != split_by_clip(clip_ids, (0.6, 0.4), seed=2)[0]


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((0.5, 0.4), r"positive numbers with sum 1, but got \(0.5, 0.4\)"),
        ((1.2, -0.2), r"positive numbers with sum 1"),
        ((), r"positive numbers with sum 1"),
        ((0.9, 0.1), r"Part 1 of `fractions` \(0.9, 0.1\) would be empty: there are only 3 clips"),
    ],
)
def test_impossible_splits(fractions, message):
    with pytest.raises(ValueError, match=message):
        split_by_clip([0, 1, 2], fractions)

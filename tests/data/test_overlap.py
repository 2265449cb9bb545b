"""Recordings and captions that are in training and in evaluation are counted and named."""

import warnings

import numpy as np
import pytest
from torch.utils.data import ConcatDataset, Subset

from ask_lightning.data import AudioFolder, DatasetsDataModule, FolderData
from tests.helpers.published import audiocaps, clotho


@pytest.fixture
def folder(tmp_path, record):
    """Makes a folder data module whose CSV has a row `{name}{rest}` for each of ten files."""

    def make(header, rest, **options):
        for number in range(10):
            record(f"{number}.wav", seconds=0.1)
        rows = [f"{number}.wav,{rest(number)}" for number in range(10)]
        (tmp_path / "clips.csv").write_text("\n".join([f"filename,{header}", *rows]))
        return FolderData(
            tmp_path, tmp_path / "clips.csv", fractions=(0.5, 0.5), seconds=0.1, batch_size=2, **options
        )

    return make


def warned(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in caught]


def test_takes_of_one_recording_are_reported_with_the_column_that_keeps_them_together(folder):
    def rest(number):  # each two files are from one source; class and licence are no recordings
        return f"sound number {number},{number // 2},dog,cc0"

    header = "caption,source,class,licence"
    (message,) = warned(lambda: folder(header, rest).datasets)
    assert "share values of these columns with training clips: 'source' (" in message
    assert "class" not in message
    assert "pass it as `clip_id_column`" in message
    assert not warned(lambda: folder(header, rest, clip_id_column="source").datasets)


def test_captions_on_both_sides_are_counted(folder):
    def rest(number):
        return "Rain." if number % 2 else f"rain number {number}"

    (message,) = warned(lambda: folder("caption", rest).datasets)
    assert "of 5 validation and test clips have the words of a training caption (" in message
    assert (
        "`clip_id_column='caption'` keeps clips with equal captions in one split; they then count as one clip"
        in message
    )
    assert not warned(lambda: folder("caption", rest, clip_id_column="caption").datasets)


def test_captions_cannot_be_clip_ids_where_clips_have_several(folder, tmp_path):
    def rest(number):
        return f"Rain.\n{number}.wav,wind number {number}"

    (message,) = warned(lambda: folder("caption", rest).datasets)
    assert "have the words of a training caption (" in message
    assert "clip_id_column" not in message


def test_nothing_is_said_of_splits_that_share_nothing(folder):
    assert not warned(lambda: folder("caption", lambda number: f"sound number {number}").datasets)


@pytest.mark.parametrize("table", ["\n\n{}", "{}\n\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_with_blank_lines_and_ends_of_every_kind(tmp_path, record, table, end):
    rows = [
        "filename,caption,source",
        *(f"{record(f'{n}.wav', 0.1).name},sound {n},{n // 2}" for n in range(8)),
    ]
    (tmp_path / "clips.csv").write_text(table.format("\n".join(rows)).replace("\n", end), newline="")
    data = FolderData(tmp_path, tmp_path / "clips.csv", fractions=(0.5, 0.5), seconds=0.1, batch_size=2)
    (message,) = warned(lambda: data.datasets)
    assert "'source'" in message


@pytest.fixture
def part(tmp_path, record):
    """Makes a dataset of a CSV of its own."""

    def make(*rows, root="", **options):
        (tmp_path / "part.csv").write_text("\n".join(["filename,caption,clip", *rows]))
        return AudioFolder(tmp_path / root, tmp_path / "part.csv", seconds=0.1, **options)

    for name in ("a.wav", "b.wav", "c.wav"):
        record(name, seconds=0.1)
    return make


def messages(train, val):
    return warned(lambda: DatasetsDataModule(train, val, batch_size=2).datasets)


@pytest.mark.parametrize("check", ["header", "none"])
def test_files_in_two_tables(part, tmp_path, check):
    train = part("a.wav,rain,1", "b.wav,wind,2", check=check)
    same = part(f"{tmp_path}/a.wav,sea,3", "./b.wav,sun,4", "c.wav,hail,5", check=check)
    (message,) = messages(train, same)
    assert "2 of 3 validation and test clips are recordings that training has too (" in message
    assert not messages(train, part("c.wav,hail,5", check=check))


def test_links_in_two_tables(part, tmp_path):
    (tmp_path / "link.wav").symlink_to("a.wav")
    (message,) = messages(part("a.wav,rain,1"), part("link.wav,sea,2"))
    assert "1 of 1 validation and test clips are recordings that training has too (link.wav)" in message


def test_clip_ids_in_two_tables(part):
    train = part("a.wav,rain,1", clip_id_column="clip")
    (message,) = messages(train, part("b.wav,sea,1", "c.wav,sun,2", clip_id_column="clip"))
    assert "1 of 2 validation and test clips are recordings that training has too (b.wav)" in message


def test_every_take_of_a_recording_is_looked_for(part):
    train = part("a.wav,rain,1", "b.wav,wind,1", clip_id_column="clip")
    (message,) = messages(train, part("a.wav,sea,2"))
    assert "1 of 1 validation and test clips are recordings that training has too (a.wav)" in message


def test_captions_of_a_clip_that_were_divided_as_items(part):
    clips = part("a.wav,rain,1", "a.wav,it rains,1", "b.wav,wind,2", "c.wav,hail,3")
    (message,) = messages(Subset(clips, [0, 2]), Subset(clips, [1, 3]))
    assert "1 of 2 validation and test clips are recordings that training has too (a.wav)" in message
    assert not messages(Subset(clips, [0, 1, 2]), Subset(clips, [3]))


def test_parts_of_joined_datasets_are_compared(part):
    first, second = part("a.wav,rain,1", "b.wav,wind,2"), part("c.wav,hail,3")
    joined = ConcatDataset([first, second])
    message, _ = messages(joined, second)  # and one about the caption
    assert "1 of 1 validation and test clips are recordings that training has too (c.wav)" in message
    assert not messages(Subset(joined, [0, 1]), Subset(joined, np.array([2])))


def test_equal_names_in_two_folders(part, tmp_path, record):
    (tmp_path / "other").mkdir()
    record("other/a.wav", seconds=0.1)
    train, val = part("a.wav,rain,1"), part("a.wav,sea,1", root="other")
    (message,) = messages(train, val)
    assert "have the names, and so the clip ids, of training clips in another folder (a.wav)" in message
    assert "by the argument `collection`" in message
    assert not messages(train, part("a.wav,sea,1", root="other", collection="other"))


@pytest.mark.parametrize(
    ("data", "table"),
    [(audiocaps, "audiocaps/train.csv"), (clotho, "clotho/clotho_csv_files/clotho_captions_development.csv")],
)
def test_published_splits_that_are_the_same_file(written, data, table):
    with pytest.warns(UserWarning, match=r"8 of 8 training clips are validation or test clips as well"):
        data(written, annotations={"test": str(written / table)}).setup("fit")
    assert not [line for line in warned(lambda: data(written).setup("fit")) if "training clips are" in line]

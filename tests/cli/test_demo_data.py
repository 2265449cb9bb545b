"""The synthetic datasets of the demo are written once, and nothing else is touched."""

import pytest

from ask_lightning.cli.demo_data import write_demo
from ask_lightning.cli.errors import UsageError


def test_data_of_another_version_or_with_files_gone_are_written_anew(tmp_path):
    write_demo(tmp_path)
    table = tmp_path / "AudioCaps" / "train.csv"
    before = table.read_text()
    written = (tmp_path / "Clotho").stat().st_mtime_ns
    table.unlink()
    marker = tmp_path / "WavCaps" / ".ask-lightning-demo"
    expected = marker.read_text()
    marker.write_text("of old")
    write_demo(tmp_path)
    assert table.read_text() == before
    assert marker.read_text() == expected
    assert (tmp_path / "Clotho").stat().st_mtime_ns == written


def test_data_that_are_no_demo_stay_as_they_are(tmp_path):
    (tmp_path / "Clotho").mkdir()
    (tmp_path / "Clotho" / "mine.csv").touch()
    with pytest.raises(UsageError, match=r"Clotho is no data of --demo\. Pass another folder as --demo=F"):
        write_demo(tmp_path)
    assert sorted(path.name for path in (tmp_path / "Clotho").iterdir()) == ["mine.csv"]
    assert not (tmp_path / "AudioCaps").exists()

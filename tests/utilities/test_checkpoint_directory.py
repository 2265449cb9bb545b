from pathlib import Path

import pytest

from ask_lightning.utilities.checkpoint_directory import common_file


@pytest.mark.parametrize("name", ["meta.pt", "checkpoint/mp_rank_00_model_states.pt"])
def test_common_file(name, tmp_path):
    assert common_file(tmp_path) is None
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    assert common_file(tmp_path) == file


def test_of_a_path_that_is_no_directory(tmp_path):
    assert common_file(Path(tmp_path / "absent")) is None

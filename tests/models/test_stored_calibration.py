"""The calibration beside a model: what cannot be written is said as an error of the operating system."""

import pytest
import torch
from safetensors import SafetensorError

from ask_lightning.metrics import Calibration, QueryBank
from ask_lightning.models import TinyRetriever, load_calibration, stored_calibration
from ask_lightning.models.stored_calibration import save_calibration
from ask_lightning.utilities.weights import weights_fingerprint


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    bank = QueryBank(torch.eye(2), torch.eye(2))
    path = save_calibration(tmp_path, bank, Calibration(), "0" * 16)
    before = path.read_bytes()

    def refuse(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(stored_calibration, "save_file", refuse)
    with pytest.raises(OSError, match=r"calibration\.safetensors cannot be written: No space left"):
        save_calibration(tmp_path, bank, Calibration(), "1" * 16)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_the_calibration_of_other_weights_is_refused(tmp_path):
    """As where a model that was trained further is saved into the folder of the earlier one."""
    model = TinyRetriever(width=8)
    model.save_pretrained(tmp_path)
    save_calibration(
        tmp_path, QueryBank(torch.eye(8), torch.eye(8)), Calibration(), weights_fingerprint(model)
    )
    assert load_calibration(tmp_path) is not None
    model.save_pretrained(tmp_path)
    assert load_calibration(tmp_path) is not None
    torch.nn.init.zeros_(next(model.parameters()))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is the calibration of other weights .* Remove it, or export"):
        load_calibration(tmp_path)

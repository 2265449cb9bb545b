"""Models that are uploaded to a hub, which is a folder here."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from ask_lightning.metrics import Calibration, QueryBank
from ask_lightning.models import TinyRetriever, from_pretrained, load_calibration
from ask_lightning.models.hub import upload_folder
from ask_lightning.models.stored_calibration import save_calibration
from ask_lightning.utilities.weights import weights_fingerprint


class FolderHub:
    """Keeps repositories as folders, behind the two calls of `huggingface_hub.HfApi` that are made."""

    def __init__(self, folder, error=None):
        self.folder, self.error, self.private = folder, error, None

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        self.private = private
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        if self.error is not None:
            raise self.error
        for pattern in delete_patterns:
            for file in (self.folder / repo_id).glob(pattern):
                file.unlink()
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)


@pytest.mark.parametrize("private", [True, False])
def test_a_pushed_model_comes_back(private, tmp_path, monkeypatch):
    hub = FolderHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    model = TinyRetriever(width=8)
    address = model.push_to_hub("me/sounds", private=private)
    assert "me/sounds" in address
    assert hub.private == (private or None)  # None: whatever the organisation's default is
    loaded = from_pretrained(tmp_path / "me/sounds")
    assert isinstance(loaded, TinyRetriever)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_what_is_of_an_earlier_model_leaves_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FolderHub(tmp_path))
    folder, earlier, repository = tmp_path / "clips", TinyRetriever(width=8), tmp_path / "me/sounds"
    earlier.save_pretrained(folder)
    bank = QueryBank(torch.eye(8), torch.eye(8))
    save_calibration(folder, bank, Calibration(), weights_fingerprint(earlier))
    for name in ("README.md", "results.json", "results-2.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    upload_folder(folder, "me/sounds")
    assert load_calibration(repository) is not None
    TinyRetriever(width=8).push_to_hub("me/sounds")
    assert load_calibration(repository) is None
    assert {file.name for file in repository.iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_a_hub_that_cannot_be_reached_is_said(tmp_path, monkeypatch):
    class ConnectError(Exception):
        """As the hub's HTTP client has it: no `OSError`."""

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FolderHub(tmp_path, ConnectError("refused")))
    with pytest.raises(OSError, match=r"^The model was not uploaded to 'me/sounds' \(refused\)\. Log in"):
        TinyRetriever(width=8).push_to_hub("me/sounds")


def test_what_the_hub_refuses_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FolderHub(tmp_path, OSError("401 Unauthorized\n…")))
    with pytest.raises(
        OSError, match=r"^The model was not uploaded to 'me/sounds' \(401 Unauthorized\)\. Log in"
    ):
        TinyRetriever(width=8).push_to_hub("me/sounds")

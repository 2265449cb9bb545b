"""Weights and tokenizers: from files and folders, and what is said where there are none."""

import zipfile

import numpy as np
import pytest
import torch

from ask_lightning.models import CEDSonar, CLAPRetriever, ResNet38BERT
from ask_lightning.models.text import TextEncoder
from ask_lightning.models.weights import find_file, read_state_dict
from tests.helpers.retrievers import BERT, CLAP, ced_sonar, clap, resnet38_bert

transformers = pytest.importorskip("transformers")


def test_a_checkpoint_with_the_arrays_of_its_sampler(tmp_path):
    """As the files of PANNs have them, in the names of old numpy too."""
    path = tmp_path / "panns.pth"
    sampler = {"indexes_per_class": [np.arange(3), np.arange(2, dtype=np.int32)], "queue": [np.int64(4)]}
    torch.save({"iteration": 1, "model": {"a": torch.ones(2)}, "sampler": sampler}, path)
    assert list(read_state_dict(path)) == ["a"]
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "old.pth", "w") as older:
        for item in whole.infolist():
            content = whole.read(item).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            older.writestr(item, content)
    assert list(read_state_dict(tmp_path / "old.pth")) == ["a"]


class Evil:
    def __reduce__(self):
        return print, ("code of a stranger",)


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    torch.save({"model": {"a": torch.ones(1)}, "extra": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    (tmp_path / "text.safetensors").write_text("<html>not found</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("evil.pth", "text.pth", "text.safetensors", "empty.pth"):
        with pytest.raises(ValueError, match=f"{name}' is no checkpoint that can be read"):
            read_state_dict(tmp_path / name)
    assert "stranger" not in capsys.readouterr().out
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="has to hold a state dict, but got a list"):
        read_state_dict(tmp_path / "list.pth")
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "run.pth")
    with pytest.raises(ValueError, match="has to hold tensors by name, but epoch, loss are none"):
        read_state_dict(tmp_path / "run.pth")


def test_a_state_dict_that_lightning_saved(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "epoch": 3}, tmp_path / "last.ckpt")
    assert list(read_state_dict(tmp_path / "last.ckpt")) == ["a"]


def test_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=r"`audio_weights` names weights that are not there: no file 'ResNet38.pth'. Download "
        r"ResNet38_mAP=0.434.pth of PANNs from https://zenodo.org/records/3987831 .*`audio_weights=None`",
    ):
        resnet38_bert(audio_weights="ResNet38.pth")
    offline = (
        r"no file or folder {} and the Hugging Face hub was not asked, for HF_HUB_OFFLINE is set \(.+\)\. "
    )
    with pytest.raises(
        FileNotFoundError,
        match="`text_weights` names weights that are not there: "
        + offline.format("'bert-base-uncased',")
        + "Unset HF_HUB_OFFLINE, .*`text_weights=None`",
    ):
        resnet38_bert(text_weights="bert-base-uncased", tokenizer=None)  # fmt: skip
    with pytest.raises(FileNotFoundError, match=offline.format("'mispeech/ced-base',") + 'Pass "mispeech'):
        ced_sonar(audio_weights="mispeech/ced-base")
    with pytest.raises(FileNotFoundError, match="`text_weights`.*" + offline.format("'some/sonar',")):
        ced_sonar(text_weights="some/sonar")
    with pytest.raises(FileNotFoundError, match="`weights`.*" + offline.format("'laion/clap',")):
        clap(weights="laion/clap", config=None)
    with pytest.raises(
        FileNotFoundError,
        match="`tokenizer` names a tokenizer that is not there: "
        + offline.format("'some/words',")
        + "Pass a",
    ):
        resnet38_bert(tokenizer="some/words")
    empty = str(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no file 'model.safetensors' in the folder '{empty}'"):
        ced_sonar(audio_weights=empty)
    with pytest.raises(FileNotFoundError, match=f"the folder '{empty}' does not hold them"):
        resnet38_bert(text_weights=empty, tokenizer=None)
    with pytest.raises(FileNotFoundError, match=f"`tokenizer` .* the folder '{empty}' does not hold it"):
        resnet38_bert(tokenizer=empty)


def test_random_weights_and_tokenizers_have_to_be_asked_for():
    with pytest.raises(TypeError, match="audio_weights"):
        ResNet38BERT()
    with pytest.raises(TypeError, match="text_weights"):
        CEDSonar(None)
    with pytest.raises(TypeError, match="weights"):
        CLAPRetriever()
    for make in (resnet38_bert, ced_sonar, clap):
        with pytest.raises(
            ValueError, match="`tokenizer` has to be given for a text encoder with random weights"
        ):
            make(tokenizer=None)


def test_find_file_expands_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pth").write_bytes(b"")
    assert find_file("~/w.pth", argument="a", remedy="b") == tmp_path / "w.pth"


def test_incomplete_weights_are_refused(tmp_path):
    """Another architecture under the same configuration would leave weights random."""
    model = transformers.BertModel(transformers.BertConfig(**BERT))
    state = {name: value for name, value in model.state_dict().items() if "embeddings.word" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        ValueError,
        match=r"`text_weights` has to name all weights of BertModel, but '.+' lacks "
        r"'embeddings.word_embeddings.weight', which would stay random",
    ):
        TextEncoder.bert(str(tmp_path), None, "hashed")


def test_clap_from_a_folder(tmp_path):
    published = transformers.ClapModel(transformers.ClapConfig(**CLAP))
    published.save_pretrained(tmp_path)
    model = clap(weights=str(tmp_path), config=None)
    for name, value in published.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value), name
    assert model.model.training

"""Weights and tokenizers: from files and folders, and what is said where there are none."""

import pickle
import re
import zipfile

import numpy as np
import pytest
import torch

from ask_lightning.models import CEDSonar, CLAPRetriever, ResNet38BERT
from ask_lightning.models.text import TextEncoder
from ask_lightning.models.tokens import HashedTokenizer, VocabularyTokenizer
from ask_lightning.models.weights import find_file, read_state_dict
from tests.helpers.retrievers import BERT, CAPTIONS, CLAP, SONAR, ced_sonar, clap, resnet38_bert

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "rain", "wind", "a", "dog", "##s", "barking", ","]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """What `hf download` leaves: a configuration, weights and a tokenizer; the weights in half precision."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(1)
    transformers.BertModel(transformers.BertConfig(**BERT)).half().save_pretrained(folder)
    return str(folder)


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


def test_a_pretrained_text_encoder_trains_in_float32_with_its_own_tokenizer(bert_folder):
    encoder = TextEncoder.bert(bert_folder, None, None, dropout=0.2)
    published = transformers.BertModel.from_pretrained(bert_folder).float()
    for name, value in encoder.model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, published.state_dict()[name]), name
    assert encoder.model.training
    assert encoder.model.embeddings.dropout.training
    assert encoder.model.embeddings.dropout.p == 0.2
    assert encoder.model.pooler is None
    own = transformers.AutoTokenizer.from_pretrained(bert_folder)
    expected = own(["Rain, wind", "a dogs"], padding=True, return_tensors="pt")
    ids, mask = encoder.tokenizer(["Rain, wind", "a dogs"])
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"])
    hidden = published.eval()(**expected).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.eval()(["Rain, wind", "a dogs"]), hidden)


def test_entries_of_the_configuration(bert_folder):
    encoder = TextEncoder.bert(bert_folder, {"hidden_dropout_prob": 0.5}, None, dropout=0.2)
    assert encoder.model.embeddings.dropout.p == 0.5
    assert encoder.model.config.attention_probs_dropout_prob == 0.2
    with pytest.raises(
        ValueError, match="`text_config` has to hold entries of BertConfig, but got 'hiden_size'"
    ):
        TextEncoder.bert(None, {"hiden_size": 8}, "hashed")
    with pytest.raises(ValueError, match="`config` has to hold entries of ClapConfig, but got 'hop'"):
        clap(config={"hop": 1})
    with pytest.raises(ValueError, match="`config` is for random weights, but got `weights` too"):
        clap(weights="laion/clap")


def test_another_kind_of_text_encoder():
    settings = {"model_type": "distilbert", "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
    encoder = TextEncoder.bert(None, settings, "hashed", dropout=0.2)
    assert type(encoder.model).__name__ == "DistilBertModel"
    assert encoder(["rain"]).shape == (1, 8)


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


def test_sonar_from_a_folder(tmp_path):
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    torch.manual_seed(3)
    published = M2M100Encoder(transformers.M2M100Config(**SONAR))
    published.save_pretrained(tmp_path)
    encoder = TextEncoder.sonar(str(tmp_path), None, "hashed").eval()
    ids, mask = encoder.tokenizer(CAPTIONS)
    states = published.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = torch.stack([row[: int(length)].mean(0) for row, length in zip(states, mask.sum(1))])  # noqa: B905
    torch.testing.assert_close(encoder(CAPTIONS), expected)
    assert TextEncoder.sonar(str(tmp_path), None, "hashed").model.training


def test_clap_from_a_folder(tmp_path):
    published = transformers.ClapModel(transformers.ClapConfig(**CLAP))
    published.save_pretrained(tmp_path)
    model = clap(weights=str(tmp_path), config=None)
    for name, value in published.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value), name
    assert model.model.training


@pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="makes a tokenizer as version 5 does"
)
def test_the_language_of_the_captions(tmp_path):
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁rain", "▁wind"]
    vocabulary = {word: index for index, word in enumerate(words)}
    nllb = transformers.NllbTokenizer(vocabulary, [], additional_special_tokens=["deu_Latn", "eng_Latn"])
    nllb.save_pretrained(tmp_path)
    rows = {}
    for language in ("eng_Latn", "deu_Latn"):
        tokenizer = VocabularyTokenizer.from_source(str(tmp_path), language=language)
        ids, _ = tokenizer(["rain"])
        assert nllb.convert_ids_to_tokens(ids[0].tolist())[0] == language
        assert ids[0, -1] == 2
        rows[language] = ids
    assert not torch.equal(rows["eng_Latn"], rows["deu_Latn"])
    with pytest.raises(ValueError, match=r"`language` has to be a language code .* but got 'english'"):
        VocabularyTokenizer.from_source(str(tmp_path), language="english")


def test_a_tokenizer_travels_with_the_state_dict(bert_folder):
    tokenizer = VocabularyTokenizer.from_source(bert_folder, max_tokens=5)
    arrived = VocabularyTokenizer()
    arrived.load_state_dict(tokenizer.state_dict())
    texts = ["rain, wind, a dog barking", "rain"]
    for mine, other in zip(arrived(texts), tokenizer(texts), strict=True):
        assert mine.shape == (2, 5)
        assert torch.equal(mine, other)
    assert arrived.num_ids == len(WORDS)
    empty = VocabularyTokenizer()
    assert empty.num_ids == 0
    arrived.load_state_dict(empty.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        VocabularyTokenizer().load_state_dict({})
    assert pickle.loads(pickle.dumps(arrived))(texts)[0].shape == (2, 5)


def test_a_tokenizer_of_another_vocabulary(bert_folder):
    with pytest.raises(
        ValueError,
        match=r"`tokenizer` has to fit the text encoder, but .* has ids up to 11, and .* a vocabulary of 8",
    ):
        resnet38_bert(text_config=BERT | {"vocab_size": 8}, tokenizer=bert_folder)


def test_hashed_words():
    tokenizer = HashedTokenizer(vocab_size=50, pad_id=1, max_tokens=6)
    ids, mask = tokenizer(["", "Rain", "rain " * 10_000])
    assert ids.shape == mask.shape == (3, 6)
    assert mask.sum(dim=1).tolist() == [1, 2, 6]
    assert torch.equal(ids == 1, mask == 0)
    assert (ids[:, 0] == 0).all()
    assert (ids[2, 1:] == ids[1, 1]).all()
    many = HashedTokenizer(vocab_size=50)([" ".join(f"word{index}" for index in range(100))])[0]
    assert many.min() >= 1
    assert many.max() < 50
    assert HashedTokenizer(30522)(["thunder"])[0].tolist() == [[1, 19463]], "the same in every version"


def test_captions_are_cut_where_positions_end():
    encoder = TextEncoder.bert(None, BERT, "hashed", max_tokens=1000).eval()
    assert encoder(["rain " * 10_000, "wind"]).isfinite().all()
    assert encoder.tokenizer(["rain " * 10_000])[0].shape == (1, 39)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HashedTokenizer(7), "`vocab_size` has to be an integer of at least 8, but got 7"),
        (lambda: HashedTokenizer(99, pad_id=3), "`pad_id` has to be one of (0, 1, 2), but got 3"),
        (lambda: resnet38_bert(max_tokens=2), "`max_tokens` has to be an integer of at least 3, but got 2"),
    ],
)
def test_arguments_outside_their_range(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()

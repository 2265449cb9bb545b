"""Text encoders of transformers: pretrained, of other kinds and sizes."""

import pytest
import torch

from ask_lightning.models import text as text_module
from ask_lightning.models.text import TextEncoder
from tests.helpers.retrievers import CAPTIONS, clap

transformers = pytest.importorskip("transformers")


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


def test_sonar_from_a_folder(tmp_path):
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    torch.manual_seed(3)
    small = {"vocab_size": 1000, "encoder_layers": 2, "encoder_ffn_dim": 64}
    published = M2M100Encoder(transformers.M2M100Config(**text_module.SONAR | small))
    published.save_pretrained(tmp_path)
    encoder = TextEncoder.sonar(str(tmp_path), None, "hashed").eval()
    ids, mask = encoder.tokenizer(CAPTIONS)
    states = published.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = torch.stack([row[: int(length)].mean(0) for row, length in zip(states, mask.sum(1))])  # noqa: B905
    torch.testing.assert_close(encoder(CAPTIONS), expected)
    assert TextEncoder.sonar(str(tmp_path), None, "hashed").model.training


def test_sonar_and_bert_have_the_published_counts():
    """SONAR's file on the hub is 3.06 GB of float32; BERT-base is 110 M with its pooler."""
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    with torch.device("meta"):
        sonar = M2M100Encoder(transformers.M2M100Config(**text_module.SONAR))
        bert = transformers.AutoModel.from_config(transformers.BertConfig())
    assert round(4 * sum(value.numel() for value in sonar.parameters()) / 1e9, 2) == 3.06
    assert sum(value.numel() for value in bert.parameters()) == 109482240

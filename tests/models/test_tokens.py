"""Tokenizers: with a vocabulary, which travels with the weights, and by hashes."""

import pickle
import re

import pytest
import torch

from ask_lightning.models.text import TextEncoder
from ask_lightning.models.tokens import HashedTokenizer, VocabularyTokenizer
from tests.helpers.retrievers import BERT, VOCABULARY, resnet38_bert

transformers = pytest.importorskip("transformers")


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
    VocabularyTokenizer(language=language).load_state_dict(tokenizer.state_dict())
    with pytest.raises(ValueError, match=r"`language` cannot be changed to 'eng_Latn': .* as 'deu_Latn'"):
        VocabularyTokenizer(language="eng_Latn").load_state_dict(tokenizer.state_dict())
    with pytest.raises(ValueError, match=r"`language` has to be a language code .* but got 'english'"):
        VocabularyTokenizer.from_source(str(tmp_path), language="english")


def test_a_tokenizer_travels_with_the_state_dict(bert_folder):
    tokenizer = VocabularyTokenizer.from_source(bert_folder, max_tokens=5)
    arrived = VocabularyTokenizer(max_tokens=5)
    arrived.load_state_dict(tokenizer.state_dict())
    texts = ["rain, wind, a dog barking", "rain"]
    for mine, other in zip(arrived(texts), tokenizer(texts), strict=True):
        assert mine.shape == (2, 5)
        assert torch.equal(mine, other)
    assert arrived.num_ids == len(VOCABULARY)
    empty = VocabularyTokenizer()
    assert empty.num_ids == 0
    arrived.load_state_dict(empty.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        VocabularyTokenizer().load_state_dict({})
    assert pickle.loads(pickle.dumps(arrived))(texts)[0].shape == (2, 5)
    shorter = VocabularyTokenizer(max_tokens=4)
    shorter.load_state_dict(tokenizer.state_dict())
    assert shorter(texts)[0].shape == (2, 4)


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

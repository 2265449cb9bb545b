"""Small weights as the Hugging Face hub has them."""

import pytest
import torch

from tests.helpers.retrievers import BERT, VOCABULARY


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """What `hf download` leaves: a configuration, weights and a tokenizer; the weights in half precision."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(1)
    transformers.BertModel(transformers.BertConfig(**BERT)).half().save_pretrained(folder)
    return str(folder)

"""Texts in the bytes of a file."""

import unicodedata

import pytest
import torch

from ask_lightning.cli.stored_texts import StoredTexts

TEXTS = ["a dog", "", "häuser 🐕", "\udcff is no Unicode", "line\nbreak"]


def test_texts_come_back():
    stored = StoredTexts.of(TEXTS)
    assert list(stored) == TEXTS
    assert [stored[place] for place in range(5)] == TEXTS
    assert stored[-1] == TEXTS[-1]
    assert stored[1:4:2] == TEXTS[1:4:2]
    assert stored == TEXTS
    assert stored == StoredTexts.of(tuple(TEXTS))
    assert stored != TEXTS[:-1]
    assert stored != [*TEXTS[:-1], "other"]
    assert "a dog" in stored
    with pytest.raises(IndexError):
        stored[5]
    assert StoredTexts.of(stored) is stored
    assert list(StoredTexts.of([])) == []
    assert list(StoredTexts.of([""])) == [""]


def test_many_texts_are_read_block_by_block():
    texts = [str(number) for number in range(70_000)]
    assert list(StoredTexts.of(texts)) == texts


def test_bytes_and_ends_that_do_not_belong_together():
    with pytest.raises(ValueError, match="not as long as they are said to be"):
        StoredTexts(torch.zeros(3, dtype=torch.uint8), torch.tensor([2]))


@pytest.mark.parametrize("words", ["dog", "ser ", "häuser", "ss", "k", "\udcff", "nothing has this", ""])
def test_texts_that_contain_others(words):
    # Folding a letter may make two of it, or one of another alphabet.
    texts = [*TEXTS, "Straße", "\N{KELVIN SIGN}", *["filler"] * 5000, "A DOG", ""]
    texts.append(unicodedata.normalize("NFD", "Häuser am See"))
    expected = [words in unicodedata.normalize("NFC", text.casefold()) for text in texts]
    assert expected[-1] == (words in ("ser ", "häuser", ""))
    assert StoredTexts.of(texts).containing(words).tolist() == expected
    assert StoredTexts.of([]).containing(words).tolist() == []

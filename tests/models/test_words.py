"""Hashed words: no caption depends on another, related words share pieces."""

import torch

from ask_lightning.models.words import HashedWordEncoder, word_pieces


def test_a_caption_does_not_depend_on_the_others_of_its_batch():
    encoder = HashedWordEncoder(width=8)
    captions = ["rain", "a dog barking in the distance, then a long silence"]
    together = encoder(captions)
    alone = torch.cat([encoder([caption]) for caption in captions])
    torch.testing.assert_close(together, alone)


def test_pieces_of_related_words_are_shared_and_case_is_not():
    assert set(word_pieces("ring")) & set(word_pieces("ringing"))
    assert word_pieces("Ring") == word_pieces("ring")
    assert word_pieces("a") == ["<a>"]

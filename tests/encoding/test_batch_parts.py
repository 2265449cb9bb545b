"""`BatchContent`: the arguments of a call in terms of the batch that the caller had."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch

from ask_lightning.encoding.batch_parts import BatchContent, describe

AUDIO, TOKENS, MASK = torch.ones(2, 3), torch.zeros(2, 4), torch.ones(2, 4)


@dataclass
class Batch:
    audio: torch.Tensor
    text: dict


Pair = namedtuple("Pair", ["audio", "text"])
BATCHES = {
    "mapping": {"audio": AUDIO, "text": {"ids": TOKENS, "mask": MASK}},
    "tuple": (AUDIO, {"ids": TOKENS, "mask": MASK}),
    "list": [AUDIO, [TOKENS, MASK]],
    "dataclass": Batch(AUDIO, {"ids": TOKENS, "mask": MASK}),
    "named tuple": Pair(AUDIO, (TOKENS, MASK)),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_arguments_are_found_and_taken_from_another_batch(kind):
    batch = BATCHES[kind]
    call = BatchContent(batch).find_call((AUDIO, None, 3), {"ids": TOKENS, "mask": MASK, "mode": "mean"})
    positional, named = call.arguments(batch)
    assert positional[0] is AUDIO
    assert positional[1:] == [None, 3]
    assert named["ids"] is TOKENS
    assert named["mask"] is MASK
    assert named["mode"] == "mean"
    assert not call.takes_batch
    if kind == "mapping":
        other = {"audio": TOKENS, "text": {"ids": AUDIO, "mask": AUDIO}}
        assert call.arguments(other)[0][0] is TOKENS
        assert str(call) == (
            "batch['audio'], None, 3, ids=batch['text']['ids'], mask=batch['text']['mask'], mode='mean'"
        )


def test_the_batch_itself():
    batch = {"audio": AUDIO}
    call = BatchContent(batch).find_call((batch,), {})
    assert call.takes_batch
    assert call.arguments("other") == (["other"], {})


def test_what_is_made_of_the_batch_is_not_found():
    assert BatchContent({"audio": AUDIO}).find_call((AUDIO * 1,), {}) is None
    assert BatchContent({"audio": AUDIO}).find_call((), {"audio": AUDIO[:1]}) is None


def test_a_number_of_the_batch_is_taken_from_each_batch():
    """Not the number that the first batch happened to have."""
    batch = {"audio": AUDIO, "frames": 12, "task": "search", "clips": [3, 7], "captions": ["search", "rain"]}
    call = BatchContent(batch).find_call((AUDIO, 12, "search"), {"layers": 3, "mode": "rain"})
    assert str(call) == "batch['audio'], batch['frames'], batch['task'], layers=3, mode='rain'"
    assert call.has_numbers
    assert not BatchContent(batch).find_call((AUDIO, 12), {"mode": "rain", "is_long": True}).has_numbers


def test_a_number_that_two_parts_may_be_is_not_guessed():
    assert BatchContent({"audio": AUDIO, "frames": 12, "tokens": 12}).find_call((AUDIO, 12), {}) is None
    assert BatchContent({"audio": AUDIO, "frames": 12, "tokens": 12}).find_call((AUDIO, 11), {}) is not None


def test_description():
    assert describe({"b": 1, "a": 2}) == "dict with the keys ['a', 'b']"
    assert describe((AUDIO, ["x"])) == "tuple of tensor (2, 3), list of str"

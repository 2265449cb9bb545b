"""What encoders take is cut into rows, whatever it is made of."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import Tensor

from ask_lightning.encoding.batch_rows import num_rows, rows_of, tensors_of

Pair = namedtuple("Pair", ["audio", "text"])


@dataclass(frozen=True)
class Clips:
    waveform: Tensor
    captions: list[str]
    rate: int = 16000


def second_row(batch):
    assert num_rows({"batch": batch}, "encode") == 3
    return rows_of(batch, 1, 2, 3)


def test_kinds_of_batches():
    audio, text = torch.arange(12).reshape(3, 4), ["a", "b", "c"]
    assert second_row(audio).tolist() == [[4, 5, 6, 7]]
    assert second_row(text) == ["b"]
    assert second_row((audio, tuple(text)))[1] == ("b",)
    assert second_row([audio, text, None, True])[1:] == [["b"], None, True]
    cut = second_row(
        {"audio": {"x": audio, "scale": torch.tensor(2.0)}, "text": text, "rate": 8, "name": "x"}
    )
    assert cut["audio"]["x"].tolist() == [[4, 5, 6, 7]]
    assert (cut["audio"]["scale"], cut["text"], cut["rate"], cut["name"]) == (2.0, ["b"], 8, "x")
    dataclass_row = second_row(Clips(audio, text, 8000))
    assert (dataclass_row.waveform.tolist(), dataclass_row.captions, dataclass_row.rate) == (
        [[4, 5, 6, 7]],
        ["b"],
        8000,
    )
    named = second_row(Pair(audio, np.arange(3)))
    assert isinstance(named, Pair)
    assert named.text.tolist() == [1]
    assert second_row(MappingProxyType({"text": text})) == {"text": ["b"]}
    tokens = second_row(UserDict(input_ids=audio))
    assert isinstance(tokens, UserDict)
    assert len(tokens["input_ids"]) == 1


def test_tensors_are_views():
    audio = torch.zeros(4, 2)
    assert rows_of({"audio": audio}, 2, 4, 4)["audio"].data_ptr() == audio[2:].data_ptr()


def test_a_batch_itself_is_left_alone():
    batch = {"text": ["a", "b", "c"]}
    second_row(batch).pop("text")
    assert batch == {"text": ["a", "b", "c"]}


def test_lists_of_ragged_rows():
    waveforms = [torch.ones(5), torch.ones(7), torch.ones(2)]
    assert [len(row) for row in second_row(waveforms)] == [7]
    cut = second_row({"waveforms": waveforms, "ids": torch.arange(3)})
    assert [len(row) for row in cut["waveforms"]] == [7]
    assert second_row({"tokens": [[1, 2], [3], [4, 5, 6]], "ids": torch.arange(3)})["tokens"] == [[3]]
    # Waveforms of one length are the rows, too, where something else says how many there are.
    equal = second_row({"waveforms": [torch.ones(5)] * 3, "captions": ["a", "b", "c"]})
    assert [tuple(row.shape) for row in equal["waveforms"]] == [(5,)]
    metadata = second_row({"audio": torch.ones(3, 2), "files": [{"name": "a"}, {"name": "b"}, {"name": "c"}]})
    assert metadata["files"] == [{"name": "b"}]


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (
            {"audio": torch.ones(3, 2), "offsets": torch.arange(7)},
            r"batch\['audio'\] has 3, batch\['offsets'\] has 7",
        ),
        (
            {"text": ["a", "b"], "pairs": [torch.ones(3), torch.ones(4), torch.ones(5)]},
            r"batch\['pairs'\] has 3",
        ),
        ((torch.ones(3, 2), ["a", "b"]), r"batch\[0\] has 3, batch\[1\] has 2"),
        ([torch.ones(3, 2), torch.ones(2)], r"batch\[0\] has 3, batch\[1\] has 2"),
        (Clips(torch.ones(3, 2), ["a"]), r"batch.waveform has 3, batch.captions has 1"),
        ({"rate": 16000, "scale": torch.tensor(1.0)}, "no part has any"),
        ({"audio": torch.ones(0, 2)}, r"batch\['audio'\] has 0"),
    ],
)
def test_parts_with_other_numbers_of_rows_are_refused(batch, found):
    with pytest.raises(
        ValueError, match=f"`encode_audio` takes along the first dimension.*{found}.*Give every"
    ):
        num_rows({"batch": batch}, "encode_audio")


def test_other_objects_are_refused():
    class Batch:
        pass

    with pytest.raises(TypeError, match=r"batch\['clips'\] is a Batch. Let the batch be made of tensors"):
        num_rows({"batch": {"audio": torch.ones(2, 2), "clips": Batch()}}, "encode_audio")


def test_tensors_of_a_batch():
    batch = {
        "batch": {"clips": Clips(torch.ones(1), ["a"]), "list": [torch.zeros(1), "a"]},
        "x": torch.ones(2),
    }
    assert [path for path, _ in tensors_of(batch)] == ["batch['clips'].waveform", "batch['list'][0]", "x"]

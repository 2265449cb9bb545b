"""What the knowledge holds of a clip: the unit mean of its rows."""

import numpy as np
import pytest
import torch

from ask_lightning.knowledge import KnowledgeBase
from ask_lightning.knowledge.stored_clips import StoredClips
from ask_lightning.utilities.distributed import Ranks


def rows(count: int = 23, width: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    audio, text = torch.randn(2, count, width, generator=generator)
    ids = torch.randint(-4, 5, (count,), generator=generator)
    return torch.nn.functional.normalize(audio, dim=1), torch.nn.functional.normalize(text, dim=1), ids


def by_hand(side: torch.Tensor, ids: torch.Tensor, wanted: int) -> np.ndarray:
    mean = side[ids == wanted].double().numpy().mean(axis=0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_unit_mean_of_the_rows_of_each_clip(dtype):
    audio, text, ids = rows()
    audio, text = audio.to(dtype), text.to(dtype)
    wanted = ids[[3, 3, 11, 0]]
    found = StoredClips.of_rows(audio, text, ids).find(wanted)
    assert found.known.all()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for side, stored in ((found.audio, audio), (found.text, text)):
        assert side.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = np.stack([by_hand(stored, ids, int(clip)) for clip in wanted])
        np.testing.assert_allclose(side.numpy(), expected, atol=tolerance)


def test_clips_that_are_not_stored():
    audio, text, ids = rows()
    found = StoredClips.of_rows(audio, text, ids).find(torch.tensor([100, int(ids[0]), -100]))
    assert found.known.tolist() == [False, True, False]
    assert not found.audio[[0, 2]].any()
    assert not found.text[[0, 2]].any()


def test_no_rows_at_all():
    empty = StoredClips.of_rows(torch.empty(0, 5), torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
    found = empty.find(torch.tensor([1, 2]))
    assert not found.known.any()
    assert found.audio.shape == (2, 5)


def test_rows_that_cancel_out_have_no_direction():
    audio = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    found = StoredClips.of_rows(audio, audio, torch.tensor([1, 1])).find(torch.tensor([1]))
    assert found.known.all()
    assert found.audio.tolist() == [[0, 0]]


def test_of_a_base():
    audio, text, ids = rows()
    base = KnowledgeBase.from_embeddings(audio, text, ids=ids, num_prototypes=3)
    found = base.find_clips(ids[:4])
    np.testing.assert_allclose(found.text[2].numpy(), by_hand(text, ids, int(ids[2])), atol=1e-6)


def test_one_process_asks_nobody():
    audio, text, ids = rows()
    alone, found = StoredClips.of_rows(audio, text, ids, Ranks()), StoredClips.of_rows(audio, text, ids)
    assert torch.equal(alone.find(ids).audio, found.find(ids).audio)

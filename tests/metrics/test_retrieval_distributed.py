"""Two real processes give exactly what one gives."""

import torch
import torch.distributed as dist

from ask_lightning.metrics import AudioTextRetrieval, QueryBank
from ask_lightning.utilities.clip_ids import integer_ids
from tests.helpers.hubs import hubby_pairs
from tests.helpers.ranks import on_ranks
from tests.helpers.retrieval_reference import noisy_pairs
from tests.helpers.sharded_bases import build, source

# Which rows each of the two processes sees. "padded" deals out 91 rows in turn and repeats the first one, as
# `DistributedSampler` does.
SHARES = {
    "uneven": [range(23), range(23, 91)],
    "one process without rows": [range(91), range(0)],
    "padded": [range(0, 91, 2), [*range(1, 91, 2), 0]],
}


def all_rows():
    # The rows of a clip differ, so that their order could matter; the ids are hashed in each process.
    audio, text, clip_ids = noisy_pairs(num_rows=91, crop_noise=0.3)
    return audio, text, [f"{clip}.wav" for clip in clip_ids.tolist()]


def own_scores() -> dict[str, dict]:
    rank = dist.get_rank()
    audio, text, clip_ids = all_rows()
    results = {}
    for name, shares in SHARES.items():
        metrics = AudioTextRetrieval()
        for rows in (list(shares[rank])[:20], list(shares[rank])[20:]):
            caption_ids = rows if name == "padded" else None
            metrics.update(audio[rows], text[rows], [clip_ids[row] for row in rows], caption_ids)
        results[name] = metrics.compute()
    return results


def test_two_processes_equal_one():
    alone = AudioTextRetrieval()
    alone.update(*all_rows())
    expected = alone.compute()
    for results in on_ranks(2, own_scores):
        for name, scores in results.items():
            assert scores == expected, name


def calibrated_scores(rows: range) -> tuple:
    bank = QueryBank.from_pairs(*hubby_pairs(100, seed=4, hub=3))
    validation, test = AudioTextRetrieval(), AudioTextRetrieval()
    for metric, seed in ((validation, 3), (test, 5)):
        metric.update(*(side[rows] for side in hubby_pairs(seed=seed, hub=3)))
    chosen = validation.choose_calibration(bank)
    test.calibrate(bank, chosen)
    return chosen, validation.compute(), test.compute()


def own_calibrated_scores() -> tuple:
    base = build(50, "five at a time", placement="sharded", index="exact")
    return calibrated_scores(range(dist.get_rank(), 120, 2)), QueryBank.from_knowledge(base)


def test_two_processes_choose_and_calibrate_as_one():
    expected = calibrated_scores(range(120))
    audio, text, ids = source(50, captions=5)
    whole = QueryBank.from_pairs(audio, text, integer_ids(ids))
    for found, bank in on_ranks(2, own_calibrated_scores):
        assert found == expected
        torch.testing.assert_close(bank.audio, whole.audio)
        torch.testing.assert_close(bank.text, whole.text)

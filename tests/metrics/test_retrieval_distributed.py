"""Two real processes give exactly what one gives."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ask_lightning.metrics import AudioTextRetrieval
from tests.helpers.retrieval_reference import noisy_pairs

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


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    audio, text, clip_ids = all_rows()
    results = {}
    for name, shares in SHARES.items():
        metrics = AudioTextRetrieval()
        for rows in (list(shares[rank])[:20], list(shares[rank])[20:]):
            caption_ids = rows if name == "padded" else None
            metrics.update(audio[rows], text[rows], [clip_ids[row] for row in rows], caption_ids)
        results[name] = metrics.compute()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    alone = AudioTextRetrieval()
    alone.update(*all_rows())
    expected = alone.compute()
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        for name, scores in torch.load(tmp_path / f"{rank}.pt").items():
            assert scores == expected, name

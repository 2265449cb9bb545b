"""What has to be the same in every process, whatever its hash seed and random state."""

import hashlib
import os
import subprocess
import sys

import torch

from ask_lightning.data import Soundscapes, split_by_clip
from ask_lightning.models import TinyRetriever


def fingerprint() -> str:
    digest = hashlib.blake2b()
    for item in Soundscapes(5, seconds=1, captions_per_clip=2):
        digest.update(item["waveform"].numpy().tobytes() + item["caption"].encode())
    digest.update(str(split_by_clip([f"clip {index}" for index in range(20)], (0.5, 0.5))).encode())
    torch.manual_seed(0)
    model = TinyRetriever(width=8).eval()
    with torch.no_grad():
        digest.update(model.encode_text({"caption": ["rain, then wind"]}).numpy().tobytes())
    return digest.hexdigest()


def test_another_process_makes_the_same_bytes():
    other = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == fingerprint()


if __name__ == "__main__":
    torch.rand(3)
    print(fingerprint())

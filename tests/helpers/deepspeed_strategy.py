"""DeepSpeed on a CPU, of which Lightning knows nothing."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

HAS_DEEPSPEED = find_spec("deepspeed") is not None


class DeepSpeedAnywhere(DeepSpeedStrategy):
    """Lightning asks for CUDA devices, while DeepSpeed has an accelerator for the CPU."""

    def __init__(self, **settings) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        super().__init__(**settings)

    def setup_environment(self) -> None:
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled now; gloo does without
        # Lightning tells DeepSpeed the rank on this machine by the number of a device.
        self.parallel_devices = [torch.device("cpu", number) for number in range(len(self.parallel_devices))]
        DDPStrategy.setup_environment(self)

"""A refresh callback that checks that nothing but the base changes."""

import random
import signal

import numpy as np
import torch

from ask_lightning import KnowledgeRefreshCallback


def streams() -> tuple:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), (name, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


class Spied(KnowledgeRefreshCallback):
    """Compares the world before and after each refresh."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **({"num_prototypes": 6} | settings))
        self.refreshed_at: list[tuple[int, int]] = []

    def refresh(self, trainer, pl_module):
        before = self.world(trainer, pl_module)
        try:
            super().refresh(trainer, pl_module)
            self.refreshed_at.append((trainer.current_epoch, trainer.global_step))
        finally:
            assert self.world(trainer, pl_module) == before

    def world(self, trainer, pl_module):
        modes = {name: part.training for name, part in pl_module.named_modules()}
        buffers = {name: buffer.sum().item() for name, buffer in pl_module.named_buffers()}
        logs = [vars(part).get("log") for part in pl_module.modules()]
        stage = trainer.state.stage, trainer.state.fn, pl_module._current_fx_name
        return (
            streams(),
            modes,
            buffers,
            stage,
            logs,
            torch.is_grad_enabled(),
            signal.getsignal(signal.SIGINT),
        )

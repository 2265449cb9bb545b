"""What a refresh tells about the knowledge."""

import torch

from ask_lightning.callbacks.refresh_report import knowledge_drift


class ManyPairs:
    """Pairs, and a base of them, that only remember which of them are asked for."""

    device = torch.device("cpu")
    local = None

    @property
    def fine(self):
        return self

    def __len__(self):
        return 2**24 + 12

    def drift_from(self, stored, rows):
        self.asked = rows
        return torch.zeros(2)


def test_rows_that_the_drift_is_measured_at_exist_however_many_there_are():
    base = ManyPairs()
    knowledge_drift(base, base)
    assert base.asked[0] == 0
    assert base.asked[-1] == len(base) - 1, "and not one behind, to which float32 rounds"

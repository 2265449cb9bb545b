"""`QueryTable` over knowledge that is stored in half precision."""

import csv

import lightning.pytorch as pl
import pytest

from ask_lightning.callbacks import QueryTable
from tests.helpers.clients import PlainTowers, held_out, make_loader, make_refresh, make_trainer, wrap


class Validated(PlainTowers):
    def validation_step(self, batch, batch_idx):
        self.encode_audio(batch)


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_potentials_are_those_of_float32_storage(tmp_path, storage):
    tables = []
    for kind in ("float32", storage):
        pl.seed_everything(0, verbose=False)
        callbacks = [
            make_refresh(storage=kind),
            QueryTable(num_queries=3, audio="encode_audio", text="encode_text"),
        ]
        run = make_trainer(max_epochs=1, callbacks=callbacks, default_root_dir=tmp_path / kind)
        run.fit(wrap(Validated()), make_loader(), held_out())
        (path,) = (tmp_path / kind).glob("**/queries-epoch-0.csv")
        tables.append([float(row["psi_fine"]) for row in csv.DictReader(path.open(newline=""))])
    assert tables[1] == pytest.approx(tables[0], abs=0.05)

"""The table of queries: it holds what the loss computes, and says what it lacks."""

import lightning as L
import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from ask_lightning import KnowledgeRefreshCallback
from ask_lightning.callbacks import QueryTable
from tests.helpers.clients import PlainTowers, held_out, make_loader, make_refresh, make_trainer, wrap
from tests.helpers.command_line import ASK, ask_lightning, csv_rows, log_folder


def test_a_table_for_the_first_and_the_last_epoch_and_each_clip_as_a_sound(trained):
    folder = log_folder(trained)
    assert {path.name for path in folder.glob("queries-*.csv")} == {
        "queries-epoch-0.csv",
        "queries-epoch-1.csv",
    }
    assert {path.name for path in folder.glob("query-*.wav")} == {
        f"query-{number}.wav" for number in range(6)
    }


def test_a_table_of_queries_holds_what_the_loss_computes(demo):
    cli = ask_lightning(
        "fit", "--config", ASK, demo, "--run", "run", "--data.num_workers", 0, "--trainer.max_epochs", 1
    )
    table = csv_rows(log_folder("run") / "queries-epoch-0.csv")
    data, model, loss = cli.datamodule, cli.model.model.eval(), cli.model.loss
    items = torch.linspace(0, 29, 6).long().tolist()
    pairs = [data.datasets["val"][row] for row in items]
    batch = {
        "waveform": torch.stack([pair["waveform"] for pair in pairs]),
        "num_samples": torch.tensor([pair["num_samples"] for pair in pairs]),
        "caption": [pair["caption"] for pair in pairs],
    }
    with torch.no_grad():
        audio, text = model.encode_audio(batch), model.encode_text(batch)
        near = loss.retrieve(audio, text, loss.knowledge)
        _, terms = loss.from_neighborhoods(audio, text, near)
    source = data.knowledge_dataset()
    for number, row in enumerate(table):
        query, direction = number // 2, ("t2a", "a2t")[number % 2]
        assert row["query"] == batch["caption"][query]
        assert row["direction"] == direction.upper()
        psi = {name: terms[f"psi_{name}_{direction}"][query].item() for name in ("fine", "coarse")}
        for name, value in psi.items():
            assert float(row[f"psi_{name}"]) == pytest.approx(value, abs=2e-4)
        factor = 1 - 0.2 * np.log(psi["fine"]) - 0.3 * np.log(psi["coarse"])
        assert float(row["factor"]) == pytest.approx(factor, abs=2e-4)
        nearest = (loss.knowledge.fine.text @ text[query]).argsort(descending=True)[:3].tolist()
        assert row["retrieved by text"] == " · ".join(source[found]["caption"] for found in nearest)
        assert 1 / np.e <= float(row["psi_fine of noise"]) <= np.e


def test_what_is_missing_is_said(demo):
    with pytest.warns(UserWarning, match="there are no validation data with an index"):
        ask_lightning(
            "fit",
            "--config",
            ASK,
            demo,
            "--run",
            "run",
            "--trainer.limit_val_batches",
            0,
            "--trainer.max_epochs",
            1,
        )
    trainer = L.Trainer(logger=False)
    with pytest.raises(
        RuntimeError, match="QueryTable needs the knowledge of a KnowledgeRefreshCallback, but"
    ):
        QueryTable().setup(trainer, L.LightningModule(), "fit")
    trainer.callbacks.append(KnowledgeRefreshCallback())
    with pytest.raises(ValueError, match="Argument `audio` of QueryTable has to name a method of Lightning"):
        QueryTable(audio="listen").setup(trainer, L.LightningModule(), "fit")


@pytest.mark.parametrize("options", [{"every_n_epochs": 0}, {"num_queries": 0}, {"num_shown": 0}])
def test_arguments_out_of_range(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"Argument `{name}` has to be an integer of at least"):
        QueryTable(**options)


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
        tables.append([float(row["psi_fine"]) for row in csv_rows(path)])
    assert tables[1] == pytest.approx(tables[0], abs=0.05)

"""The map of drift: its files, what it needs, and its projection."""

import sys
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from ask_lightning.callbacks import DriftMap
from ask_lightning.callbacks.drift_map import project_to_plane
from ask_lightning.data import FolderData, write_recordings
from ask_lightning.models import TinyRetriever
from tests.helpers.command_line import BASELINE, ask_lightning, csv_rows, log_folder, refusal


def test_the_table_has_a_row_for_each_epoch_modality_and_caption(trained):
    table = csv_rows(log_folder(trained) / "drift_map.csv")
    assert len(table) == 2 * 2 * 30
    assert {(row["epoch"], row["modality"]) for row in table} == {
        (epoch, modality) for epoch in "01" for modality in ("audio", "text")
    }


def test_without_matplotlib_there_is_the_table(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match=r"writes its table only; pictures need: pip install"):
        ask_lightning("fit", "--config", BASELINE, demo, "--run", "run")
    assert (log_folder("run") / "drift_map.csv").exists()
    assert not (log_folder("run") / "drift_map.png").exists()


def test_a_name_that_is_no_method_is_refused(demo, capsys):
    Path("mine.yaml").write_text(
        f"compose: [{BASELINE}]\ntrainer: {{callbacks+: [{{class_path: ask_lightning.callbacks.DriftMap, "
        "init_args: {audio: listen}}]}\n"
    )
    message = refusal(capsys, "fit", "--config", "mine.yaml", demo)
    assert message.startswith("Argument `audio` of DriftMap has to name a method of ")


@pytest.mark.parametrize("options", [{"every_n_epochs": 0}, {"num_clips": 1}])
def test_arguments_out_of_range(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"Argument `{name}` has to be an integer of at least"):
        DriftMap(**options)


def test_the_map_keeps_as_much_of_the_distances_as_a_plane_can():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    turned, _ = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64))
    places = project_to_plane(flat @ turned[:2] + 3)
    torch.testing.assert_close(
        torch.cdist(places.double(), places.double()), torch.cdist(flat, flat), atol=1e-4, rtol=0
    )
    rows = torch.randn(30, 6, generator=generator)
    centred = (rows - rows.mean(0)).numpy()
    singular = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(project_to_plane(rows).norm(dim=0).numpy(), singular[:2], rtol=1e-4)
    torch.testing.assert_close(project_to_plane(rows), project_to_plane(rows.clone()))
    assert project_to_plane(torch.randn(5, 1)).shape == (5, 2)


def test_a_run_that_goes_on_with_other_validation_pairs_begins_a_new_map(tmp_path):
    folder = write_recordings(tmp_path / "sounds", num_clips=21, seconds=0.5)
    header, *rows = (folder / "clips.csv").read_text().splitlines()

    def map_of(validation, epochs, checkpoint=None):
        (folder / "clips.csv").write_text(
            "\n".join(
                [f"{header},split", *(f"{row},train" for row in rows[:12])]
                + [f"{rows[n]},val" for n in validation]
            )
        )
        drift_map = DriftMap(every_n_epochs=1)
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            callbacks=[drift_map],
        )
        model = TinyRetriever(width=8, masked_share=0)
        trainer.fit(model, datamodule=FolderData(folder, batch_size=4), ckpt_path=checkpoint)
        trainer.save_checkpoint("last.ckpt")
        return list(drift_map.state_dict()["epochs"])

    assert map_of([12, 13, 14], 2) == [0, 1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*begins a new map")
        assert map_of([12, 13, 14], 3, "last.ckpt") == [0, 1, 2]
    for validation, epochs in (([15, 16, 17], 4), ([15, 16, 17, 18, 19, 20], 5)):
        with pytest.warns(UserWarning, match=r"validation pairs, .* are others .* DriftMap begins a new map"):
            assert map_of(validation, epochs, "last.ckpt") == [epochs - 1]

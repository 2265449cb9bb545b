"""A LightningCLI of the user's own with the wrapper in its config, as the guide has it."""

import inspect

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from ask_lightning import ASKModule, KnowledgeDistillationLoss
from tests.helpers.clients import PlainTowers, make_loader

pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse")
pytestmark = pytest.mark.skipif(
    "load_from_checkpoint_support" not in inspect.signature(LightningCLI.__init__).parameters,
    reason="this Lightning does not take the arguments of a model from its checkpoint",
)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return make_loader()


class CLI(LightningCLI):
    def _parse_ckpt_path(self):
        """A checkpoint has the hyper-parameters of the wrapped model, and the config those of both."""


def run(folder, *, is_subclass: bool, **options) -> CLI:
    wrapped = {
        "model": {"class_path": "tests.helpers.clients.PlainTowers", "init_args": {"learning_rate": 0.02}},
        "loss": {
            "class_path": "ask_lightning.KnowledgeDistillationLoss",
            "init_args": {"temperature": 0.15},
        },
        "ids": "clip_id",
    }
    refresh = {"class_path": "ask_lightning.KnowledgeRefreshCallback", "init_args": {"T": 1}}
    checkpoints = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(folder), "save_last": True}}
    trainer = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    config = {
        "model": {"class_path": "ask_lightning.ASKModule", "init_args": wrapped} if is_subclass else wrapped,
        "trainer": {**trainer, "callbacks": [refresh, checkpoints]},
    }
    (folder / "config.yaml").write_text(yaml.dump(config))
    flags = [f"--{name}={value}" for name, value in options.items()]
    return CLI(
        pl.LightningModule if is_subclass else ASKModule,
        Data,
        args=["fit", f"--config={folder / 'config.yaml'}", *flags],
        subclass_mode_model=is_subclass,
        load_from_checkpoint_support=False,
        save_config_callback=None,
    )


@pytest.mark.parametrize("is_subclass", [False, True])
def test_trains_resumes_and_loads_in_the_models_class(is_subclass, tmp_path):
    first = run(tmp_path, is_subclass=is_subclass, **{"trainer.max_epochs": 2})
    assert isinstance(first.model, ASKModule)
    assert isinstance(first.model.loss, KnowledgeDistillationLoss)
    loaded = PlainTowers.load_from_checkpoint(tmp_path / "last.ckpt")
    assert dict(loaded.hparams) == {"learning_rate": 0.02}
    assert torch.equal(loaded.audio_encoder.weight, first.model.model.audio_encoder.weight)
    resumed = run(
        tmp_path,
        is_subclass=is_subclass,
        **{"trainer.max_epochs": 3, "ckpt_path": str(tmp_path / "last.ckpt")},
    )
    assert resumed.trainer.global_step == first.trainer.global_step * 3 // 2

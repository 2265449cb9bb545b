"""What the page on the command line promises for configs, models and data of one's own."""

import os
import re
import sys
import warnings
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import EarlyStopping

from ask_lightning import ASKModule, InfluenceMonitor, KnowledgeRefreshCallback
from ask_lightning.cli.retrieval_cli import RetrievalCLI
from ask_lightning.data.clips import Clip
from ask_lightning.models import CLAPRetriever, TinyRetriever
from tests.helpers.command_line import ASK, Numbers, Towers, ask_lightning, refusal

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_config_of_the_page(demo):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    Path("mine.yaml").write_text(
        text.replace("/fast/disk", "fast").replace("num_neighbors: 20", "num_neighbors: 6")
    )
    cli = ask_lightning("fit", "--config", "mine.yaml", demo, "--data.batch_size", 12)
    assert [one for one in cli.trainer.callbacks if isinstance(one, EarlyStopping)]
    (refresh,) = [one for one in cli.trainer.callbacks if isinstance(one, KnowledgeRefreshCallback)]
    assert (cli.model.loss.num_neighbors, cli.model.loss.injection_ratio) == (6, 0.2)
    assert refresh.T == 1, "the demo comes last"
    assert cli.trainer.num_training_batches == 2
    assert Path("fast").is_dir()
    assert Path("runs/demo-mine/checkpoints/best.ckpt").exists()


def test_every_file_and_flag_of_the_page_exists(demo, capsys):
    text = PAGE.read_text()
    configs = set(re.findall(r"--config (\w+)(?![.\w/])", text)) - {"NAME"}
    from ask_lightning.cli.compose import shipped_configs, shipped_parts

    assert configs <= {*shipped_configs(), *shipped_parts()}
    with pytest.raises(SystemExit) as stopped:
        ask_lightning("fit", "--config", ASK, "--print_config")
    assert stopped.value.code == 0


def test_clap_is_a_part_too(demo):
    Path("mine.yaml").write_text("compose: [run, clotho, clap, ask]\n")
    cli = ask_lightning("fit", "--config", "mine.yaml", demo, "--run", "run", "--trainer.max_epochs", 1)
    assert type(cli.model.model) is CLAPRetriever
    ask_lightning("test", "--config", "mine.yaml", demo, "--run", "run", "--ckpt_path", "best")


def test_ask_null_is_the_baseline(demo):
    Path("mine.yaml").write_text(f"compose: [{ASK}]\nask: null\n")
    cli = ask_lightning("fit", "--config", "mine.yaml", demo, "--trainer.max_epochs", 1)
    assert not isinstance(cli.model, ASKModule)
    given = ("--config", ASK, demo, "--run", "flag", "--trainer.max_epochs", 1)
    cli = ask_lightning("fit", *given, "--ask.enabled", "false")
    assert not isinstance(cli.model, ASKModule)


def test_a_model_and_data_of_ones_own():
    Path("mine.yaml").write_text(
        "compose: [ask]\n"
        "model: {class_path: tests.helpers.command_line.Towers, init_args: {width: 6}}\n"
        "data: {class_path: tests.helpers.command_line.Numbers}\n"
        "ask: {audio: listen, text: read, refresh: {T: 1, num_prototypes: 12}}\n"
        "trainer: {max_epochs: 2, accelerator: cpu, default_root_dir: '{run}'}\n"
    )
    cli = ask_lightning("fit", "--config", "mine.yaml", "--run", "run", "--ask.monitors", "false")
    assert type(cli.model.model) is Towers
    assert cli.model.loss.knowledge.fine.audio.shape == (24, 6)
    assert not [one for one in cli.trainer.callbacks if isinstance(one, InfluenceMonitor)]


def test_a_small_model_on_soundscapes():
    Path("mine.yaml").write_text(
        "compose: [run, ask]\n"
        "model: {class_path: TinyRetriever}\n"
        "data: {class_path: SoundscapeData, init_args: {num_train: 32, num_val: 8, num_test: 8, seconds: 1, "
        "batch_size: 16}}\n"
        "ask: {refresh: {num_prototypes: 12}}\n"
        "trainer: {max_epochs: 1, accelerator: cpu, log_every_n_steps: 1}\n"
    )
    cli = ask_lightning("fit", "--config", "mine.yaml", "--run", "run")
    assert type(cli.model.model) is TinyRetriever
    ask_lightning(
        "encode", "--config", "mine.yaml", "--run", "run", "--ckpt_path", "best", "--split", "train"
    )
    hits = ask_lightning("search", "run/encoded-train.safetensors", "--text", "rain", "--top", 2)
    assert len(hits) == 2


def test_testing_without_a_checkpoint_is_said(demo):
    with pytest.warns(
        UserWarning, match="There is no --ckpt_path: `test` uses the model as the config builds it"
    ):
        ask_lightning("test", "--config", ASK, demo)


def test_encoding_a_model_with_other_methods(capsys):
    Path("mine.yaml").write_text(
        "model: {class_path: tests.helpers.command_line.Towers}\n"
        "data: {class_path: SoundscapeData, init_args: {num_train: 4, num_val: 4, num_test: 4, seconds: 1}}\n"
        "trainer: {accelerator: cpu, logger: false}\n"
    )
    message = refusal(capsys, "encode", "--config", "mine.yaml", "--output", "a.safetensors")
    assert message == (
        "Towers has no methods to encode with. Add `encode_audio(batch)` and `encode_text(batch)`."
    )


def test_data_of_ones_own_are_not_checked_for_the_clips_of_a_target():
    cli = object.__new__(RetrievalCLI)
    cli._held_out = [Clip("freesound:1", ("rain",), "1")]
    cli.datamodule = Numbers()
    cli.model = ASKModule(Towers(), audio="listen", text="read")
    with pytest.warns(
        UserWarning, match="Numbers is no PublishedDataModule: nobody checks whether its knowledge"
    ):
        cli.before_fit()
    cli.model = Towers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cli.before_fit()


OWN = """
compose: [run]
model: {class_path: own_module.Quiet}
data: {class_path: SoundscapeData, init_args: {num_train: 8, num_val: 4, num_test: 4, batch_size: 4}}
trainer: {accelerator: cpu, max_epochs: 1}
"""


def test_a_module_of_the_current_folder_and_a_monitor_that_nobody_logs(capsys, monkeypatch):
    """As in the command, whose own folder is that of its script, and not the current one."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    Path("own_module.py").write_text(
        "from ask_lightning.models import TinyRetriever\n"
        "class Quiet(TinyRetriever):\n"
        "    def validation_step(self, batch, batch_idx):\n"
        "        self.log('val/other', 1.0, batch_size=4)\n"
        "    def on_validation_epoch_end(self):\n"
        "        pass\n"
    )
    Path("mine.yaml").write_text(OWN)
    message = refusal(capsys, "fit", "--config", "mine.yaml", "--run", "run")
    assert message.startswith("ModelCheckpoint goes by 'val/mean_recall', but validation logs val/other. Log")
    assert not list(Path("run").rglob("*.ckpt"))
    given = ("--config", "mine.yaml", "--run", "two", "--trainer.limit_val_batches", 0)
    with pytest.warns(
        UserWarning, match="no validation, so ModelCheckpoint finds no best epoch by 'val/mean"
    ):
        ask_lightning("fit", *given)
    assert [path.name for path in Path("two/checkpoints").iterdir()] == ["last.ckpt"]


NO_ARGUMENTS = """
import lightning.pytorch as pl
import torch
from ask_lightning.metrics import AudioTextRetrieval

class Listener(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.audio = torch.nn.Linear(1, 4)
        self.metric = AudioTextRetrieval()

    def listen(self, batch):
        return self.audio(batch["waveform"][:, :1])

    def read(self, batch):
        return self.audio(torch.tensor([[float(len(text))] for text in batch["caption"]]))

    def training_step(self, batch, batch_idx):
        return (self.listen(batch) - self.read(batch)).square().mean()

    def test_step(self, batch, batch_idx):
        self.metric.update(self.listen(batch), self.read(batch), batch["clip_id"])

    def on_test_epoch_end(self):
        self.log_dict({f"test/{name}": value for name, value in self.metric.compute().items()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


def test_a_model_without_arguments_whose_methods_have_other_names(monkeypatch):
    """It is tested by cosine alone: what calibrates the search is encoded by methods of the usual names."""
    monkeypatch.syspath_prepend(os.getcwd())
    Path("listener.py").write_text(NO_ARGUMENTS)
    Path("mine.yaml").write_text(
        OWN.replace("own_module.Quiet", "listener.Listener")
        + "ask: {enabled: true, audio: listen, text: read, loss: {class_path: NTXentLoss}}\n"
    )
    given = ("--config", "mine.yaml", "--run", "run")
    ask_lightning("fit", *given)
    cli = ask_lightning("test", *given, "--ckpt_path", "last")
    assert "test/t2a/recall_at_1" in cli.trainer.callback_metrics
    assert cli.trainer.calibration is None

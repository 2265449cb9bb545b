"""Encoders that are frozen, unfrozen later, or trained by low-rank updates (LoRA)."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import nn

from ask_lightning import ASKModule
from tests.helpers.clients import (
    AUDIO,
    WIDTH,
    PlainTowers,
    Watcher,
    assert_same_weights,
    make_loader,
    make_refresh,
    make_trainer,
    wrap,
)
from tests.helpers.ranks import on_ranks

STEPS = 6


class DeepTowers(PlainTowers):
    """With dropout and running means, which a frozen encoder must not feel."""

    def __init__(self, learning_rate: float = 1e-2) -> None:
        super().__init__(learning_rate)
        self.audio_encoder = nn.Sequential(
            nn.Linear(AUDIO, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Dropout(0.3), nn.Linear(9, WIDTH)
        )

    def configure_optimizers(self):
        return torch.optim.Adam([one for one in self.parameters() if one.requires_grad], lr=1e-2)


class FrozenTowers(DeepTowers):
    """Frozen by hand."""

    def __init__(self, learning_rate: float = 1e-2) -> None:
        super().__init__(learning_rate)
        self.audio_encoder.requires_grad_(False).eval()


class Unfreeze(BaseFinetuning):
    """Lightning's way: the audio encoder learns from the second epoch on."""

    def freeze_before_training(self, pl_module) -> None:
        self.freeze(pl_module.audio_encoder, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.audio_encoder, optimizer, lr=1e-2)


def fit(model: pl.LightningModule, *extra: pl.Callback, epochs: int = 4, folder=None, resume=None) -> Watcher:
    pl.seed_everything(3, verbose=False)
    watcher, keep = Watcher(), [ModelCheckpoint(folder, save_last=True)] if folder else []
    callbacks = [make_refresh(2), watcher, *extra, *keep]
    run = make_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=bool(keep))
    run.fit(wrap(model), make_loader(), ckpt_path=resume)
    return watcher


def seeded(kind: type[pl.LightningModule]) -> pl.LightningModule:
    pl.seed_everything(1, verbose=False)
    return kind()


def test_a_frozen_encoder(recwarn):
    model = seeded(FrozenTowers)
    before = copy.deepcopy(model)
    watcher = fit(model)
    assert_same_weights(model.audio_encoder, before.audio_encoder)
    assert not torch.equal(model.text_encoder.weight, before.text_encoder.weight)
    assert len(set(watcher.knowledge)) == 2
    assert not any(part.training for part in model.audio_encoder.modules())
    assert not [str(one.message) for one in recwarn if "got no gradient" in str(one.message)]


def test_unfrozen_in_training(tmp_path):
    model = seeded(DeepTowers)
    before = copy.deepcopy(model)
    rates = fit(model, Unfreeze(), epochs=1).rates
    assert_same_weights(model.audio_encoder, before.audio_encoder)
    assert all(len(groups) == 1 for groups in rates)
    model = seeded(DeepTowers)
    complete = fit(model, Unfreeze())
    assert [len(groups) for groups in complete.rates] == STEPS * [1] + 3 * STEPS * [2]
    assert not torch.equal(model.audio_encoder[0].weight, before.audio_encoder[0].weight)
    fit(seeded(DeepTowers), Unfreeze(), epochs=3, folder=tmp_path)
    resumed = fit(seeded(DeepTowers), Unfreeze(), resume=tmp_path / "last.ckpt")
    assert resumed.knowledge == complete.knowledge[3 * STEPS :]
    assert len(resumed.losses) == STEPS
    assert [len(groups) for groups in resumed.rates] == STEPS * [2]


class UnfreezeAgain(Unfreeze):
    """As the guide has it for runs that resume behind the unfreezing."""

    def on_train_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch > 1:
            self.make_trainable(pl_module.audio_encoder)


def test_unfrozen_again_where_a_run_resumes_behind_it(tmp_path):
    def towers():
        model = seeded(DeepTowers)
        model.audio_encoder[3] = nn.Identity()  # so that a resumed run is the same
        return model

    complete = fit(towers(), UnfreezeAgain())
    fit(towers(), UnfreezeAgain(), epochs=2, folder=tmp_path)
    resumed = fit(towers(), UnfreezeAgain(), resume=tmp_path / "last.ckpt")
    assert resumed.losses == complete.losses[2 * STEPS :]


class UnfreezeUnderDDP(pl.Callback):
    """As the guide has it for several processes; it notes the weights at the end of each epoch."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        pl_module.audio_encoder.requires_grad_(trainer.current_epoch >= 1)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.weights.append(pl_module.audio_encoder.weight.detach().clone())


def unfreeze_on_ranks() -> tuple[list[torch.Tensor], str]:
    """The weights of the guide's way, and the error of Lightning's."""
    settings = {"devices": 2, "strategy": "ddp_find_unused_parameters_true", "max_epochs": 3}
    callback = UnfreezeUnderDDP()
    make_trainer(callbacks=[make_refresh(1), callback], **settings).fit(
        wrap(seeded(PlainTowers)), make_loader()
    )
    run = make_trainer(callbacks=[make_refresh(1), Unfreeze()], **settings)
    with pytest.raises(RuntimeError) as error:
        run.fit(wrap(seeded(PlainTowers)), make_loader())
    return callback.weights, str(error.value)


def test_unfrozen_under_ddp():
    (weights, error), (others, _) = on_ranks(2, unfreeze_on_ranks, grouped=False)
    torch.testing.assert_close(weights, others, rtol=0, atol=0)
    assert torch.equal(weights[0], seeded(PlainTowers).audio_encoder.weight)
    assert not torch.equal(weights[0], weights[1])
    assert "nothing was unfrozen which was frozen when DDP began" in error


def low_rank_towers() -> pl.LightningModule:
    """Both encoders have updates of rank 2; the norm is trained as well."""
    peft = pytest.importorskip("peft")

    class LowRankTowers(DeepTowers):
        def __init__(self, learning_rate: float = 1e-2) -> None:
            super().__init__(learning_rate)
            self.audio_encoder[3] = nn.Identity()  # so that a resumed run is the same
            of_audio = peft.LoraConfig(r=2, target_modules=["0", "4"], modules_to_save=["1"])
            self.audio_encoder = peft.get_peft_model(self.audio_encoder, of_audio)
            text = nn.Sequential(self.text_encoder)
            self.text_encoder = peft.get_peft_model(text, peft.LoraConfig(r=2, target_modules=["0"]))

    return seeded(LowRankTowers)


def base_weights(model: pl.LightningModule) -> dict:
    return {name: value for name, value in model.named_parameters() if not value.requires_grad}


def test_low_rank_updates_train_and_resume(tmp_path, recwarn):
    model = low_rank_towers()
    before = copy.deepcopy(model)
    complete = fit(model)
    assert complete.losses[-1] < complete.losses[0]
    assert len(set(complete.knowledge)) == 2
    assert all(torch.equal(value, base_weights(before)[name]) for name, value in base_weights(model).items())
    learned = [name for name, value in model.named_parameters() if value.requires_grad]
    assert any("lora_A" in name for name in learned)
    assert any("modules_to_save" in name for name in learned)
    assert not [str(one.message) for one in recwarn if "got no gradient" in str(one.message)]
    fit(low_rank_towers(), epochs=3, folder=tmp_path)
    again = low_rank_towers()
    resumed = fit(again, resume=tmp_path / "last.ckpt")
    assert resumed.losses == complete.losses[3 * STEPS :]
    assert resumed.knowledge == complete.knowledge[3 * STEPS :]
    assert_same_weights(again, model)
    wrapped = ASKModule.load_from_checkpoint(tmp_path / "last.ckpt", low_rank_towers())
    assert wrapped.model.text_encoder.peft_config["default"].r == 2


def test_low_rank_updates_are_merged():
    model = low_rank_towers()
    fit(model, epochs=1)
    model.eval()
    batch = next(iter(make_loader()))
    with torch.no_grad():
        expected = model.encode_audio(batch), model.encode_text(batch)
        plain = DeepTowers()
        plain.audio_encoder[3] = nn.Identity()
        plain.audio_encoder.load_state_dict(model.audio_encoder.merge_and_unload().state_dict())
        plain.text_encoder.load_state_dict(model.text_encoder.merge_and_unload()[0].state_dict())
        plain.eval()
        found = plain.encode_audio(batch), plain.encode_text(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

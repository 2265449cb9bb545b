"""What the step makes of the batch, or of the embeddings, that a refresh does not know of."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ask_lightning import ASKModule
from ask_lightning.losses import MomentumContrastLoss, NTXentLoss
from tests.helpers.clients import (
    AUDIO,
    WIDTH,
    CriterionClient,
    PlainTowers,
    make_loader,
    make_refresh,
    make_trainer,
    wrap,
)
from tests.module.test_capture import PartsClient, PartsPairs

OTHER_BATCH = (
    r"training_step` calls `encode_audio` with .*, which is not the batch as it was given.*step=\"encode\""
)
OTHER_EMBEDDINGS = (
    r"`CriterionStep.training_step` calls `self.loss_fn` with other embeddings than `encode_audio`"
)


class Client(PlainTowers):
    """Does something to its batch before it is encoded."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def encode_audio(self, batch, scale=1.0):
        return self.audio_encoder(batch["audio"] * scale)

    def training_step(self, batch, batch_idx):
        batch, options = self.change(batch)
        return self.contrast(self.encode_audio(batch, **options), self.encode_text(batch))


def in_a_copy(batch):
    return {**batch, "audio": batch["audio"] - 5}, {}


def in_the_batch(batch):
    batch["audio"] = batch["audio"] - 5
    return batch, {}


def in_the_tensor(batch):
    batch["audio"].sub_(5)
    return batch, {}


def by_an_option(batch):
    return batch, {"scale": 2.0}


def as_a_copy(batch):
    return dict(batch), {}


def with_a_further_part(batch):
    batch["step"] = 3
    return batch, {}


def fit(module, loader=None, **settings):
    """The warnings of a run of one epoch."""
    needs_knowledge = module.loss.needs_knowledge
    run = make_trainer(max_epochs=1, callbacks=[make_refresh(1)] if needs_knowledge else [], **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, loader or make_loader())
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("change", [in_a_copy, in_the_batch, in_the_tensor, by_an_option])
def test_a_step_that_changes_its_batch_is_told(change):
    assert len([text for text in fit(wrap(Client(change))) if re.search(OTHER_BATCH, text)]) == 1


def test_keys_are_of_the_batch_as_well():
    module = ASKModule(Client(in_a_copy), MomentumContrastLoss(queue_size=16), ids="clip_id")
    assert [text for text in fit(module) if re.search(OTHER_BATCH, text)]


@pytest.mark.parametrize("change", [as_a_copy, with_a_further_part])
def test_a_step_that_changes_nothing_is_not(change):
    assert not [text for text in fit(wrap(Client(change))) if "as it was given" in text]


def test_nor_is_one_whose_loss_encodes_nothing_else():
    assert not [text for text in fit(ASKModule(Client(in_a_copy), NTXentLoss())) if "as it was given" in text]


def test_with_chunks_and_in_a_compiled_module():
    chunked = wrap(Client(in_a_copy), chunk_size=3)
    compiled = torch.compile(wrap(Client(in_a_copy)), backend="eager")
    for module in (chunked, compiled):
        assert [text for text in fit(module) if "not the batch as it was given" in text]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_part_that_the_step_has_replaced_is_no_part_of_the_batch(in_place):
    """It was taken for one, and the refresh encoded what the batch had there before."""

    class Changing(PartsClient):
        def training_step(self, batch, batch_idx):
            if in_place:
                batch["audio"].mul_(2)
            else:
                batch["audio"] = batch["audio"] * 2
            return super().training_step(batch, batch_idx)

    with pytest.raises(
        TypeError, match=r"calls `encode_audio` with tensor \(8, 12\), which is no part of the"
    ):
        fit(wrap(Changing()), DataLoader(PartsPairs(), 8))


class CriterionStep(CriterionClient):
    def __init__(self, between=None, *, exchanged=False):
        super().__init__()
        self.between = between or nn.Identity()
        self.exchanged = exchanged

    def training_step(self, batch, batch_idx):
        sides = [3 * self.between(side) for side in (self.encode_audio(batch), self.encode_text(batch))]
        return self.loss_fn(*(reversed(sides) if self.exchanged else sides))


def test_embeddings_that_pass_through_further_layers_are_told():
    module = wrap(CriterionStep(nn.Linear(WIDTH, WIDTH)), criterion="loss_fn")
    assert [text for text in fit(module) if re.search(OTHER_EMBEDDINGS, text)]


@pytest.mark.parametrize("loss", [None, NTXentLoss()])  # the default needs knowledge, the other does not
def test_text_before_audio_is_refused(loss):
    with pytest.raises(RuntimeError, match=r"what `encode_text` returned first.*Exchange the two arguments"):
        fit(ASKModule(CriterionStep(exchanged=True), loss, criterion="loss_fn"))


def test_further_layers_are_of_no_concern_without_knowledge():
    module = ASKModule(CriterionStep(nn.Linear(WIDTH, WIDTH)), NTXentLoss(), criterion="loss_fn")
    assert not [text for text in fit(module) if "other embeddings" in text or "as it was given" in text]


class NegativesStep(PartsClient):
    """Encodes other texts of its batch as well, for a loss beside the contrast."""

    def __init__(self, *, negatives_first):
        super().__init__()
        self.negatives_first = negatives_first

    def training_step(self, batch, batch_idx):
        parts = ["tokens", "others"]
        texts = {
            part: self.encode_text(batch[part], scale=2.0)
            for part in (reversed(parts) if self.negatives_first else parts)
        }
        audio = self.encode_audio(batch["audio"])
        return self.contrast(audio, texts["tokens"]) + texts["others"].square().mean()


class WithNegatives(PartsPairs):
    def __getitem__(self, row):
        return super().__getitem__(row) | {"others": super().__getitem__((row + 1) % len(self))["tokens"]}


@pytest.mark.parametrize("negatives_first", [True, False])
def test_knowledge_of_what_the_first_of_several_calls_gets_is_told(negatives_first):
    module = wrap(NegativesStep(negatives_first=negatives_first), criterion="contrast")
    caught = fit(module, DataLoader(WithNegatives(), 8))
    told = [text for text in caught if re.search(r"first call of `encode_text`.*Call it first with", text)]
    assert len(told) == negatives_first
    assert not [text for text in caught if "other embeddings" in text]


class TogetherStep(CriterionStep):
    """Encodes both sides by one call, after dropout and batch norm."""

    def __init__(self, between=None, *, exchanged=False, dropout=0.0):
        super().__init__(between, exchanged=exchanged)
        self.dropout, self.norm = nn.Dropout(dropout), nn.BatchNorm1d(AUDIO)

    def forward(self, batch):
        audio = self.audio_encoder(self.dropout(self.norm(batch["audio"])))
        return audio, self.text_encoder(self.dropout(batch["text"]))

    def training_step(self, batch, batch_idx):
        sides = [self.between(side) for side in self(batch)]
        return self.loss_fn(*(reversed(sides) if self.exchanged else sides))


BY_CALLABLES = {
    "audio": lambda model, batch: model(batch)[0],
    "text": lambda model, batch: model(batch)[1],
    "criterion": "loss_fn",
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_text_before_audio_is_refused_beside_callables(dropout):
    with pytest.raises(RuntimeError, match=r"what `text` returned first.*Exchange the two arguments"):
        fit(wrap(TogetherStep(exchanged=True, dropout=dropout), **BY_CALLABLES))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_further_layers_are_told_beside_callables(is_compiled):
    module = wrap(TogetherStep(nn.Linear(WIDTH, WIDTH)), **BY_CALLABLES)
    if is_compiled:
        module = torch.compile(module, backend="eager")
    assert [text for text in fit(module) if "with other embeddings than `audio` and `text` return" in text]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_embeddings_beside_callables_are_not(dropout, precision):
    """Nor is the run another one by the look at them."""

    def trained(*, is_looked_at):
        torch.manual_seed(0)
        module = wrap(TogetherStep(dropout=dropout), **BY_CALLABLES)
        if not is_looked_at:
            module._compared_step = module._step
        found = fit(module, precision=precision)
        assert not [text for text in found if "other embeddings" in text]
        return module.state_dict()

    torch.testing.assert_close(trained(is_looked_at=True), trained(is_looked_at=False), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_embeddings_themselves_are_not(precision):
    found = fit(wrap(CriterionStep(), criterion="loss_fn"), precision=precision)
    assert not [text for text in found if "other embeddings" in text]


class InPlace(PlainTowers):
    """Changes embeddings in place behind the encoders."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def training_step(self, batch, batch_idx):
        audio, text = self.encode_audio(batch), self.encode_text(batch)
        self.change(audio)
        return self.loss_fn(audio, text)

    def loss_fn(self, audio, text):
        return self.contrast(audio, text)


@pytest.mark.parametrize("criterion", [None, "loss_fn"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda audio: audio.div_(audio.detach().norm(dim=1, keepdim=True)), False),
        (lambda audio: audio.sub_(audio.mean(dim=0)), True),
    ],
)
def test_embeddings_that_the_step_changes_in_place(change, told, criterion, recwarn):
    module = wrap(InPlace(change), criterion=criterion)
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())
    words = "other embeddings than" if criterion else "changes in place what `encode_audio` returned, so"
    assert len([each for each in recwarn if words in str(each.message)]) == told

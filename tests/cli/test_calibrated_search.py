"""Calibrated search on the command line: tested, stored in encoded files, and used by `search`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ask_lightning.cli import run as run_command
from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.metrics import CALIBRATIONS, HubCalibration, QueryBank, choose_calibration
from tests.helpers.command_line import ASK, ask_lightning, csv_rows, last_checkpoint, log_folder, refusal


def given(demo, trained, run="run"):
    return ("--config", ASK, demo, "--run", run, "--ckpt_path", last_checkpoint(trained))


@pytest.fixture(name="splits")
def splits_fixture(demo, trained) -> dict[str, EncodedPairs]:
    """All splits without calibration."""
    for split in ("train", "val", "test"):
        ask_lightning("encode", *given(demo, trained, "plain"), "--split", split)
    return {
        split: EncodedPairs.load(Path(f"plain/encoded-{split}.safetensors"))
        for split in ("train", "val", "test")
    }


def expected_calibration(splits, gallery) -> HubCalibration:
    """The calibration of a gallery by the training split, chosen on validation."""
    bank = QueryBank(splits["train"].audio, splits["train"].text)
    val = splits["val"]
    chosen = choose_calibration(val.audio[val.clip_of], val.text, val.clip_ids[val.clip_of], bank)
    return HubCalibration.from_bank(bank, gallery.audio, gallery.text, chosen)


def test_a_test_prints_both_searches(demo, trained, capsys):
    run_command([*map(str, ("test", *given(demo, trained)))])
    assert "test, calibrated" in capsys.readouterr().out
    raw, calibrated = csv_rows(log_folder("run") / "recall.csv")
    assert (raw["% of"], calibrated["% of"]) == ("test", "test, calibrated")
    cli = ask_lightning("test", *given(demo, trained, "off"), "--calibrate", "false")
    (alone,) = csv_rows(log_folder("off") / "recall.csv")
    assert alone == raw
    assert not [name for name in cli.trainer.callback_metrics if "calibrated" in name]


def test_a_test_calibrates_as_encode_does(demo, trained, splits):
    cli = ask_lightning("test", *given(demo, trained))
    test = splits["test"]
    hubs = expected_calibration(splits, test)
    scores = hubs.calibrate(test.text @ test.audio.T, "audio")
    own = scores.gather(1, test.clip_of[:, None])
    recall = ((scores >= own).sum(dim=1) == 1).float().mean()
    found = cli.trainer.callback_metrics
    assert found["test/calibrated/t2a/recall_at_1"] == pytest.approx(float(recall))
    assert 0 <= found["test/calibrated/mean_recall"] <= 1


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_calibrated_file_is_searched_by_its_bias(split, demo, trained, splits, capsys):
    output = ("--output", "a.safetensors", "--split", split, "--calibrate", "true")
    run_command([*map(str, ("encode", *given(demo, trained), *output))])
    printed = capsys.readouterr().out
    pairs = EncodedPairs.load(Path("a.safetensors"))
    expected = expected_calibration(splits, splits[split])
    assert pairs.calibration.calibration == expected.calibration
    assert f"They are calibrated by the training split: {expected.calibration}." in printed
    for name, values in expected.tensors.items():
        torch.testing.assert_close(
            pairs.calibration.tensors[name].to(values.dtype), values, atol=1e-6, rtol=0
        )

    caption = pairs.captions[3]
    hits = run_command(["search", "a.safetensors", "--text", caption, "--top", "6"])
    printed = capsys.readouterr().out
    assert "Scores are calibrated (" in printed
    assert [line.split()[:3] for line in printed.splitlines() if "rank" in line] == [
        ["rank", "score", "cosine"]
    ]
    cosines = pairs.audio @ pairs.text[3]
    scores = expected.calibrate(cosines[None], "audio")[0]
    order = scores.argsort(descending=True, stable=True)
    assert [hit.score for hit in hits] == pytest.approx(scores[order].tolist(), abs=1e-5)
    assert sorted(hit.cosine for hit in hits) == pytest.approx(cosines.sort().values.tolist(), abs=1e-5)

    hits = run_command(["search", "a.safetensors", "--text", caption, "--top", "6", "--raw"])
    assert "calibrated" not in capsys.readouterr().out
    assert [hit.score for hit in hits] == pytest.approx(
        cosines.sort(descending=True).values.tolist(), abs=1e-5
    )
    assert all(hit.score == hit.cosine for hit in hits)


def test_a_hub_is_demoted_and_the_gate_decides():
    """The first clip is the best hit of all queries; only its bias and the gate say otherwise."""
    from ask_lightning.cli.search import find_hits

    class Model(torch.nn.Module):
        def encode_audio(self, batch):
            raise AssertionError

        def encode_text(self, batch):
            return torch.tensor([[0.8, 0.6]])

    pairs = EncodedPairs(
        audio=torch.eye(2),
        text=torch.eye(2),
        clip_ids=torch.arange(2),
        clip_of=torch.arange(2),
        names=["hub", "other"],
        captions=["a", "b"],
    )
    assert [hit.clip for hit in find_hits(Model(), pairs, "rain", 2)] == ["hub", "other"]
    bias = torch.tensor([0.5, 0.0])
    for hubs, first in ((None, "other"), ([True, False], "other"), ([False, True], "hub")):
        mask = None if hubs is None else torch.tensor(hubs)
        pairs.calibration = HubCalibration(CALIBRATIONS[0], bias, bias, mask, mask)
        assert find_hits(Model(), pairs, "rain", 2)[0].clip == first


@pytest.mark.parametrize("calibration", [CALIBRATIONS[0], CALIBRATIONS[-1]], ids=str)
def test_a_calibration_survives_the_file(calibration):
    bank = QueryBank(torch.eye(3)[:1], torch.eye(3)[1:2])
    pairs = EncodedPairs(
        torch.eye(3), torch.eye(3), torch.arange(3), torch.arange(3), ["a", "b", "c"], ["1", "2", "3"]
    )
    pairs.save(Path("plain.safetensors"))
    assert EncodedPairs.load(Path("plain.safetensors")).calibration is None
    pairs.calibration = HubCalibration.from_bank(bank, pairs.audio, pairs.text, calibration)
    pairs.save(Path("a.safetensors"))
    found = EncodedPairs.load(Path("a.safetensors")).calibration
    assert found.calibration == calibration
    assert found.tensors.keys() == pairs.calibration.tensors.keys()
    for name, values in found.tensors.items():
        assert torch.equal(values, pairs.calibration.tensors[name].to(values.dtype))


def test_a_calibration_of_another_kind_is_refused(capsys):
    pairs = EncodedPairs(torch.eye(2), torch.eye(2), torch.arange(2), torch.arange(2), ["a", "b"], ["1", "2"])
    bank = QueryBank(torch.eye(2), torch.eye(2))
    pairs.calibration = HubCalibration.from_bank(bank, pairs.audio, pairs.text)
    pairs.save(Path("a.safetensors"))
    with safe_open("a.safetensors", framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    for changed in (
        {"calibration": json.dumps({"kind": "other"})},
        {"calibration": json.dumps({"heat": 1})},
    ):
        save_file(tensors, "b.safetensors", metadata=metadata | changed)
        message = refusal(capsys, "search", "b.safetensors", "--text", "rain")
        assert "holds a calibration of another kind than this version makes" in message
    del tensors["text_bias"]
    save_file(tensors, "b.safetensors", metadata=metadata)
    assert "text_bias" in refusal(capsys, "search", "b.safetensors", "--text", "rain")


def test_a_model_without_the_metric_is_tested_by_cosine_alone(demo, capfd):
    Path("mine.yaml").write_text(
        "model: {class_path: tests.helpers.command_line.TestedTowers}\n"
        "data: {class_path: SoundscapeData, init_args: {num_train: 4, num_val: 4, num_test: 4, seconds: 1}}\n"
        "trainer: {accelerator: cpu, logger: false}\n"
    )
    from ask_lightning.cli import trainer as trainer_module

    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "rank_zero_info", said.append)
        ask_lightning("test", "--config", "mine.yaml")
    assert said == ["Calibrated search is left out: TestedTowers has no metric AudioTextRetrieval."]

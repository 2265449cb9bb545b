"""A model written as a folder is the same model, for this library and, where it can be, for transformers."""

import json
import re
import sys

import lightning as L
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ask_lightning.functional import unit_length
from ask_lightning.models import (
    CEDSonar,
    CLAPRetriever,
    ResNet38BERT,
    Retriever,
    TinyRetriever,
    exported,
    from_pretrained,
    save_pretrained,
)
from ask_lightning.utilities.weights import weights_fingerprint
from tests.helpers.retrievers import CAPTIONS, FUSED, ced_sonar, clap, noise, resnet38_bert

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchaudio")


def tiny(**options) -> TinyRetriever:
    return TinyRetriever(width=8, **options)


CASES = {
    "tiny": (tiny, {}),
    "tiny, prototypes": (tiny, {"interaction": "prototypes"}),
    "resnet38_bert": (resnet38_bert, {}),
    "resnet38_bert, frames": (resnet38_bert, {"interaction": "frames"}),
    "resnet38_bert, vocabulary": (resnet38_bert, {"text_config": None, "tokenizer": None}),
    "ced_sonar": (ced_sonar, {"learn_temperature": True}),
    "ced_sonar, prototypes": (ced_sonar, {"interaction": "prototypes"}),
    "clap": (clap, {}),
    "clap, fusion": (clap, {"config": FUSED}),
}


def made(case: str, bert_folder: str):
    make, options = CASES[case]
    if "vocabulary" in case:
        options = options | {"text_weights": bert_folder}
    torch.manual_seed(3)
    model = make(**options).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.1)  # as training would
    return model


def batch_of(model) -> dict:
    rate = model.hparams["sample_rate"]
    return {"waveform": noise(3, 1.0, rate), "num_samples": torch.tensor([rate, rate // 2, rate])}


@torch.no_grad()
def embeddings(model) -> list[torch.Tensor]:
    sides = [model.encode_audio(batch_of(model)), model.encode_text({"caption": CAPTIONS})]
    if model.needs_tokens:
        return [part for side in sides for part in (side.pooled, side.tokens, side.mask)]
    return sides


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_back_from_its_folder(case, bert_folder, tmp_path):
    model = made(case, bert_folder)
    model.save_pretrained(tmp_path / "model")
    for load in (type(model).from_pretrained, Retriever.from_pretrained, from_pretrained):
        loaded = load(tmp_path / "model")
        assert type(loaded) is type(model)
        assert not loaded.training
        assert weights_fingerprint(loaded) == weights_fingerprint(model)
    assert dict(loaded.hparams) == json.loads(json.dumps(dict(model.hparams)))
    for found, expected in zip(embeddings(loaded), embeddings(model), strict=True):
        assert torch.equal(found, expected)
    if model.interaction is not None:
        audio, text = loaded.encode_audio(batch_of(model)), loaded.encode_text({"caption": CAPTIONS[:3]})
        assert torch.equal(loaded.loss(audio, text), model.loss(audio, text))


def test_the_folder_names_no_path_of_this_machine(bert_folder, tmp_path):
    made("resnet38_bert, vocabulary", bert_folder).save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").glob("*.json"):
        assert bert_folder not in file.read_text()


def test_the_number_of_tokens_can_be_replaced_but_the_language_of_a_tokenizer_cannot(bert_folder, tmp_path):
    options = {"text_config": None, "text_weights": bert_folder, "tokenizer": None}
    resnet38_bert(**options, max_tokens=5).save_pretrained(tmp_path)
    for count in (4, 6):
        loaded = from_pretrained(tmp_path, max_tokens=count)
        ids, _ = loaded.text_encoder.tokenizer(["rain wind rain wind rain wind rain"])
        assert ids.shape == (1, count)
        assert loaded.hparams["max_tokens"] == count
    ced_sonar(tokenizer=bert_folder).save_pretrained(tmp_path)
    from_pretrained(tmp_path, language="eng_Latn")
    with pytest.raises(ValueError, match=r"`language` cannot be changed to 'deu_Latn': .* as 'eng_Latn'"):
        from_pretrained(tmp_path, language="deu_Latn")


def test_the_tokenizer_is_one_of_transformers(bert_folder, tmp_path):
    model = made("resnet38_bert, vocabulary", bert_folder)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)(CAPTIONS, padding=True, return_tensors="pt")
    ids, mask = model.text_encoder.tokenizer(CAPTIONS)
    assert torch.equal(loaded["input_ids"], ids)
    assert torch.equal(loaded["attention_mask"], mask)
    assert not any(name.endswith("_extra_state") for name in load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(("config", "seconds"), [(None, 0.3), (None, 1.0), (FUSED, 1.0)])
def test_transformers_loads_a_clap_and_its_processor(config, seconds, bert_folder, tmp_path):
    torch.manual_seed(0)
    options = {} if config is None else {"config": config}
    model = clap(tokenizer=bert_folder, **options).eval()
    model.save_pretrained(tmp_path)
    published, report = transformers.ClapModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    processor = transformers.ClapProcessor.from_pretrained(tmp_path)
    clips = list(noise(2, seconds, 48000).numpy())
    heard = processor.feature_extractor(clips, sampling_rate=48000, return_tensors="pt")
    read = processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    # With fusion the extractor marks one clip as long even if none is.
    heard["is_longer"] = torch.zeros_like(torch.as_tensor(heard["is_longer"]))
    with torch.no_grad():
        found = [published.get_audio_features(**heard), published.get_text_features(**read)]
        expected = [
            model.encode_audio({"waveform": noise(2, seconds, 48000)}),
            model.encode_text({"caption": CAPTIONS}),
        ]
    for theirs, ours in zip(found, expected, strict=True):
        torch.testing.assert_close(
            unit_length(getattr(theirs, "pooler_output", theirs)), ours, rtol=0, atol=1e-6
        )


def test_a_clap_of_half_seconds_has_no_processor(tmp_path):
    with pytest.warns(UserWarning, match="No processor of transformers is written: .* not 0.5"):
        clap(max_seconds=0.5).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert CLAPRetriever.from_pretrained(tmp_path).max_seconds == 0.5


def test_hyperparameters_can_be_replaced(tmp_path):
    resnet38_bert().save_pretrained(tmp_path)
    loaded = ResNet38BERT.from_pretrained(tmp_path, sample_rate=16000)
    assert loaded.resample.from_rate == 16000
    with pytest.raises(ValueError, match="ResNet38BERT has no argument `rate`"):
        from_pretrained(tmp_path, rate=16000)


def test_a_model_that_does_not_resample_warns_of_another_sample_rate(tmp_path, recwarn):
    TinyRetriever(width=8, sample_rate=16000).save_pretrained(tmp_path)
    resnet38_bert().save_pretrained(tmp_path / "resampling")
    from_pretrained(tmp_path, sample_rate=16000, temperature=0.1)
    from_pretrained(tmp_path / "resampling", sample_rate=44100)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="sample_rate=16000, and TinyRetriever does not resample: .*44100"):
        from_pretrained(tmp_path, sample_rate=44100)


def test_tensors_with_two_names_are_written(tmp_path, monkeypatch):
    module = own_module(
        tmp_path,
        monkeypatch,
        """
        import lightning as L
        from torch import nn
        class Tied(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(2, 2)
                self.second = self.first
        """,
    )
    model = module.Tied()
    save_pretrained(model, tmp_path / "model")
    assert weights_fingerprint(from_pretrained(tmp_path / "model")) == weights_fingerprint(model)


OWN = """
import lightning as L
import torch
class Towers(L.LightningModule):
    def __init__(self, width, **others):
        super().__init__()
        self.save_hyperparameters()
        self.table = torch.nn.Embedding(5, width)
"""


def own_module(tmp_path, monkeypatch, text: str, name: str = "own_towers"):
    import importlib
    import textwrap

    (tmp_path / "code").mkdir(exist_ok=True)
    (tmp_path / "code" / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.mark.parametrize("written", [False, True])
def test_a_folder_that_was_not_finished_does_not_load(written, tmp_path, monkeypatch):
    """Weights and hyperparameters of two models would look like one."""

    def torn(tensors, path, metadata):
        if written:
            save_file(tensors, path, metadata=metadata)
        raise SafetensorError("No space left on device")

    tiny().save_pretrained(tmp_path)
    monkeypatch.setattr(exported, "save_file", torn)
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written: No space left"):
        tiny(temperature=0.5).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json"):
        from_pretrained(tmp_path)


def test_weights_of_another_folder_do_not_load(tmp_path):
    tiny().save_pretrained(tmp_path / "a")
    tiny(temperature=0.5).save_pretrained(tmp_path / "b")
    weights = tmp_path / "a" / "model.safetensors"
    weights.write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"other weights than those that config\.json beside it was written"):
        from_pretrained(tmp_path / "a")
    # What another program wrote does not say what it is of.
    save_file(load_file(weights), weights)
    assert from_pretrained(tmp_path / "a").temperature != 0.5


def test_a_class_of_the_users_own_is_imported_by_name(tmp_path, monkeypatch):
    module = own_module(tmp_path, monkeypatch, OWN)
    model = module.Towers(3, depth=2)
    save_pretrained(model, tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model")
    assert isinstance(loaded, module.Towers)
    assert dict(loaded.hparams) == {"width": 3, "depth": 2}
    assert weights_fingerprint(loaded) == weights_fingerprint(model)


def test_a_class_that_is_not_importable_is_named_and_can_be_passed(tmp_path, monkeypatch):
    module = own_module(tmp_path, monkeypatch, OWN)
    save_pretrained(module.Towers(3), tmp_path / "model")
    monkeypatch.delitem(sys.modules, "own_towers")
    (tmp_path / "code" / "own_towers.py").unlink()
    with pytest.raises(ImportError, match=r"a Towers, whose class own_towers.Towers cannot be imported"):
        from_pretrained(tmp_path / "model")
    assert from_pretrained(tmp_path / "model", module.Towers).table.weight.shape == (5, 3)


class Nested(L.LightningModule):
    def __init__(self, part: object, width: int = 2) -> None:
        super().__init__()


class Recorded(L.LightningModule):
    def __init__(self, part: object = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_what_could_not_be_made_anew_is_refused(tmp_path):
    class Local(L.LightningModule):
        pass

    with pytest.raises(ValueError, match="Local cannot be made anew from a folder"):
        save_pretrained(Local(), tmp_path / "model")
    with pytest.raises(ValueError, match="Nested needs `part` to be made, which its hyperparameters"):
        save_pretrained(Nested(3), tmp_path / "model")
    with pytest.raises(ValueError, match="hyperparameter `part` of Recorded cannot be written as JSON"):
        save_pretrained(Recorded({1, 2}), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_another_class_is_refused(tmp_path):
    ced_sonar().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a CEDSonar, not a ResNet38BERT"):
        ResNet38BERT.from_pretrained(tmp_path)
    assert isinstance(CEDSonar.from_pretrained(tmp_path), CEDSonar)


def test_a_config_that_names_no_model_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["ask_lightning"]["class_path"] = "pathlib.Path"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"names pathlib\.Path, which is no LightningModule"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"its config\.json has no section 'ask_lightning'"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        from_pretrained(tmp_path)


def test_damaged_and_missing_files_are_named(bert_folder, tmp_path):
    model = made("resnet38_bert, vocabulary", bert_folder)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks tokenizer\.json"):
        from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("audio_head.0.bias")
    model.text_encoder.tokenizer.save_files(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=re.compile("do not fit ResNet38BERT.*audio_head.0.bias", re.DOTALL)):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        from_pretrained(tmp_path)


def test_what_is_no_folder_is_looked_up_on_the_hub(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    with pytest.raises(FileNotFoundError, match="hub was not asked, for HF_HUB_OFFLINE is set"):
        from_pretrained("somebody/something")
    with pytest.raises(FileNotFoundError, match=r"There is no folder '\./nowhere'"):
        from_pretrained("./nowhere")
    tiny().save_pretrained(tmp_path)
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert isinstance(TinyRetriever.from_pretrained("me/tiny", revision="v1", token="t"), TinyRetriever)
    assert (asked["name"], asked["revision"], asked["token"]) == ("me/tiny", "v1", "t")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    save_pretrained(tiny(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name, tensor = next((name, one) for name, one in state.items() if name in dict(tiny().named_parameters()))
    tensor.view(-1)[-1] = value
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"NaN or infinity, in '?{re.escape(name)}.* an earlier checkpoint"):
        from_pretrained(tmp_path)


def test_weights_of_fewer_bits_are_pointed_at(tmp_path):
    model = tiny()
    save_pretrained(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file(halves, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"weights in float16, in which they were rounded"):
        loaded = from_pretrained(tmp_path)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, halves[name].to(value.dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_args": {"width": "eight"}}, "makes no TinyRetriever \\(.*Undo what was changed"),
        ({"init_args": {"widht": 8}}, "makes no TinyRetriever \\(.*widht.*Undo what was changed"),
        ({"init_args": {"temperature": 0}}, "makes no TinyRetriever \\(Argument.*Undo what was changed"),
        ({"init_args": [8]}, "an object as `init_args`.*Undo the change"),
        ({"class_path": None}, "a name as `class_path`.*Undo the change"),
    ],
)
def test_a_config_that_was_changed_by_hand_is_named(tmp_path, change, message):
    save_pretrained(tiny(), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["ask_lightning"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
        from_pretrained(tmp_path)

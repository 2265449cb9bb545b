"""Records what the public code of the baselines computes; README.md in this folder says how to run it.

The public code is imported from the user's own clones, at the commits below, and is no part of this
repository.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.parity import inputs

COMMITS = {
    "audio-text_retrieval": "13c21d9a37392b7fc45ed4f91581ce4caf0bc9bd",
    "CED": "60a0f54214ea619265e16ee257925158be2675fd",
    "ml-clap": "154393ef8afb25ecb13f06d6e1651586f468aa40",
    "SONAR": "8da24c2b1596561070e92e37ea79e57c426cd620",
}
RECORDED = Path(__file__).parent / "recorded.json"


class _Anything(types.ModuleType):
    """A module that has everything that is imported from it."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=name)


class _StandIns:
    """Finds the packages that the public code imports, but does not use in what is recorded."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.packages else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    """What `sentence_transformers.util.cos_sim` returns."""
    one, other = torch.atleast_2d(one), torch.atleast_2d(other)
    return nn.functional.normalize(one, dim=1) @ nn.functional.normalize(other, dim=1).T


@contextlib.contextmanager
def public_code(folder: Path, *stand_ins: str) -> Iterator[None]:
    """Imports find the modules of a clone, and forget them afterwards."""
    before = set(sys.modules)
    finder = _StandIns(*stand_ins)
    sys.path.insert(0, str(folder))
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    try:
        if "sentence_transformers" in stand_ins:
            import sentence_transformers  # type: ignore[import-not-found]

            sentence_transformers.util = types.SimpleNamespace(cos_sim=_cosines)
        yield
    finally:
        sys.path.remove(str(folder))
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            places = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
            if isinstance(module, _Anything) or any(str(folder) in str(place) for place in places):
                del sys.modules[name]


@torch.no_grad()
def record_ml_act(folder: Path) -> dict[str, Any]:
    """ResNet-38 from waveforms, captions, NT-Xent and metrics of ML-ACT."""
    with public_code(folder, "sentence_transformers", "gensim", "h5py", "tqdm", "loguru", "transformers"):
        from models import AudioEncoder  # type: ignore[import-not-found]
        from tools import dataset, loss, utils  # type: ignore[import-not-found]

        settings = {"sr": 32000, "window_size": 1024, "hop_length": 320, "mel_bins": 64}
        config = types.SimpleNamespace(
            wav=types.SimpleNamespace(**settings),
            training=types.SimpleNamespace(dropout=0.2, spec_augmentation=True),
        )
        encoder = AudioEncoder.ResNet38(config)
        sizes = inputs.RESNET38
        blocks = list(sizes["blocks"])
        encoder.resnet = AudioEncoder._ResNet(AudioEncoder._ResnetBasicBlock, blocks, zero_init_residual=True)
        encoder.conv_block_after1 = AudioEncoder.ConvBlock(sizes["channels"][-1], sizes["width"])
        extractors = encoder.spectrogram_extractor, encoder.logmel_extractor
        encoder.spectrogram_extractor = encoder.logmel_extractor = nn.Identity()
        inputs.fill(encoder)
        encoder.spectrogram_extractor, encoder.logmel_extractor = extractors
        audio, text = inputs.embeddings()
        labels = torch.arange(len(audio))
        return {
            "resnet38": encoder.eval()(inputs.waveforms(32000, 2.0, 1.3)).tolist(),
            "captions": [dataset._sentence_process(sentence) for sentence in inputs.SENTENCES],
            "nt_xent": loss.NTXent()(audio, text, labels).item(),
            "triplet": loss.TripletLoss()(audio, text, labels).item(),
            "t2a": [float(score) for score in utils.t2a(audio.numpy(), text.numpy())],
            "a2t": [float(score) for score in utils.a2t(audio.numpy(), text.numpy())],
        }


@torch.no_grad()
def record_ced(folder: Path) -> dict[str, Any]:
    """CED's pooled features from waveforms of several lengths, in the code of its authors."""
    with public_code(folder, "loguru"):
        from models import audiotransformer  # type: ignore[import-not-found]

        return {"features": _ced_features(audiotransformer.AudioTransformer, "logit")}


def _ced_features(transformer: Any, pooling: str) -> dict[str, list[float]]:
    sizes = inputs.CED
    names = {"embed_dim": sizes["width"], "depth": sizes["depth"], "num_heads": sizes["heads"]}
    encoder = transformer(**names, pooling=pooling)
    encoder.outputlayer = nn.Identity()
    front_end, encoder.front_end = encoder.front_end, nn.Identity()
    inputs.fill(encoder)
    encoder.front_end = front_end
    encoder.eval()
    return {
        str(seconds): encoder(inputs.waveforms(16000, seconds))[0].tolist() for seconds in inputs.CED_SECONDS
    }


@torch.no_grad()
def record_ml_clap(folder: Path) -> dict[str, Any]:
    """CED as ML-CLAP uses it, captions, the loss and metrics of ML-CLAP."""
    packages = ("sentence_transformers", "loguru", "fairseq2", "sonar", "webdataset")
    with public_code(folder, *packages):
        from dataset import text_preprocess  # type: ignore[import-not-found]
        from models import mlclap_model
        from models.ced import audiotransformer
        from tools import losses, utils

        audio, text = inputs.embeddings()
        model = types.SimpleNamespace(
            encode_audio=lambda _: audio,
            encode_text=lambda *_: text,
            temperature=torch.tensor(0.07),
            atc_loss=losses.AudioTextContrastiveLoss(),
            embed_reg=True,
        )
        return {
            "features": _ced_features(audiotransformer.AudioTransformer, "cat"),
            "captions": [text_preprocess(sentence) for sentence in inputs.SENTENCES],
            "loss": mlclap_model.MLCLAP.forward(model, None, [""], ["eng_Latn"]).item(),
            "t2a": [float(score) for score in utils.t2a(audio.numpy(), text.numpy())],
            "a2t": [float(score) for score in utils.a2t(audio.numpy(), text.numpy())],
        }


@torch.no_grad()
def record_sonar(folder: Path) -> dict[str, Any]:
    """The pooling of SONAR's text encoder, with a stand-in for the padding mask of fairseq2."""
    with public_code(folder, "fairseq2"):
        import fairseq2.models.sequence  # type: ignore[import-not-found]
        import fairseq2.nn.padding  # type: ignore[import-not-found]
        import fairseq2.typing  # type: ignore[import-not-found]

        fairseq2.typing.override = lambda method: method
        fairseq2.nn.padding.apply_padding_mask = _fill_padding
        model = _load(folder / "sonar" / "models" / "sonar_text" / "model.py")
        states, lengths = inputs.tokens()
        mask = types.SimpleNamespace(seq_lens=torch.tensor(lengths))
        pool = model.SonarTextTransformerEncoderModel.static_pooling
        return {"mean": pool(states, mask, model.Pooling.MEAN).tolist()}


def _fill_padding(states: Tensor, mask: Any, pad_value: float) -> Tensor:
    """What `fairseq2.nn.padding.apply_padding_mask` returns."""
    inside = torch.arange(states.shape[1]) < mask.seq_lens[:, None]
    return states.where(inside[:, :, None], pad_value)


def _load(path: Path) -> Any:
    """The module in a file, with classes for the base classes that it imports from elsewhere."""
    for name in (
        "sonar",
        "sonar.models",
        "sonar.models.encoder_model",
        "sonar.nn",
        "sonar.nn.encoder_pooler",
    ):
        sys.modules[name] = _Anything(name)
    sys.modules["sonar.models.encoder_model"].SonarEncoderModel = nn.Module  # type: ignore[attr-defined]
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("sonar_text_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORDERS = {
    "audio-text_retrieval": record_ml_act,
    "CED": record_ced,
    "ml-clap": record_ml_clap,
    "SONAR": record_sonar,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--code", type=Path, required=True, help="folder with a clone of each repository")
    folder = parser.parse_args().code
    recorded = {}
    for name, commit in COMMITS.items():
        command = ["git", "-C", str(folder / name), "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if found != commit:
            raise SystemExit(f"{folder / name} is at {found}. Run `git checkout {commit}` in it.")
        recorded[name] = {"commit": commit, **RECORDERS[name](folder / name)}
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

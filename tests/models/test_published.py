"""Sizes, names and computations of the published encoders, written down here once more."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ask_lightning.models import CED, ResNet38
from ask_lightning.models.text import SONAR
from ask_lightning.models.weights import load_weights

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
STAGES = (64, 128, 256, 512)


def batch_norm(name: str, width: int) -> dict:
    return {f"{name}.{part}": (width,) for part in BATCH_NORM} | {f"{name}.num_batches_tracked": ()}


def conv_block(name: str, incoming: int, outgoing: int) -> dict:
    return {
        f"{name}.conv1.weight": (outgoing, incoming, 3, 3),
        f"{name}.conv2.weight": (outgoing, outgoing, 3, 3),
        **batch_norm(f"{name}.bn1", outgoing),
        **batch_norm(f"{name}.bn2", outgoing),
    }


def panns(channels=STAGES, blocks=(3, 4, 6, 3), width=2048) -> dict:
    """Names and shapes in `ResNet38_mAP=0.434.pth`, after the public code of PANNs."""
    shapes = {
        "spectrogram_extractor.stft.conv_real.weight": (513, 1, 1024),
        "spectrogram_extractor.stft.conv_imag.weight": (513, 1, 1024),
        "logmel_extractor.melW": (513, 64),
        **batch_norm("bn0", 64),
        **conv_block("conv_block1", 1, channels[0]),
    }
    incoming = channels[0]
    for stage, (outgoing, count) in enumerate(zip(channels, blocks, strict=True), start=1):
        for block in range(count):
            name = f"resnet.layer{stage}.{block}"
            shapes |= conv_block(name, incoming, outgoing)
            if stage > 1 and block == 0:
                shapes[f"{name}.downsample.1.weight"] = (outgoing, incoming, 1, 1)
                shapes |= batch_norm(f"{name}.downsample.2", outgoing)
            incoming = outgoing
    return shapes | {
        **conv_block("conv_block_after1", incoming, width),
        "fc1.weight": (width, width),
        "fc1.bias": (width,),
        "fc_audioset.weight": (527, width),
        "fc_audioset.bias": (527,),
    }


def ced(width=768, depth=12, *, hub: bool) -> dict:
    """Names and shapes in `model.safetensors` on the hub, or in the authors' own file."""
    norm = "init_bn" if hub else "init_bn.1"
    shapes = {
        **batch_norm(norm, 64),
        "patch_embed.proj.weight": (width, 1, 16, 16),
        "patch_embed.proj.bias": (width,),
        "time_pos_embed": (1, width, 1, 63),
        "freq_pos_embed": (1, width, 4, 1),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for layer in range(depth):
        linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for part, (outgoing, incoming) in linear.items():
            shapes[f"blocks.{layer}.{part}.weight"] = (outgoing * width, incoming * width)
            shapes[f"blocks.{layer}.{part}.bias"] = (outgoing * width,)
        for part in ("norm1", "norm2"):
            shapes[f"blocks.{layer}.{part}.weight"] = shapes[f"blocks.{layer}.{part}.bias"] = (width,)
    if hub:
        shapes = {f"encoder.{name}": shape for name, shape in shapes.items()}
    else:
        shapes |= {"front_end.0.spectrogram.window": (512,), "front_end.0.mel_scale.fb": (257, 64)}
    head = {"0.weight": (width,), "0.bias": (width,), "1.weight": (527, width), "1.bias": (527,)}
    return shapes | {f"outputlayer.{name}": shape for name, shape in head.items()}


def random_state(shapes: dict) -> dict:
    """Variances positive."""
    torch.manual_seed(0)
    return {
        name: torch.zeros((), dtype=torch.int64) if name.endswith("tracked") else torch.rand(shape) + 0.1
        for name, shape in shapes.items()
    }


def test_resnet38_has_the_published_names_shapes_and_count():
    """73,783,247 in table II of the PANNs paper, with the classifier."""
    with torch.device("meta"):
        encoder = ResNet38()
    published = panns()
    assert {name: tuple(value.shape) for name, value in encoder.state_dict().items()} == {
        name: shape
        for name, shape in published.items()
        if not name.startswith(("fc", "spectrogram", "logmel"))
    }
    classifier = nn.Linear(2048, 2048, device="meta"), nn.Linear(2048, 527, device="meta")
    assert (
        sum(value.numel() for module in (encoder, *classifier) for value in module.parameters()) == 73783247
    )


@pytest.mark.parametrize(
    ("width", "heads", "millions"), [(768, 12, 86), (384, 6, 22), (256, 4, 9.6), (192, 3, 5.5)]
)
def test_ced_has_the_published_names_shapes_and_count(width, heads, millions):
    """The counts of the authors' README, with the classifier."""
    with torch.device("meta"):
        encoder = CED(width, heads=heads)
        classifier = nn.LayerNorm(width), nn.Linear(width, 527)
    assert {f"encoder.{name}": tuple(value.shape) for name, value in encoder.state_dict().items()} == {
        name: shape for name, shape in ced(width, hub=True).items() if not name.startswith("outputlayer")
    }
    count = sum(value.numel() for module in (encoder, *classifier) for value in module.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1 if millions < 10 else 0.5)


def test_sonar_and_bert_have_the_published_counts():
    """SONAR's file on the hub is 3.06 GB of float32; BERT-base is 110 M with its pooler."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    with torch.device("meta"):
        sonar = M2M100Encoder(transformers.M2M100Config(**SONAR))
        bert = transformers.AutoModel.from_config(transformers.BertConfig())
    assert round(4 * sum(value.numel() for value in sonar.parameters()) / 1e9, 2) == 3.06
    assert sum(value.numel() for value in bert.parameters()) == 109482240


def reference_resnet38(state: dict, spectrogram: torch.Tensor, blocks) -> torch.Tensor:
    """PANNs in evaluation mode, one line an operation."""

    def norm(name, maps):
        parts = {part: state[f"{name}.{part}"] for part in BATCH_NORM}
        return F.batch_norm(maps, parts["running_mean"], parts["running_var"], parts["weight"], parts["bias"])

    def conv(name, maps):
        weight = state[f"{name}.weight"]
        return F.conv2d(maps, weight, padding=weight.shape[-1] // 2)

    def twice(name, maps):
        maps = F.relu(norm(f"{name}.bn1", conv(f"{name}.conv1", maps)))
        return norm(f"{name}.bn2", conv(f"{name}.conv2", maps))

    maps = norm("bn0", spectrogram.transpose(1, 2).unsqueeze(3)).permute(0, 3, 2, 1)
    maps = F.avg_pool2d(F.relu(twice("conv_block1", maps)), 2)
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            name, identity = f"resnet.layer{stage}.{block}", maps
            if stage > 1 and block == 0:
                maps = F.avg_pool2d(maps, 2)
                identity = norm(f"{name}.downsample.2", conv(f"{name}.downsample.1", maps))
            maps = F.relu(twice(name, maps) + identity)
    maps = F.relu(twice("conv_block_after1", F.avg_pool2d(maps, 2))).mean(dim=3)
    return maps.max(dim=2).values + maps.mean(dim=2)


def test_resnet38_loads_the_official_file_and_computes_as_published(tmp_path):
    sizes = {"channels": (4, 4, 6, 8), "blocks": (2, 1, 2, 1), "width": 10}
    state = random_state(panns(**sizes))
    path = tmp_path / "ResNet38_mAP=0.434.pth"
    torch.save({"iteration": 600000, "model": state, "sampler": {}}, path)
    encoder = ResNet38(**sizes).eval()
    encoder.load_published(str(path))
    spectrogram = torch.randn(3, 101, 64)
    expected = reference_resnet38(state, spectrogram, sizes["blocks"])
    torch.testing.assert_close(encoder(spectrogram), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder(spectrogram, torch.tensor([101, 101, 200])), encoder(spectrogram))
    lengths = torch.tensor([101, 33, 79])
    found = encoder(torch.nn.functional.pad(spectrogram, (0, 0, 0, 50), value=-100), lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = encoder(spectrogram[row : row + 1, :length])
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def reference_ced(state: dict, spectrogram: torch.Tensor, heads: int) -> torch.Tensor:
    """CED with torch's own transformer layers."""
    width = state["norm.weight"].numel()
    parts = {part: state[f"init_bn.1.{part}"] for part in BATCH_NORM}
    maps = F.batch_norm(spectrogram.transpose(1, 2).unsqueeze(3), *(parts[p] for p in BATCH_NORM[2:]), *(
        parts[p] for p in BATCH_NORM[:2]
    )).permute(0, 3, 1, 2)  # fmt: skip
    maps = F.conv2d(maps, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    maps = maps + state["time_pos_embed"][..., : maps.shape[-1]] + state["freq_pos_embed"]
    tokens = maps.flatten(2).transpose(1, 2)
    names = {
        "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, activation=F.gelu, layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).eval()
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for index in range(depth):
        layer.load_state_dict(
            {
                own + kind: state[f"blocks.{index}.{published}{kind}"]
                for own, published in names.items()
                for kind in ("weight", "bias")
            }
        )
        tokens = layer(tokens)
    return F.layer_norm(tokens, (width,), state["norm.weight"], state["norm.bias"], 1e-6).mean(dim=1)


@pytest.fixture
def small_ced():
    state = random_state(ced(8, 2, hub=False))
    return state, CED(8, 2, 2).eval()


def test_ced_loads_the_authors_file_and_computes_as_published(small_ced, tmp_path):
    state, encoder = small_ced
    torch.save(state, tmp_path / "audiotransformer_base_mAP_4999.pt")
    encoder.load_published(str(tmp_path / "audiotransformer_base_mAP_4999.pt"))
    spectrogram = torch.randn(3, 203, 64)
    expected = reference_ced(state, spectrogram, heads=2)
    torch.testing.assert_close(encoder(spectrogram), expected, rtol=1e-4, atol=1e-5)


def test_ced_loads_a_folder_of_the_hub(small_ced, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state, encoder = small_ced
    encoder.load_published(_saved(state, tmp_path / "own.pt"))
    renamed = {
        name if name.startswith("outputlayer") else "encoder." + name.replace("init_bn.1.", "init_bn."): value
        for name, value in state.items()
        if not name.startswith("front_end")
    }
    assert set(renamed) == set(ced(8, 2, hub=True))
    safetensors.save_file(renamed, tmp_path / "model.safetensors")
    other = CED(8, 2, 2)
    other.load_published(str(tmp_path))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_ced_encodes_long_clips_in_pieces(small_ced):
    _, encoder = small_ced
    spectrogram = torch.randn(2, 2 * 1012, 64)
    pieces = [encoder(piece) for piece in spectrogram.split(1012, dim=1)]
    torch.testing.assert_close(encoder(spectrogram), sum(pieces) / 2)
    rest = spectrogram[:, : 1012 + 160]
    expected = (pieces[0] + encoder(rest[:, 1012:])) / 2
    torch.testing.assert_close(encoder(rest), expected)
    nothing_new = spectrogram[:, : 1012 + 15]
    torch.testing.assert_close(encoder(nothing_new), pieces[0])


def test_ced_hears_no_padding(small_ced):
    _, encoder = small_ced
    spectrogram = torch.randn(3, 1500, 64)
    lengths = torch.tensor([160, 1500, 1172])
    found = encoder(spectrogram, lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[row : row + 1], encoder(spectrogram[row : row + 1, :length]))
    assert encoder(spectrogram, torch.tensor([0, 3, 15])).isfinite().all()


@pytest.mark.parametrize("fault", ["missing", "shape", "unknown"])
def test_files_that_do_not_fit(fault, tmp_path):
    sizes = {"channels": (4, 4, 4, 4), "blocks": (1, 1, 1, 1), "width": 4}
    state = random_state(panns(**sizes))
    if fault == "missing":
        del state["bn0.weight"], state["resnet.layer1.0.conv1.weight"]
        message = r"do not fit ResNet38. Missing: 'bn0.weight', 'resnet.layer1.0.conv1.weight'. Check"
    elif fault == "shape":
        state["bn0.weight"] = torch.zeros(32)
        message = r"do not fit ResNet38. Of another shape: 'bn0.weight' is \(32,\), not \(64,\). Check"
    else:
        state["conv_block2.conv1.weight"] = torch.zeros(1)
        message = r"do not fit ResNet38. Unknown: 'conv_block2.conv1.weight'. Check"
    path = _saved({"model": state}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        ResNet38(**sizes).load_published(path)


def test_another_published_model():
    """The file of the wrong network names so much that only some of it is listed."""
    encoder = ResNet38((4, 4, 4, 4), (1, 1, 1, 1), 4)
    with pytest.raises(ValueError, match=r"Missing: 'bn0.weight'.* and 90 more. Unknown: 'init_bn.weight'"):
        load_weights(encoder, random_state({"init_bn.weight": (64,)}), source="model.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet38(channels=(4, 4)), r"`channels` has to be four positive numbers, but got \(4, 4\)"),
        (lambda: ResNet38(blocks=(1, 1, 0, 1)), r"`blocks` has to be four positive numbers"),
        (lambda: ResNet38(dropout=1.0), r"`dropout` has to be in \[0, 1\), but got 1.0"),
        (lambda: CED(10, 1, heads=4), "has to divide its width, but got 4 heads for a width of 10"),
        (lambda: CED(8, 1, 2, max_frames=15), "`max_frames` has to be an integer of at least 16, but got 15"),
    ],
)
def test_arguments_outside_their_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _saved(content: dict, path) -> str:
    torch.save(content, path)
    return str(path)

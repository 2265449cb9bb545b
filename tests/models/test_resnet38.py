"""ResNet-38: names, shapes and computation of the published weights, written down here once more."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ask_lightning.models import ResNet38
from ask_lightning.models.weights import load_weights
from tests.helpers.published_weights import BATCH_NORM, batch_norm, random_state, save_weights

STAGES = (64, 128, 256, 512)


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
    path = save_weights({"model": state}, tmp_path / "w.pth")
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
    ],
)
def test_arguments_outside_their_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()

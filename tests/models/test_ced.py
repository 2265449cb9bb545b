"""CED: names, shapes and computation of the published weights, written down here once more."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ask_lightning.models import CED
from tests.helpers.published_weights import BATCH_NORM, batch_norm, random_state, save_weights


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
    encoder.load_published(save_weights(state, tmp_path / "own.pt"))
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CED(10, 1, heads=4), "has to divide its width, but got 4 heads for a width of 10"),
        (lambda: CED(8, 1, 2, max_frames=15), "`max_frames` has to be an integer of at least 16, but got 15"),
    ],
)
def test_arguments_outside_their_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""SpecAugment: how much is masked, where, and for whom."""

import pytest
import torch

from ask_lightning.models.spec_augment import SpecAugment


def test_widths_in_frames_and_bins():
    torch.manual_seed(0)
    augment = SpecAugment(time_width=20, band_width=8)
    masked = augment(torch.ones(200, 100, 64)) == 0
    frames, bins = masked.all(dim=2), masked.all(dim=1)
    assert torch.equal(masked, frames.unsqueeze(2) | bins.unsqueeze(1))
    for silent, width in ((frames, 20), (bins, 8)):
        sizes = silent.sum(dim=1)
        assert sizes.max() <= 2 * (width - 1)
        assert sizes.max() > 1.5 * width
        assert 0.8 * (width - 1) < sizes.float().mean() < width - 1
        edges = torch.nn.functional.pad(silent.int(), (1, 1)).diff(dim=1).abs().sum(dim=1)
        assert edges.max() == 4, "two stretches"
        assert len(silent.unique(dim=0)) > 100, "others in each example"
        assert silent[:, 0].any()
        assert silent[:, -2].any()
        assert not silent[:, -1].any(), "the last place is outside the range of starts"
    assert torch.equal(augment.eval()(torch.ones(2, 300, 64)), torch.ones(2, 300, 64))
    short = SpecAugment(count=1)(torch.ones(50, 10, 64)) == 0
    assert short.all(dim=2).sum(dim=1).max() == 4, "less than half"


def test_as_much_is_masked_as_by_torchlibrosa():
    """The share of mel bins that `torchlibrosa.augmentation.SpecAugmentation` 0.1.0 masks, computed exactly.

    It draws widths by `randint(0, 8)` and starts by `randint(0, 64 - width)`: both exclude the upper end.
    """
    masked_by_one = torch.zeros(64, dtype=torch.float64)
    for width in range(8):
        for start in range(64 - width):
            masked_by_one[start : start + width] += 1 / 8 / (64 - width)
    expected = 1 - (1 - masked_by_one).square()
    torch.manual_seed(0)
    masked = SpecAugment(time_width=0)(torch.ones(40_000, 1, 64))[:, 0] == 0
    assert masked.float().mean().item() == pytest.approx(expected.mean().item(), abs=5e-4)
    torch.testing.assert_close(masked.double().mean(dim=0), expected, atol=6e-3, rtol=0)


def test_widths_as_fractions():
    torch.manual_seed(0)
    spectrogram = torch.zeros(200, 50, 40)
    masked = SpecAugment(0.5, 0.5, count=1, value=-1.0)(spectrogram) != 0
    assert torch.equal(spectrogram, torch.zeros(200, 50, 40))
    for silent in (masked.all(dim=2), masked.all(dim=1)):
        shares = silent.float().mean(dim=1)
        assert 0.4 < shares.max() < 0.5
        assert 0.2 < shares.mean() < 0.3
        assert (silent.int().diff(dim=1).abs().sum(dim=1) <= 2).all(), "one stretch"
        assert silent[:, 0].any()
        assert silent[:, -2].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"band_width": -1}, "`band_width` has to be an integer of at least 0, but got -1"),
        ({"time_width": 1.0}, r"`time_width` has to be in \[0, 1\), but got 1.0"),
        ({"count": -1}, "`count` has to be an integer of at least 0, but got -1"),
    ],
)
def test_arguments_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        SpecAugment(**options)

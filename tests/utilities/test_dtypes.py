"""Half precision is for storage: computations are in float32, or in float64 for float64."""

import pytest
import torch

from ask_lightning.utilities.dtypes import computation_dtype


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_not_computed_with(stored):
    expected = torch.float64 if stored == torch.float64 else torch.float32
    assert computation_dtype(torch.ones(2, dtype=stored)) == expected

"""State dicts with the names and shapes of published weights."""

import torch

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def batch_norm(name: str, width: int) -> dict:
    """Shapes of the tensors of a batch normalisation by name."""
    return {f"{name}.{part}": (width,) for part in BATCH_NORM} | {f"{name}.num_batches_tracked": ()}


def random_state(shapes: dict) -> dict:
    """Random tensors of these shapes by name; variances are positive."""
    torch.manual_seed(0)
    return {
        name: torch.zeros((), dtype=torch.int64) if name.endswith("tracked") else torch.rand(shape) + 0.1
        for name, shape in shapes.items()
    }


def save_weights(content: dict, path) -> str:
    """Write a checkpoint file, and return its path."""
    torch.save(content, path)
    return str(path)

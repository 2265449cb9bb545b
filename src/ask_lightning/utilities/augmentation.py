"""Datasets without what changes from one reading to the next."""

import copy
from typing import Any

from torch.utils.data import ConcatDataset, Dataset, Subset


def without_augmentation(dataset: Dataset[Any]) -> Dataset[Any]:
    """The dataset as it may be stored: in a knowledge base, or in a file of embeddings.

    Args:
        dataset: A dataset. If it has a method `without_random_crops`, what this returns is taken in its
            place; so it is for the parts of a `Subset` and of a `ConcatDataset`.

    Returns:
        A dataset of the same items in the same order; others are returned as they are.

    Examples:
        >>> class Clips(list):
        ...     def without_random_crops(self):
        ...         return Clips(["middle"] * len(self))
        >>> Subset(Clips(["random", "random"]), [1])[0], without_augmentation(Subset(Clips(["", ""]), [1]))[0]
        ('random', 'middle')
    """
    method = getattr(dataset, "without_random_crops", None)
    if method is not None:
        plain: Dataset[Any] = method()
        return plain
    if isinstance(dataset, Subset):
        part = copy.copy(dataset)
        part.dataset = without_augmentation(part.dataset)
        return part
    if isinstance(dataset, ConcatDataset):
        joined = copy.copy(dataset)
        joined.datasets = [without_augmentation(part) for part in joined.datasets]
        return joined
    return dataset

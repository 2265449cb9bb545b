"""A batch, a knowledge base and the reference's answer, for the tests of `ReliabilityOTLoss`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ask_lightning.knowledge import KnowledgeBase
from ask_lightning.losses.reliability_ot import ReliabilityOTLoss
from tests.helpers import reference

# A hot softmax keeps losses away from 0, where relative comparisons say little.
TEMPERATURE = 0.3
PLAIN = {"injection_ratio": 0.0, "ot_factor": 0.0, "lambda_fine": 0.0, "lambda_coarse": 0.0}
GRANULARITIES = ("fine", "coarse")
# What the reference does not know: it takes the bases by name, and its value has no backward pass.
NOT_OF_THE_REFERENCE = ("granularities", "detach_plan", "modulation_gradient")


@dataclass
class Case:
    """Embeddings are not normalised; some clips appear twice in the batch and in the base."""

    audio: Tensor
    text: Tensor
    ids: Tensor
    base: KnowledgeBase

    def loss(self, audio: Tensor | None = None, text: Tensor | None = None, **options) -> Tensor:
        """The library's loss, with ids where the options need them."""
        module = make_loss(**options)
        audio, text = self.audio if audio is None else audio, self.text if text is None else text
        return module(audio, text, ids=self.ids if module.needs_ids else None, knowledge=self.base)

    def bases(self, granularities=GRANULARITIES) -> dict[str, reference.Base]:
        """The library's own base as float64 arrays."""
        sides = {name: getattr(self.base, name) for name in granularities}
        return {
            name: (side.audio.double().numpy(), side.text.double().numpy()) for name, side in sides.items()
        }

    def reference(self, audio=None, text=None, bases=None, **options) -> reference.Terms:
        """The reference's terms for the same arguments."""
        options = {"num_neighbors": 3, "temperature": TEMPERATURE, "granularities": GRANULARITIES} | options
        audio = self.audio.detach().double().numpy() if audio is None else audio
        text = self.text.detach().double().numpy() if text is None else text
        bases = bases or self.bases(options["granularities"])
        options = {name: value for name, value in options.items() if name not in NOT_OF_THE_REFERENCE}
        return reference.ask_loss(
            audio, text, bases, ids=self.ids.numpy(), base_ids=self.base.ids.numpy(), **options
        )

    def margin(self, num_neighbors: int = 3) -> float:
        """How far the retrieved rows are from changing."""
        u, v = (reference.unit_length(x.double().numpy()) for x in (self.audio, self.text))
        return min(
            reference.smallest_margin(queries, base, num_neighbors)
            for bases in self.bases().values()
            for queries, base in zip((u, v), bases, strict=True)
        )


def make_loss(**options) -> ReliabilityOTLoss:
    """With a few neighbours and the temperature of these tests."""
    return ReliabilityOTLoss(**({"num_neighbors": 3, "temperature": TEMPERATURE} | options))


def make_case(
    seed: int = 0,
    batch: int = 6,
    width: int = 5,
    pairs: int = 17,
    prototypes: int = 5,
    dtype: torch.dtype = torch.float64,
    **base_options,
) -> Case:
    """Pairs agree somewhat, in the batch as in the base."""
    generator = torch.Generator().manual_seed(seed)

    def agreeing(rows: int) -> tuple[Tensor, Tensor]:
        first, second = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
        return first.to(dtype), (0.7 * first + 0.7 * second).to(dtype)

    audio, text = agreeing(batch)
    ids = torch.randint(batch - 1, (batch,), generator=generator)
    base_ids = torch.arange(pairs) // 2
    base = KnowledgeBase.from_embeddings(
        *agreeing(pairs), ids=base_ids, num_prototypes=prototypes, **base_options
    )
    return Case(audio, text, ids, base)

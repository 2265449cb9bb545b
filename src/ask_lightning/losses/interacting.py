"""`InteractingLoss`: base of losses whose similarities may be those of tokens. Axes: `B` batch, `d` width."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ask_lightning.interaction import Embeddings, Similarities, TokenEmbeddings, as_similarities, pooled
from ask_lightning.losses.base import RetrievalLoss, SharedPositives, Temperature, is_name
from ask_lightning.utilities.distributed import Ranks

InteractionLike = Callable[[Any, Any], Similarities | Tensor]
"""A callable `(text, audio)` that returns `Similarities`, or one matrix `(B, B)` with texts as rows."""


class InteractingLoss(RetrievalLoss):
    """A loss of the similarities of a batch, which are those of pooled embeddings or of an interaction.

    What an interaction learns is the model's: it is an attribute of the model, and the loss is given its name
    or, like a learnable temperature, the attribute itself.

    Args:
        temperature: τ as `RetrievalLoss` takes it.
        positives: Kind of positives as `RetrievalLoss` takes it.
        interaction: How texts and audios are compared: the name of the wrapped model's attribute that is an
            `Interaction`, the interaction itself, or another callable `(text, audio)` that returns
            `Similarities` or one matrix `(B, B)` with texts as rows. It gets what the encoders returned, at
            unit length. None: dot product of the pooled embeddings; tokens play no part.
        gather: Whether the loss is computed over the batches of all ranks.

    Raises:
        TypeError: `interaction` is neither a name nor callable.

    Examples:
        >>> from ask_lightning.interaction import LateInteraction
        >>> from ask_lightning.losses import NTXentLoss
        >>> clips = TokenEmbeddings(torch.eye(4), torch.eye(4)[:, None])
        >>> loss = NTXentLoss(interaction=LateInteraction())
        >>> bool(loss(clips, clips) < 1e-3)
        True
    """

    takes_tokens: ClassVar[bool] = True

    def __init__(
        self,
        temperature: Temperature,
        *,
        positives: SharedPositives,
        interaction: InteractionLike | str | None,
        gather: bool,
    ) -> None:
        super().__init__(temperature, positives=positives, gather=gather)
        if not (interaction is None or callable(interaction) or is_name(interaction)):
            raise TypeError(
                "Argument `interaction` has to be None, the name of an attribute of the model, or a callable "
                f"(text, audio), but got {interaction!r}."
            )
        self.interaction = interaction

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments as values that a file can hold; `None` for those that it cannot."""
        named = isinstance(self.interaction, str)
        return super().options | {"interaction": self.interaction if named else _described(self.interaction)}

    @classmethod
    def _objects_in(cls, options: dict[str, Any]) -> list[str]:
        """The names of options that stand for an object."""
        stored = options.get("interaction")
        return [
            *super()._objects_in(options),
            *([] if stored is None or is_name(stored) else ["interaction"]),
        ]

    @property
    def is_bound(self) -> bool:
        """Whether the loss has a model to read scalars and the interaction from, or needs none."""
        return super().is_bound and bool(self._model or not isinstance(self.interaction, str))

    def bind(self, model: nn.Module) -> None:
        """Let the loss read from a model what is given by name or as a callable `(model)`.

        Args:
            model: The model that trains with this loss. A copy of the two together is bound to the copy.

        Raises:
            ValueError: The model has no attribute with the name of the interaction, or it is not callable.
        """
        super().bind(model)
        if isinstance(self.interaction, str) and not callable(found := self._present_interaction()):
            raise ValueError(
                f"Argument `interaction` has to name something callable of {type(model).__name__}, but "
                f"{self.interaction!r} is a {type(found).__name__}. Make it an Interaction."
            )

    def similarities(self, text: Embeddings, audio: Embeddings) -> Similarities:
        """The similarities of a batch, which are `(B, B)` in each direction.

        Args:
            text: Texts, as the interaction takes them.
            audio: Audios, as the interaction takes them.
        """
        compare = self._present_interaction()
        return as_similarities(pooled(text) @ pooled(audio).T if compare is None else compare(text, audio))

    def _present_interaction(self) -> InteractionLike | None:
        """The interaction itself, which may be known by its name."""
        if isinstance(self.interaction, str):
            return cast(InteractionLike, self._of_model("interaction", self.interaction))
        return self.interaction

    def zero(self, audio: Embeddings, text: Embeddings) -> Tensor:
        """Zero, with a gradient of zero to the embeddings and to everything that the loss learns.

        Args:
            audio: Audio embeddings of a batch.
            text: Text embeddings of a batch.
        """
        interaction = self._present_interaction()
        learned = interaction.parameters() if isinstance(interaction, nn.Module) else ()
        return super().zero(audio, text) + 0.0 * sum(parameter.float().sum() for parameter in learned)

    def compared(
        self, audio: Embeddings, text: Embeddings, *others: Tensor
    ) -> tuple[Embeddings, Embeddings, tuple[Tensor, ...]]:
        """What of the embeddings is compared, of all ranks if `gather` asks for it.

        Args:
            audio: Audio embeddings of this rank.
            text: Text embeddings of this rank.
            others: Tensors `(B, ...)` that are to be gathered in the same exchange.

        Returns:
            The audios and the texts, which are pooled if there is no interaction, and the other tensors.
        """
        if self.interaction is None:
            audio, text = pooled(audio), pooled(text)
        if not self._gathers_ranks:
            return audio, text, others
        sides = [_with_longest(side) for side in (audio, text)]
        tensors = [
            tensor
            for side in sides
            for tensor in ([side.pooled, side.tokens] if isinstance(side, TokenEmbeddings) else [side])
        ]
        gathered = list(self._rows_of_all_ranks(*tensors, *others))
        whole: list[Embeddings] = []
        for side in sides:
            if isinstance(side, TokenEmbeddings):
                mask = self._gathered(side.valid.to(torch.uint8)).bool()
                whole.append(TokenEmbeddings(gathered.pop(0), gathered.pop(0), mask))
            else:
                whole.append(gathered.pop(0))
        return whole[0], whole[1], tuple(gathered)


def _with_longest(side: Embeddings) -> Embeddings:
    """Embeddings with as many tokens a row as the rank with most has."""
    if not isinstance(side, TokenEmbeddings):
        return side
    length = side.tokens.shape[1]
    longest = Ranks.current().maximum(torch.tensor([length], device=side.tokens.device))
    missing = int(longest) - length
    return replace(side, tokens=pad(side.tokens, (0, 0, 0, missing)), mask=pad(side.valid, (0, missing)))


def _described(interaction: InteractionLike | str | None) -> str | None:
    return None if interaction is None else repr(interaction)

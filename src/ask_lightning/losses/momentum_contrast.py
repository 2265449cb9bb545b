"""`MomentumContrastLoss`: keys of momentum encoders, and a queue of them. Axes: `B` batch, `d` width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ask_lightning.functional import unit_length
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.losses.base import Encode, Positives, Temperature
from ask_lightning.losses.momentum_encoder import MomentumEncoder
from ask_lightning.losses.queued import QueuedLoss
from ask_lightning.utilities.arguments import check_count, check_fraction


class MomentumContrastLoss(QueuedLoss):
    """Contrast with keys that a momentum copy of the model makes of this and earlier batches (MoCo).

    The copy's weights are θ' ← m θ' + (1 - m) θ after each optimiser step, so that keys in the queue are
    those of nearly the same encoders. With U, V the embeddings of the batch, U', V' its keys and U°, V° the
    queues of audio and text keys:

        L = ½ [ CE(V [U'; U°]ᵀ / τ) + CE(U [V'; V°]ᵀ / τ) ]

    Keys have no gradient. They are encoded in the training mode of the model, dropout and batch norm
    included, by random numbers that the run does not miss.

    References:
        Momentum contrast, arXiv 1911.05722, with the candidates of ALBEF's image–text contrast (arXiv
        2107.07651, without its distillation): one queue for each modality, and the keys of the whole batch
        beside it. Batches are not shuffled among ranks for batch norm, as query and key of a pair
        come from different encoders.

    Requirements:
        `ASKModule`, which makes the keys; a module that calls the loss itself has to call `make_keys` before
        each training batch. Weights in float32 (`precision="bf16-mixed"` has them). The copy takes the memory
        of the model a second time, in checkpoints as well.

    Args:
        temperature: τ > 0: a number, the name of the wrapped model's attribute that *is* τ, a callable
            `(model)` that returns τ, or the model's own parameter that is τ.
        queue_size: Number of pairs whose keys are kept, at least 1; the paper has 65,536.
        momentum: m in [0, 1), the share of itself that the copy keeps at each optimiser step.
        positives: `"ids"`: other samples of the same clip, in the batch and in the queue, are left out of
            the denominator; needs ids. `"diagonal"`: they are negatives, a sample's own key of an earlier
            epoch among them.
        gather: `True`: the loss is over the batches of all ranks, with the gradient of one process that has
            them all. `False`: over the local batch and its keys, as in ALBEF. The queue is that of all ranks
            in either case.

    Attributes:
        last: Detached terms of the last call: `loss`; `key_similarity`, the mean similarity of embeddings
            and their own keys; `queue_fill`, the share of the queue that is filled;
            `same_clip_in_queue`, the number of keys left out for a sample, mean over the batch.

    Examples:
        >>> model = nn.Linear(4, 4)
        >>> loss = MomentumContrastLoss(queue_size=64)
        >>> audio, text = torch.eye(4), torch.eye(4)
        >>> loss.make_keys(model, lambda copy: (copy(audio), copy(text)), step=0)
        >>> loss(model(audio), model(text), ids=range(4)).shape
        torch.Size([])
    """

    needs_keys = True

    def __init__(
        self,
        temperature: Temperature = 0.07,
        queue_size: int = 4096,
        *,
        momentum: float = 0.999,
        positives: Positives = "ids",
        gather: bool = False,
    ) -> None:
        check_count("queue_size", queue_size)
        check_fraction("momentum", momentum)
        super().__init__(queue_size, temperature, positives=positives, gather=gather)
        self.queue_size = queue_size
        self.momentum = float(momentum)
        self._encoder = MomentumEncoder(self.momentum)
        self._keys: tuple[Tensor, Tensor] | None = None

    def extra_repr(self) -> str:
        """The options of the keys."""
        return f"queue_size={self.queue_size}, momentum={self.momentum}"

    def start(self, model: nn.Module, step: int) -> None:
        """Copy the model, see `RetrievalLoss`."""
        self._encoder.start(model, step)

    @torch.no_grad()
    def make_keys(self, model: nn.Module, encode: Encode, step: int) -> None:
        """Encode a batch with the copy, which follows the model first, see `RetrievalLoss`."""
        self._encoder.momentum = self.momentum  # a schedule may have changed it
        self._keys = encode(self._encoder.follow(model, step))

    def reset(self) -> None:
        """Forget the copy and the keys."""
        super().reset()
        self._encoder.clear()
        self._keys = None

    def training_state(self) -> dict[str, Any]:
        """The queue and the copy's weights."""
        return super().training_state() | {"encoder": self._encoder.state_dict()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on with the queue and the copy of another loss, see `RetrievalLoss`."""
        super().load_training_state(state)
        self._encoder.load_state_dict(state["encoder"])

    def compute(
        self, audio: Tensor, text: Tensor, ids: Tensor | None, knowledge: KnowledgeBase | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of unit embeddings and its terms; in evaluation it is NT-Xent.

        Raises:
            RuntimeError: There are no keys of the batch while training.
            ValueError: The keys are not as many as the embeddings, or of another width.
        """
        keys, self._keys = self._keys, None
        shape = audio.shape
        audio, text = self._rows_of_all_ranks(audio, text)  # (B, d)
        ids = None if ids is None else self._gathered(ids)
        if not self.training:
            return self._contrast(audio, text, ids)
        if keys is None:
            raise RuntimeError(
                "MomentumContrastLoss has no keys of this batch. Wrap the model: ASKModule(model, loss), or "
                "call `loss.make_keys(model, encode, step)` before each training batch."
            )
        if any(side.shape != shape for side in keys):
            raise ValueError(
                f"The keys of a batch have to be of the shape of its embeddings, {tuple(shape)}, but got "
                f"{tuple(keys[0].shape)} and {tuple(keys[1].shape)}. Let `encode` embed the same batch."
            )
        audio_keys, text_keys = (self._gathered(unit_length(side.to(audio.dtype))) for side in keys)
        loss, terms = self._contrast(audio, text, ids, audio_keys=audio_keys, text_keys=text_keys)
        self._remember(ids, audio=audio_keys, text=text_keys)
        similarity = 0.5 * ((audio * audio_keys).sum(dim=1) + (text * text_keys).sum(dim=1)).mean()
        return loss, terms | {"key_similarity": similarity}

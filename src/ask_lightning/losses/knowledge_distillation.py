"""`KnowledgeDistillationLoss`: stored knowledge as the teacher. Axes: `B` batch, `d` width."""

import torch
from torch import Tensor

from ask_lightning.functional.contrastive import nt_xent
from ask_lightning.functional.distillation import Teacher
from ask_lightning.interaction import Embeddings
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.losses.base import Positives, Temperature
from ask_lightning.losses.interacting import InteractingLoss, InteractionLike
from ask_lightning.losses.teacher import StoredTeacher


class KnowledgeDistillationLoss(InteractingLoss):
    """NT-Xent whose targets are softened by what the knowledge has stored of the batch's own clips.

    A batch holds pairs that match almost as well as the true ones: two rains, two dogs. The embeddings that
    the knowledge base has stored of the batch's clips, made by older encoders in evaluation mode from all
    captions of each clip, tell which. With U⁰, V⁰ these embeddings, S the similarities of the batch:

        P^{T→A} = softmax_rows(V⁰ U⁰ᵀ / τ_t)      P^{A→T} = softmax_rows(U⁰ V⁰ᵀ / τ_t)
        Y = (1 - α) I + α P
        L = ½ [ H(Y^{T→A}, softmax(S / τ)) + H(Y^{A→T}, softmax(Sᵀ / τ)) ]

    α = 0 is NT-Xent, a very large τ_t is label smoothing.

    References:
        Not of the ASK paper. Its relatives are ALBEF's momentum distillation (arXiv 2107.07651), whose
        teacher is a moving average of the weights, and estimated audio–caption correspondences (Primus et
        al., arXiv 2408.11641), whose teacher is trained to the end first. Here the teacher is the
        knowledge base that `KnowledgeRefreshCallback` renews every T epochs.

    Requirements:
        Clip ids, and a `KnowledgeBase` that holds the training clips, which are all that this loss looks up:
        the source of `KnowledgeRefreshCallback` is the training data, or a dataset of the same clips.

    Recommendations:
        The base of the untrained encoders is a useful teacher, too: start with it rather than with epochs of
        plain NT-Xent. Tune τ; it is higher than that of NT-Xent (0.1–0.2 in our experiments).

    Args:
        temperature: τ > 0 of the student: a number, the name of the wrapped model's attribute that *is* τ, a
            callable `(model)` that returns τ, or the model's own learnable parameter that is τ.
        distillation_weight: α in [0, 1], the teacher's share of the targets.
        teacher_temperature: τ_t > 0.
        teacher: `"softmax"`, or `"transport"`: the targets are a transport plan of the stored
            similarities, so that no clip is the target of many.
        positives: `"diagonal"`, or `"ids"`: other samples of the same clip leave the denominator and
            are nobody's target.
        interaction: How texts and audios are compared: None is the dot product of pooled embeddings; others
            are the name of the model's attribute that is an `Interaction`, the interaction itself, or another
            callable `(text, audio)` that returns `Similarities` or one matrix `(B, B)` with texts as rows.
            The teacher always compares the pooled embeddings that the knowledge has stored.
        gather: Over the batches of all ranks, see `RetrievalLoss`.

    Attributes:
        knowledge: The `KnowledgeBase` in use, or `None`.
        last: Detached terms of the last call: `loss`; `contrastive`, NT-Xent of the same batch at the same
            temperature; `target_entropy` in nats and `target_diagonal`, the mean target of the own pair;
            `unknown_clips` and `known_clips`, the numbers of samples whose clip the knowledge lacks or holds.

    Examples:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> audio, text = torch.randn(2, 100, 16, generator=generator)
        >>> loss = KnowledgeDistillationLoss(temperature=0.15)
        >>> loss.knowledge = KnowledgeBase.from_embeddings(audio, text, ids=range(100), num_prototypes=8)
        >>> loss(audio[:32], text[:32], ids=range(32)).shape
        torch.Size([])
    """

    reads_other_clips = False

    def __init__(
        self,
        temperature: Temperature = 0.07,
        distillation_weight: float = 0.7,
        teacher_temperature: float = 0.1,
        *,
        teacher: Teacher = "softmax",
        positives: Positives = "diagonal",
        interaction: InteractionLike | str | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__(temperature, positives=positives, interaction=interaction, gather=gather)
        # NumPy numbers would make checkpoints that `weights_only=True` refuses.
        self.distillation_weight = float(distillation_weight)
        self.teacher_temperature = float(teacher_temperature)
        self.teacher: Teacher = teacher
        self._stored_teacher.check()

    @property
    def needs_ids(self) -> bool:
        """Always: the knowledge of a sample is found by its clip."""
        return True

    @property
    def needs_training_clips(self) -> bool:
        """Always: the teacher's embeddings are those of the training clips."""
        return True

    @property
    def needs_prototypes(self) -> bool:
        """Never: the teacher reads the rows of clips."""
        return False

    @property
    def _stored_teacher(self) -> StoredTeacher:
        """The teacher by the options as they are now, which a schedule may change."""
        return StoredTeacher(self.distillation_weight, self.teacher_temperature, self.teacher)

    def check_knowledge(self, knowledge: KnowledgeBase) -> None:
        """Prepare a base for lookups; none is refused.

        Args:
            knowledge: The new base.
        """
        knowledge.prepare(clips=True)

    def extra_repr(self) -> str:
        """The options that decide what the targets are."""
        names = ("distillation_weight", "teacher_temperature", "teacher")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def compute(
        self, audio: Embeddings, text: Embeddings, ids: Tensor | None, knowledge: KnowledgeBase | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of unit embeddings and its terms; without knowledge, in evaluation, it is NT-Xent."""
        assert ids is not None
        audio, text, _ = self.compared(audio, text)  # (B, d)
        ignore = self._same_clip(ids)
        to_audio, to_text, _ = self.similarities(text, audio)  # (B, B) each
        # Beside a teacher it is only logged.
        with torch.set_grad_enabled(knowledge is None and torch.is_grad_enabled()):
            plain = 0.5 * (
                nt_xent(to_audio, self.temperature, ignore=ignore)
                + nt_xent(to_text, self.temperature, ignore=ignore)
            )
        if knowledge is None:
            return plain, {"loss": plain}
        targets = self._stored_teacher.targets(
            knowledge, ids, ignore=ignore, dtype=to_audio.dtype, gather=self._gathered
        )
        loss = 0.5 * (
            nt_xent(to_audio, self.temperature, targets=targets.t2a, ignore=ignore)
            + nt_xent(to_text, self.temperature, targets=targets.a2t, ignore=ignore)
        )
        return loss, {"loss": loss, "contrastive": plain} | targets.terms()

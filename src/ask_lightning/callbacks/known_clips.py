"""Whether a teacher knows any of the clips that are trained."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from ask_lightning.losses.base import RetrievalLoss
from ask_lightning.utilities.distributed import Ranks


class KnownClips:
    """Counts the samples of an epoch whose clips the knowledge holds, for a loss with a teacher."""

    def __init__(self) -> None:
        self._known: Tensor | None = None

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Take a training step into account.

        Args:
            terms: The terms of its loss; those of a loss without a teacher count nothing.
        """
        known = terms.get("known_clips")
        if known is not None:
            # A copy, because the next step of a compiled loss may write over its terms.
            self._known = known.clone() if self._known is None else self._known + known

    def check(self, loss: RetrievalLoss) -> None:
        """Warn at the end of an epoch in which no clip was known, and begin anew; collective with a teacher.

        Args:
            loss: The loss of the steps.
        """
        known, self._known = self._known, None
        if not loss.needs_training_clips:
            return
        counts = Ranks.current().all_gather_object(None if known is None else int(known))
        counted = [count for count in counts if count is not None]
        if counted and not any(counted):
            rank_zero_warn(
                f"The knowledge has none of the clips of this epoch's batches, so {type(loss).__name__} was "
                "trained without a teacher: the targets were the diagonal. Pass clip ids that are the same "
                "whenever a clip is read, ASKModule(..., ids=...), and let the knowledge hold all training "
                "clips: leave `max_rows` of KnowledgeRefreshCallback and a `source` of other clips out, and "
                "refresh it when the training data change. A base of your own needs the `ids` of these clips."
            )

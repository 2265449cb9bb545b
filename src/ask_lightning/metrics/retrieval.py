"""`AudioTextRetrieval`: the scores of `functional.py` as a metric of torchmetrics."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from ask_lightning.functional.calibration import Calibration
from ask_lightning.interaction import (
    Embeddings,
    Similarities,
    TokenEmbeddings,
    pooled,
    rows_of,
    with_padding,
    without_padding,
)
from ask_lightning.metrics.calibration import CALIBRATIONS, QueryBank, calibrated_ranks, choose_calibration
from ask_lightning.metrics.functional import (
    RetrievalRanks,
    check_rows,
    merge_duplicates,
    retrieval_ranks,
    retrieval_scores,
)
from ask_lightning.metrics.interaction import interaction_ranks
from ask_lightning.metrics.table import CALIBRATED
from ask_lightning.utilities.arguments import check_count
from ask_lightning.utilities.clip_ids import integer_ids

_SIDES = ("audio", "text")


class AudioTextRetrieval(Metric):
    """The scores of audio–text retrieval in both directions, as one metric that returns a dictionary.

    | key | meaning | range |
    |---|---|---|
    | `a2t/recall_at_1`, `_5`, `_10` | share of clips, the queries, with an own caption at rank ≤ k | [0, 1] |
    | `a2t/map_at_10` | mean average precision, cut at 10, over a clip's captions | [0, 1] |
    | `a2t/median_rank` | median over clips of the best rank of an own caption | ≥ 1 |
    | `t2a/recall_at_1`, `_5`, `_10` | share of captions, the queries, whose clip is at rank ≤ k | [0, 1] |
    | `t2a/map_at_10` | mean reciprocal rank, 0 beyond 10 | [0, 1] |
    | `t2a/median_rank` | median over captions of their clip's rank | ≥ 1 |

    Recalls are fractions; times 100 they are the percentages of papers. `a2t/recall_at_k` is the hit rate
    of `torchmetrics.retrieval.RetrievalHitRate`. `retrieval_scores` has the exact definitions,
    `retrieval_ranks` those of clips and ties.

    **Several processes.** Rows are gathered before they are ranked, so the result is exactly that of one
    process with all rows. A process without rows has to call `update` with empty `(0, d)` tensors.
    Lightning's `DistributedSampler` repeats a few rows to give each process equally many. Such a repeated
    row counts as one more caption: it is one more query, one more competitor of other clips, and one more
    own caption. Pass `caption_ids` to have the repetitions dropped, or evaluate on one device.

    **Calibrated search.** After `calibrate(bank, calibration)` the result holds each score twice: by cosine
    similarity under the names above, and of calibrated search under `calibrated/a2t/recall_at_1` and so on.
    The bank holds training pairs; kind and parameters are chosen on validation pairs by `choose_calibration`.

    **Token-level similarity.** With an interaction, `update` takes `TokenEmbeddings`, and rows are ranked by
    it as `interaction_ranks` describes.

    **Memory.** The metric holds all embeddings of an epoch, in float32, until `reset`; with an interaction
    also those of all tokens, and in `compute` two score matrices of captions and clips.

    Args:
        top_k: Cut-offs of the recalls, each at least 1.
        map_k: Cut-off of the mean average precision, at least 1.
        block_size: Side of the largest block of scores, at least 1. It changes speed and memory, not results.
        interaction: How texts and audios are compared: an `Interaction`, which stays part of the model, or
            another callable `(text, audio)` that returns similarities. None: by the cosine similarity of
            pooled embeddings.
        **kwargs: Arguments of `torchmetrics.Metric`, for example `compute_on_cpu=True`.

    Raises:
        ValueError: At construction if a cut-off or `block_size` is not a positive integer or `top_k` is
            empty; in `compute` if there are no rows, or an embedding has NaN or Inf.

    Examples:
        A `LightningModule` with `self.metrics = AudioTextRetrieval()` calls
        `self.metrics.update(audio, text, batch["clip_id"])` in its `validation_step` and, in its
        `on_validation_epoch_end`, `self.log_dict({f"val/{k}": v for k, v in self.metrics.compute().items()})`
        and `self.metrics.reset()`. By hand:

        >>> from ask_lightning.metrics import AudioTextRetrieval
        >>> metric = AudioTextRetrieval(top_k=[1])
        >>> clips = torch.eye(3)
        >>> metric.update(clips, clips[[0, 2, 1]], ["dog.wav", "rain.wav", "bell.wav"])
        >>> metric.update(clips[:1], clips[:1], ["dog.wav"])  # another caption of the first clip
        >>> {name: round(score.item(), 2) for name, score in metric.compute().items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'a2t/recall_at_1': 0.33, 'a2t/map_at_10': 0.5, 'a2t/median_rank': 4.0,
         't2a/recall_at_1': 0.5, 't2a/map_at_10': 0.67, 't2a/median_rank': 2.0}
    """

    is_differentiable = False
    full_state_update = False

    audio: list[Tensor]
    text: list[Tensor]
    clip_ids: list[Tensor]
    caption_ids: list[Tensor]

    def __init__(
        self,
        top_k: Sequence[int] = (1, 5, 10),
        map_k: int = 10,
        block_size: int = 2048,
        interaction: Callable[[Any, Any], Similarities | Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not top_k:
            raise ValueError(
                "Argument `top_k` has to name at least one cut-off, but got none. Pass e.g. [1, 5, 10]."
            )
        for k in top_k:
            check_count("top_k", k)
        check_count("map_k", map_k)
        check_count("block_size", block_size)
        self.top_k = tuple(top_k)
        self.map_k = map_k
        self.block_size = block_size
        self._bank: QueryBank | None = None
        self._calibration = Calibration()
        # In a tuple, because the interaction's parameters are the model's.
        self._interaction: tuple[Callable[[Any, Any], Similarities | Tensor], ...] = (
            () if interaction is None else (interaction,)
        )
        of_tokens = [f"{side}_{part}" for side in _SIDES for part in ("tokens", "lengths")]
        for state in ("audio", "text", "clip_ids", "caption_ids", *(of_tokens if interaction else ())):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    @property
    def interaction(self) -> Callable[[Any, Any], Similarities | Tensor] | None:
        """What rows are ranked by; None for the cosine similarity of pooled embeddings."""
        return self._interaction[0] if self._interaction else None

    @property
    def score_names(self) -> tuple[str, ...]:
        """The keys of the result, in its order."""
        one_way = (*(f"recall_at_{k}" for k in self.top_k), f"map_at_{self.map_k}", "median_rank")
        searches = ("",) if self._bank is None else ("", CALIBRATED)
        return tuple(
            f"{search}{direction}/{name}"
            for search in searches
            for direction in ("a2t", "t2a")
            for name in one_way
        )

    def calibrate(self, bank: QueryBank | None, calibration: Calibration | None = None) -> None:
        """Report calibrated search as well from now on, whatever is reset.

        Args:
            bank: Training pairs, the same in every process. None: report cosine similarity only.
            calibration: Kind and parameters, as `choose_calibration` found them on validation pairs. None:
                the default ones.

        Raises:
            ValueError: The metric ranks by an interaction.
        """
        if bank is not None and self._interaction:
            raise ValueError(
                "Calibrated search is of cosine similarities, but this metric ranks by an interaction. Leave "
                "`interaction` or the calibration out."
            )
        self._bank = bank
        self._calibration = calibration or Calibration()
        self._computed = None

    def choose_calibration(
        self, bank: QueryBank, calibrations: Sequence[Calibration] = CALIBRATIONS
    ) -> Calibration:
        """Choose the calibration with the highest mean recall on the rows since the last reset.

        The rows have to be those of the validation split. Where there are several processes, all have to call
        this, and all get the same answer. The choice changes nothing; pass it to the `calibrate` of the
        metric of the test split.

        Args:
            bank: Training pairs, the same in every process.
            calibrations: Kinds and parameters to choose from; of equally good ones the first is taken.

        Raises:
            ValueError: If there are no rows, an embedding has NaN or Inf, or the bank is of another width.

        Examples:
            >>> val_metric, test_metric = AudioTextRetrieval(), AudioTextRetrieval()
            >>> val_metric.update(torch.eye(3), torch.eye(3), [1, 2, 3])
            >>> bank = QueryBank.from_pairs(torch.eye(3), torch.eye(3), torch.arange(3))
            >>> test_metric.calibrate(bank, val_metric.choose_calibration(bank))
            >>> test_metric.score_names[-1]
            'calibrated/t2a/median_rank'
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn,
            process_group=self.process_group,
            distributed_available=self.distributed_available_fn,
        ):
            rows = self._rows()
        return choose_calibration(*rows, bank.to(rows[0].device), calibrations, block_size=self.block_size)

    def update(
        self,
        audio: Embeddings,
        text: Embeddings,
        clip_ids: Tensor | Sequence[int | str],
        caption_ids: Tensor | Sequence[int | str] | None = None,
    ) -> None:
        """Add a batch with one row for each caption.

        Args:
            audio: Audio embeddings `(B, d)`, floating, of any length, or `TokenEmbeddings`, which an
                interaction needs. Row i is the clip that caption i describes. The directions of the rows of
                one clip are averaged; with an interaction its first row stands for it.
            text: Text embeddings of the same kind. Row i is caption i.
            clip_ids: Ids of the clips, `(B,)` integers or strings. Equal ids are the same clip.
            caption_ids: Ids of the captions, `(B,)` integers or strings, unique at least within their clip.
                Rows with the same clip and caption count once. Pass them in every update or in none.

        Raises:
            TypeError: If the metric has an interaction and embeddings have no tokens.
            ValueError: If shapes or dtypes do not fit, or `caption_ids` is given in some updates only.
        """
        tokens = [side for side in (audio, text) if isinstance(side, TokenEmbeddings)]
        if self._interaction and len(tokens) < 2:
            raise TypeError(
                "An AudioTextRetrieval with an interaction takes TokenEmbeddings of both sides, but got a "
                f"{type(audio).__name__} and a {type(text).__name__}."
            )
        audio, text = pooled(audio), pooled(text)
        clips = integer_ids(clip_ids, name="clip_ids").to(audio.device)
        check_rows(audio, text, clips)
        if self.audio and (caption_ids is None) != (not self.caption_ids):
            raise ValueError(
                "Argument `caption_ids` has to be given in every update or in none, but got both since the "
                "last reset. Call `reset` between evaluations."
            )
        if caption_ids is not None:
            captions = integer_ids(caption_ids, name="caption_ids").to(audio.device)
            if captions.shape != clips.shape:
                raise ValueError(
                    f"Argument `caption_ids` has to be of shape {tuple(clips.shape)}, one for each row, but "
                    f"got {tuple(captions.shape)}."
                )
            self.caption_ids.append(captions)
        # A view (of the first token, say) would keep the whole tensor in memory until the reset, so copy.
        self.audio.append(audio.detach().to(torch.float32, copy=True))
        self.text.append(text.detach().to(torch.float32, copy=True))
        self.clip_ids.append(clips)
        for name, side in zip(_SIDES, tokens if self._interaction else (), strict=False):
            stored, lengths = without_padding(side)
            getattr(self, f"{name}_tokens").append(stored.detach().to(torch.float32, copy=True))
            getattr(self, f"{name}_lengths").append(lengths)

    def compute(self) -> dict[str, Tensor]:
        """Rank all rows that were added since the last reset.

        Returns:
            0-d float32 tensors under the names in `score_names`.

        Raises:
            ValueError: If there are no rows, an embedding or a score of the interaction has NaN or Inf, or
                the bank is of another width.
        """
        if self._interaction:
            return retrieval_scores(self._interaction_ranks(), self.top_k, self.map_k)
        rows = self._rows()
        scores = retrieval_scores(retrieval_ranks(*rows, block_size=self.block_size), self.top_k, self.map_k)
        if self._bank is None:
            return scores
        bank = self._bank.to(rows[0].device)
        (ranks,) = calibrated_ranks(*rows, bank, [self._calibration], block_size=self.block_size)
        calibrated = retrieval_scores(ranks, self.top_k, self.map_k)
        return scores | {f"{CALIBRATED}{name}": score for name, score in calibrated.items()}

    def _interaction_ranks(self) -> RetrievalRanks:
        """The ranks of all rows by the interaction, without repeated rows."""
        self._check_updated()
        audio, text = (
            with_padding(
                *(dim_zero_cat(getattr(self, f"{side}{part}")) for part in ("", "_tokens", "_lengths"))
            )
            for side in _SIDES
        )
        clips = dim_zero_cat(self.clip_ids)
        if len(self.caption_ids):
            pairs = torch.stack([clips, dim_zero_cat(self.caption_ids)], dim=1)  # (N, 2)
            _, number = torch.unique(pairs, dim=0, return_inverse=True)
            numbers = torch.arange(len(number), device=number.device)
            kept = numbers.new_full((int(number.max()) + 1,), len(number)).scatter_reduce(
                0, number, numbers, "amin"
            )
            audio, text, clips = rows_of(audio, kept), rows_of(text, kept), clips[kept]
        (interaction,) = self._interaction
        return interaction_ranks(audio, text, clips, interaction, block_size=min(self.block_size, 256))

    def _check_updated(self) -> None:
        """Refuse to rank nothing."""
        if len(self.audio) == 0:
            raise ValueError(
                "There are no rows to rank. Call `update(audio, text, clip_ids)` before `compute`, "
                "in each process."
            )

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Audio, text and clip ids of all rows, without repeated ones."""
        self._check_updated()
        audio, text, clips = (dim_zero_cat(state) for state in (self.audio, self.text, self.clip_ids))
        if audio.device.type == "mps":  # which has no float64
            audio, text, clips = audio.cpu(), text.cpu(), clips.cpu()
        if len(self.caption_ids):  # a list here, but a tensor after a synchronisation
            captions = dim_zero_cat(self.caption_ids).to(clips.device)
            audio, text, clips = merge_duplicates(audio, text, clips, captions)
        return audio, text, clips

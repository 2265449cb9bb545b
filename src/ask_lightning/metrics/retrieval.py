"""The stateful shell around `functional.py`: metrics for audio–text retrieval."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.wrappers.abstract import WrapperMetric

from ask_lightning.metrics.functional import check_rows, merge_duplicates, retrieval_ranks, retrieval_scores
from ask_lightning.utilities.clip_ids import integer_ids


class AudioTextRetrieval(Metric):
    """All scores of audio–text retrieval in both directions, as one metric that returns a dictionary.

    `retrieval_metrics` offers the same numbers as a `MetricCollection`, which `self.log_dict` can log;
    take this class to compute them elsewhere. The definitions are those of `retrieval_scores` and
    `retrieval_ranks`: several captions per clip in any order, ties against the model, recalls as fractions.

    **Several processes.** Rows are gathered before they are ranked, so the result is exactly that of one
    process with all rows. A process without rows has to call `update` with empty `(0, d)` tensors.
    Lightning's `DistributedSampler` repeats a few rows to give each process equally many. Such a repeated
    row counts as one more caption: it is one more query, one more competitor of other clips, and one more
    own caption. Pass `caption_ids` to have the repetitions dropped, or evaluate on one device.

    **Memory.** All embeddings of an epoch, in float32, until `reset`.

    Args:
        top_k: Cut-offs of the recalls, each at least 1.
        map_k: Cut-off of the mean average precision, at least 1.
        block_size: At most `block_size`² scores exist at a time. Changes speed and memory, not results.
        **kwargs: Passed to `torchmetrics.Metric`, for example `compute_on_cpu=True`.

    Raises:
        ValueError: At construction if a cut-off or `block_size` is not a positive integer or `top_k` is
            empty; in `compute` if there are no rows, or an embedding has NaN or Inf.

    Examples:
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
        self, top_k: Sequence[int] = (1, 5, 10), map_k: int = 10, block_size: int = 2048, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not top_k:
            raise ValueError(
                "Argument `top_k` has to name at least one cut-off but got none. Pass e.g. [1, 5, 10]."
            )
        for name, value in [*(("top_k", k) for k in top_k), ("map_k", map_k), ("block_size", block_size)]:
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"Argument `{name}` has to be at least 1, and an integer, but got {value!r}."
                )
        self.top_k = tuple(top_k)
        self.map_k = map_k
        self.block_size = block_size
        for state in ("audio", "text", "clip_ids", "caption_ids"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    @property
    def score_names(self) -> tuple[str, ...]:
        """The keys of the result, in its order."""
        one_way = (*(f"recall_at_{k}" for k in self.top_k), f"map_at_{self.map_k}", "median_rank")
        return tuple(f"{direction}/{name}" for direction in ("a2t", "t2a") for name in one_way)

    def update(
        self,
        audio: Tensor,
        text: Tensor,
        clip_ids: Tensor | Sequence[int | str],
        caption_ids: Tensor | Sequence[int | str] | None = None,
    ) -> None:
        """Take in one row a caption.

        Args:
            audio: `(B, d)`, floating, of any length; row i is the clip that caption i describes. The
                rows of one clip are averaged in direction.
            text: `(B, d)`, row i is caption i.
            clip_ids: `(B,)` integers or strings; equal ids are the same clip.
            caption_ids: `(B,)` integers or strings, unique within their clip at least. If given, rows with
                the same clip and caption count once. To be given in every update or in none.

        Raises:
            ValueError: If shapes or dtypes do not fit, or `caption_ids` is given in some updates only.
        """
        clips = integer_ids(clip_ids, name="clip_ids").to(audio.device)
        check_rows(audio, text, clips)
        if self.audio and (caption_ids is None) != (not self.caption_ids):
            raise ValueError(
                "Argument `caption_ids` has to be given in every update or in none but got both since the "
                "last reset. Call `reset` between evaluations."
            )
        if caption_ids is not None:
            captions = integer_ids(caption_ids, name="caption_ids").to(audio.device)
            if captions.shape != clips.shape:
                raise ValueError(
                    f"Argument `caption_ids` has to be of shape {tuple(clips.shape)}, one a row, but got "
                    f"{tuple(captions.shape)}."
                )
            self.caption_ids.append(captions)
        # A copy, for a view (the first token, say) would keep all that it is a view of until the reset.
        self.audio.append(audio.detach().to(torch.float32, copy=True))
        self.text.append(text.detach().to(torch.float32, copy=True))
        self.clip_ids.append(clips)

    def compute(self) -> dict[str, Tensor]:
        """Rank all rows since the last reset.

        Returns:
            One 0-d float32 tensor a key of `score_names`.

        Raises:
            ValueError: If there are no rows, or an embedding has NaN or Inf.
        """
        if len(self.audio) == 0:
            raise ValueError(
                "There are no rows to rank. Call `update(audio, text, clip_ids)` before `compute`, "
                "in each process."
            )
        audio, text, clips = (dim_zero_cat(state) for state in (self.audio, self.text, self.clip_ids))
        if audio.device.type == "mps":  # which has no float64
            audio, text, clips = audio.cpu(), text.cpu(), clips.cpu()
        if len(self.caption_ids):  # a list here, but a tensor after a synchronisation
            captions = dim_zero_cat(self.caption_ids).to(clips.device)
            audio, text, clips = merge_duplicates(audio, text, clips, captions)
        ranks = retrieval_ranks(audio, text, clips, block_size=self.block_size)
        return retrieval_scores(ranks, self.top_k, self.map_k)


class RetrievalScore(WrapperMetric):
    """One number of an `AudioTextRetrieval` as a metric of its own, so that Lightning can log it.

    It has no state. All scores of one collection read the result of one `AudioTextRetrieval`, which keeps
    it until the next update: there is one copy of the embeddings, one synchronisation and one ranking.

    Args:
        source: The metric to read from.
        score_name: Which of its `score_names`.

    Examples:
        >>> from ask_lightning.metrics import AudioTextRetrieval
        >>> source = AudioTextRetrieval()
        >>> score = RetrievalScore(source, "a2t/recall_at_1")
        >>> source.update(torch.eye(2), torch.eye(2), [0, 1])
        >>> score.compute()
        tensor(1.)
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, source: AudioTextRetrieval, score_name: str) -> None:
        super().__init__()
        self.source = source
        self.score_name = score_name

    def update(self, *_: Any, **__: Any) -> None:
        """Refuse: with ten scores on one source, every row would be taken in ten times."""
        raise RuntimeError(
            f"`{self.score_name}` cannot be updated on its own. Update the collection that "
            "`retrieval_metrics` returned, and keep it beside other collections, not inside."
        )

    def compute(self) -> Tensor:
        """Read the score.

        Returns:
            0-d float32.
        """
        scores: dict[str, Tensor] = self.source.compute()
        return scores[self.score_name]

    def reset(self) -> None:
        """Forget all rows, for the other scores of the same source too."""
        super().reset()
        self.source.reset()


class RetrievalMetrics(MetricCollection):
    """The scores of one `AudioTextRetrieval`, each under its own name; made by `retrieval_metrics`.

    Args:
        source: The metric that holds the rows and ranks them.
        prefix: Put in front of every name.

    Examples:
        >>> from ask_lightning.metrics import AudioTextRetrieval
        >>> RetrievalMetrics(AudioTextRetrieval(top_k=[1]), prefix="val/")["val/a2t/recall_at_1"].score_name
        'a2t/recall_at_1'
    """

    def __init__(self, source: AudioTextRetrieval, prefix: str = "") -> None:
        scores: dict[str, Metric | MetricCollection] = {
            name: RetrievalScore(source, name) for name in source.score_names
        }
        # Compute groups share states among equal metrics, but rank once for each. Here one metric does both.
        super().__init__(scores, prefix=prefix, compute_groups=False)

    @property
    def source(self) -> AudioTextRetrieval:
        """The metric that holds the rows; found through a score, for a member here would be logged too."""
        score = next(iter(self.values(copy_state=False)))
        assert isinstance(score, RetrievalScore)
        return score.source

    def update(  # type: ignore[override]  # of `ModuleDict.update`, as torchmetrics does
        self,
        audio: Tensor,
        text: Tensor,
        clip_ids: Tensor | Sequence[int | str],
        caption_ids: Tensor | Sequence[int | str] | None = None,
    ) -> None:
        """Take in one row a caption; the arguments are those of `AudioTextRetrieval.update`."""
        self.source.update(audio, text, clip_ids, caption_ids)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Take in rows and return the scores among them alone.

        torchmetrics copies all earlier rows for this; call `update` where the epoch's scores are enough.

        Args:
            *args: Those of `update`.
            **kwargs: Those of `update`.

        Returns:
            One 0-d float32 tensor a name.
        """
        batch: dict[str, Tensor] = self.source(*args, **kwargs)
        for name, score in self.items(keep_base=True, copy_state=False):
            # What `self.log_dict(…, on_step=True)` reads.
            score._forward_cache = batch[name]  # type: ignore[assignment]
        return {self._set_name(name): score for name, score in batch.items()}


def retrieval_metrics(
    prefix: str = "",
    top_k: Sequence[int] = (1, 5, 10),
    *,
    map_k: int = 10,
    block_size: int = 2048,
    **kwargs: Any,
) -> RetrievalMetrics:
    """Make the metrics of audio–text retrieval, ready for `self.log_dict`.

    | result (after the prefix) | meaning | range |
    |---|---|---|
    | `a2t/recall_at_1`, `_5`, `_10` | share of clips, the queries, with an own caption at rank ≤ k | [0, 1] |
    | `a2t/map_at_10` | mean average precision, cut at 10, over a clip's captions | [0, 1] |
    | `a2t/median_rank` | median over clips of the best rank of an own caption | ≥ 1 |
    | `t2a/recall_at_1`, `_5`, `_10` | share of captions, the queries, whose clip is at rank ≤ k | [0, 1] |
    | `t2a/map_at_10` | mean reciprocal rank, 0 beyond 10 | [0, 1] |
    | `t2a/median_rank` | median over captions of their clip's rank | ≥ 1 |

    Recalls are fractions; times 100 they are the percentages of papers. `a2t/recall_at_k` is the hit rate
    of `torchmetrics.retrieval.RetrievalHitRate`. `retrieval_scores` has the exact definitions,
    `retrieval_ranks` those of clips and ties, `AudioTextRetrieval` what to know about several processes.

    Args:
        prefix: Put in front of every name, e.g. `"val/"`. `clone(prefix="test/")` makes a second set.
        top_k: Cut-offs of the recalls, each at least 1.
        map_k: Cut-off of the mean average precision, at least 1.
        block_size: At most `block_size`² scores exist at a time. Changes speed and memory, not results.
        **kwargs: Passed to `torchmetrics.Metric`, for example `compute_on_cpu=True`.

    Returns:
        A `MetricCollection` with `update(audio, text, clip_ids, caption_ids=None)`.

    Raises:
        ValueError: If a cut-off or `block_size` is not a positive integer, or `top_k` is empty.

    Examples:
        In a `LightningModule`, `self.metrics = retrieval_metrics("val/")` in `__init__` and in
        `validation_step` first `self.metrics.update(audio, text, ids)`, then `self.log_dict(self.metrics)`.
        By hand:

        >>> from ask_lightning.metrics import retrieval_metrics
        >>> metrics = retrieval_metrics("val/", top_k=[1])
        >>> metrics.update(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]], clip_ids=[10, 11, 12, 13])
        >>> for name, score in metrics.compute().items():
        ...     print(name, round(score.item(), 3))
        val/a2t/map_at_10 0.625
        val/a2t/median_rank 2.5
        val/a2t/recall_at_1 0.5
        val/t2a/map_at_10 0.625
        val/t2a/median_rank 2.5
        val/t2a/recall_at_1 0.5
    """
    return RetrievalMetrics(AudioTextRetrieval(top_k, map_k, block_size, **kwargs), prefix=prefix)

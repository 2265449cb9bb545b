"""`ask-lightning search`: a text against encoded clips, or an audio file against encoded captions."""

import json
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from ask_lightning.cli.encoded_pairs import EncodedPairs, Side
from ask_lightning.cli.errors import UsageError, usage_errors
from ask_lightning.cli.model_section import load_class, make_model
from ask_lightning.cli.row_search import best_rows
from ask_lightning.cli.search_flags import RERANKED, parse_search_flags
from ask_lightning.cli.search_index import choose_index
from ask_lightning.cli.word_filter import WordFilter
from ask_lightning.data.audio.decoding import check_recording, open_audio, read_segment
from ask_lightning.data.audio.near_names import near_file
from ask_lightning.data.audio.options import AudioOptions
from ask_lightning.data.audio.stores import FileStore
from ask_lightning.data.caption_style import style_caption
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.clips import Clip
from ask_lightning.encoding.encoders import call_encoder, encoder_name, find_encoders, find_interaction
from ask_lightning.encoding.outputs import as_encoded
from ask_lightning.interaction import Embeddings, Interaction, TokenEmbeddings, pooled, unit_embeddings
from ask_lightning.knowledge.exact_search import Search
from ask_lightning.metrics import HubCalibration
from ask_lightning.models import from_pretrained, load_calibration
from ask_lightning.models.stored_calibration import calibration_fingerprint
from ask_lightning.utilities.text_tables import Cell, print_table
from ask_lightning.utilities.weights import weights_fingerprint

_MAX_SECONDS = 30.0
_BLOCK = 1024


@dataclass(frozen=True)
class Hit:
    """One result of a search.

    Attributes:
        score: What the hits are sorted by: the score of the model's interaction or the calibrated one, or the
            cosine if there is neither.
        cosine: Cosine similarity of query and result.
        clip: Name of the clip.
        caption: The caption that was found, or the first caption of the clip that was found.
        row: Row of the clip in the encoded file.
    """

    score: float
    cosine: float
    clip: str
    caption: str
    row: int


def search(arguments: Sequence[str]) -> list[Hit]:
    """Search an encoded file and print the hits.

    Args:
        arguments: What follows `search` on the command line.

    Returns:
        The hits, best first.

    Raises:
        UsageError: The command line, the encoded file or the query cannot be used.
    """
    options = parse_search_flags(arguments)
    if options.text is None and not options.audio.exists():
        near = near_file(options.audio)
        raise UsageError(f"There is no audio file {options.audio}." + (f" There is {near}." if near else ""))
    pairs = EncodedPairs.load(options.encoded)
    if options.raw:
        pairs.calibration = None
    with usage_errors():
        model = load_model(pairs, options.ckpt_path)
        if not options.raw:
            calibrate_by_model(pairs, model, options.ckpt_path)
    rerank = num_reranked(model, pairs, 0 if options.raw else options.rerank)
    query = options.audio if options.text is None else options.text
    chosen = choose_index(
        options.encoded, pairs, "audio" if isinstance(query, str) else "text", options.index
    )
    hits = find_hits(
        model,
        pairs,
        query,
        options.top,
        rerank=rerank,
        index=chosen.search,
        contains=options.contains,
        lowest=options.lowest,
    )
    print(chosen.said, file=sys.stderr)
    if options.json:
        print(json.dumps([asdict(hit) for hit in hits], indent=2, ensure_ascii=False))
    else:
        _print(hits, pairs, f"{max(rerank, options.top)} best hits by cosine" if rerank else None)
    return hits


def num_reranked(model: Any, pairs: EncodedPairs, wanted: int | None) -> int:
    """How many hits are sorted by the model's interaction; says on the standard error why there are none.

    Args:
        model: The model.
        pairs: The content of an encoded file.
        wanted: The number that was asked for. None: the default.

    Returns:
        The number; 0 where the model has no interaction or the file no tokens.

    Raises:
        UsageError: A number was asked for where there can be none.
    """
    obstacle = None
    if find_interaction(model) is None:
        obstacle = f"{type(model).__name__} compares pooled embeddings"
    elif not pairs.has_tokens:
        obstacle = "the file holds no frames and words. Encode the split with `--tokens float32`"
    if obstacle is None:
        return RERANKED if wanted is None else wanted
    if wanted:
        raise UsageError(f"Argument `--rerank` has no effect, because {obstacle}.")
    if wanted is None and find_interaction(model) is not None:
        print(f"Hits are sorted by cosine, because {obstacle}.", file=sys.stderr)
    return 0


def _print(hits: Sequence[Hit], pairs: EncodedPairs, reranked: str | None) -> None:
    """Print hits as a table, with the cosine beside another score."""
    if not hits:
        print("Nothing was found: lower `--lowest`, or give another `--contains`.")
        return
    if pairs.calibration is None and reranked is None:
        rows: list[list[Cell]] = [
            [rank, hit.score, hit.clip, hit.caption] for rank, hit in enumerate(hits, 1)
        ]
        print_table(["rank", "score", "clip", "caption"], rows, float_format=".3f")
        return
    rows = [[rank, hit.score, hit.cosine, hit.clip, hit.caption] for rank, hit in enumerate(hits, 1)]
    print_table(["rank", "score", "cosine", "clip", "caption"], rows, float_format=".3f")
    if reranked is not None:
        print(f"The {reranked} are sorted by the model's interaction; `--rerank 0` sorts by cosine.")
    elif pairs.calibration is not None:
        print(f"Scores are calibrated ({pairs.calibration.calibration}); `--raw` sorts by cosine.")


def load_model(pairs: EncodedPairs, checkpoint: str | None = None) -> pl.LightningModule:
    """Load the model that encoded a file, in evaluation mode.

    Args:
        pairs: The content of the file.
        checkpoint: Path of the checkpoint, or of the folder of an exported model; None for the path that the
            file names.

    Returns:
        The model, on the CPU.

    Raises:
        UsageError: The checkpoint does not exist, is one of another model or holds other weights than those
            that encoded the file, or the model's class cannot be imported.
    """
    path = checkpoint or pairs.model["checkpoint"]
    if path is None and pairs.model.get("init_args"):
        return _published_model(pairs)
    if path is None:
        raise UsageError("The file was encoded without a checkpoint. Pass `--ckpt_path`.")
    if Path(path).is_dir():
        model: pl.LightningModule = _at_rate_of(pairs, partial(from_pretrained, path))
        _check_fingerprint(model, pairs, path)
        return model
    if not Path(path).is_file():
        raise UsageError(
            f"There is no checkpoint {path!r}, with which the file was encoded. Pass `--ckpt_path`."
        )
    kind = load_class(str(pairs.model["class_path"]))
    if not (isinstance(kind, type) and issubclass(kind, pl.LightningModule)):
        raise UsageError(f"{pairs.model['class_path']} is no LightningModule.")
    try:
        model = _at_rate_of(pairs, partial(kind.load_from_checkpoint, path, map_location="cpu")).eval()
    except (RuntimeError, TypeError, KeyError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"{path} is no checkpoint of {pairs.model['class_path']}, which encoded the file. Pass the "
            "checkpoint that it was encoded with."
        ) from error
    _check_fingerprint(model, pairs, path)
    return model


def _at_rate_of(pairs: EncodedPairs, load: Callable[..., pl.LightningModule]) -> pl.LightningModule:
    """Load a model for waveforms at the rate of encoded clips, which may not be that of its training."""
    model = load()
    rate = pairs.sample_rate
    return model if rate is None or model.hparams.get("sample_rate", rate) == rate else load(sample_rate=rate)


def _check_fingerprint(model: pl.LightningModule, pairs: EncodedPairs, path: str) -> None:
    """Refuse a model with other weights than those that encoded a file."""
    if weights_fingerprint(model) != pairs.model["fingerprint"]:
        raise UsageError(
            f"{path} holds other weights than those that encoded the file: a later run or epoch has replaced "
            "them, and their embeddings cannot be compared. Encode the split anew, or pass as `--ckpt_path` "
            "a copy of the checkpoint that encoded the file."
        )


def calibrate_by_model(pairs: EncodedPairs, model: pl.LightningModule, source: str | None) -> None:
    """Calibrate clips and captions by the calibration of an exported model, where there is one.

    Args:
        pairs: The encoded clips and captions; those that are calibrated already are left as they are.
        model: The model, which has been checked to be that of the pairs.
        source: The folder of the exported model; another path has no calibration.
    """
    if source is None or pairs.calibration is not None or find_interaction(model) is not None:
        return
    folder = Path(source)
    if not folder.is_dir() or calibration_fingerprint(folder) != pairs.model["fingerprint"]:
        return
    stored = load_calibration(folder)
    if stored is not None:
        bank, calibration = stored
        pairs.calibration = HubCalibration.from_bank(bank, pairs.audio, pairs.text, calibration)


def _published_model(pairs: EncodedPairs) -> pl.LightningModule:
    """Make the model that encoded a file with its published weights, in evaluation mode."""
    section = {
        "class_path": pairs.model["class_path"],
        "init_args": json.loads(str(pairs.model["init_args"])),
    }
    model = make_model(section).eval()
    if weights_fingerprint(model) != pairs.model["fingerprint"]:
        raise UsageError(
            "The file was encoded without a checkpoint, by other weights than the model has now: its "
            "published weights have changed, or it has random ones. Encode the split anew, with a checkpoint."
        )
    return model


@torch.inference_mode()
def find_hits(
    model: Any,
    pairs: EncodedPairs,
    query: str | Path,
    top: int,
    *,
    rerank: int = RERANKED,
    index: Search | None = None,
    contains: str = "",
    whole_clips: bool = False,
    lowest: float | None = None,
) -> list[Hit]:
    """Find the clips that match a text best, or the captions that match an audio file best.

    Args:
        model: The model that encoded the clips and captions.
        pairs: The encoded clips and captions.
        query: A text, which is written in the style of the captions before it is encoded; or the path of an
            audio file, of which the first 30 s are used.
        top: Number of clips or captions to return.
        rerank: Number of best ones by cosine, at least `top`, that are sorted by the model's interaction, if
            it has one and there are tokens. 0: none.
        index: Search of the clips, or of the captions, by an index. None: all are compared.
        contains: Text that the name or file name of a clip, or a caption, has to contain, in any case. A clip
            may contain it in any of its captions.
        whole_clips: Whether a caption is found, too, if another caption of its clip contains the text.
        lowest: Lowest score that is returned. None: all are.

    Returns:
        The hits, best first.

    Raises:
        UsageError: The text is empty, the sample rate is unknown, or the model has another embedding width.
        AudioFileError: The file cannot be used.
    """
    side: Side = "audio" if isinstance(query, str) else "text"
    encoded = _encode_text(model, pairs, query) if isinstance(query, str) else _hear(model, pairs, query)
    passes = WordFilter(pairs, side, contains, whole_clips) if contains.strip() else None
    best = _best_hits(model, pairs, side, encoded, top, rerank, index, passes)
    hits = []
    for score, cosine, row in best:
        if lowest is None or score >= lowest:
            clip, captions = pairs.clip_and_captions(side, row)
            caption = pairs.captions[captions[0]] if captions else ""
            hits.append(Hit(score, cosine, pairs.names[clip], caption, clip))
    return hits


def _encode_text(model: Any, pairs: EncodedPairs, text: str) -> Embeddings:
    """The embedding of a text in the style of the captions."""
    styled = style_caption(text, pairs.caption_style)
    if not styled.strip():
        raise UsageError(f"Argument `--text` has to hold words, but got {text!r}.")
    return _encode_query(model, 1, {"caption": [styled]})


def _hear(model: Any, pairs: EncodedPairs, path: Path) -> Embeddings:
    """The embedding of an audio file as the encoded data were read: at their rate, or as a spectrogram."""
    rate = pairs.sample_rate or model.hparams.get("sample_rate")
    if rate is None:
        raise UsageError(
            f"Neither the encoded data nor {type(model).__name__} says at which rate audio is to be read. "
            "Give the model a hyperparameter `sample_rate`, or encode data of a folder of audio files."
        )
    if pairs.log_mel is not None:
        audio = AudioOptions(sample_rate=rate, features="log_mel", check="none", **pairs.log_mel)
        clip = Clip("query", ("query",), path.name)
        item = ClipDataset([clip], FileStore(path.parent, {clip.key: path.name}), audio)[0]
        return _encode_query(model, 0, {"log_mel": item["log_mel"][None]})
    with open_audio(str(path), path) as recording:
        check_recording(recording, samples=False)
        waveform = read_segment(recording, rate, 0, int(_MAX_SECONDS * rate))  # (T,)
    return _encode_query(model, 0, {"waveform": waveform[None], "num_samples": torch.tensor([len(waveform)])})


def _encode_query(model: Any, side: int, batch: dict[str, Any]) -> Embeddings:
    """The embedding of a single audio (side 0) or text (side 1), with its tokens where there are some."""
    encoder = find_encoders(model)[side]
    encoded = as_encoded(call_encoder(model, encoder, batch), encoder_name(encoder))
    found = [pooled(encoded)]
    if isinstance(encoded, TokenEmbeddings):
        found.append(encoded.tokens[encoded.valid])
    if not all(vectors.isfinite().all() for vectors in found):
        raise UsageError("The model makes NaN or infinity of the query, so nothing can be compared with it.")
    return unit_embeddings(encoded, torch.float32)


def _best_hits(
    model: Any,
    pairs: EncodedPairs,
    side: Side,
    query: Embeddings,
    top: int,
    rerank: int,
    index: Search | None,
    passes: WordFilter | None,
) -> list[tuple[float, float, int]]:
    """Score, cosine and number of the rows of a side with the highest scores, best first."""
    rows = getattr(pairs, side)
    vector = pooled(query)[0]  # (d,)
    if rows.shape[1] != len(vector):
        raise UsageError(
            f"The encoded file has embeddings of width {rows.shape[1]}, but the checkpoint makes "
            f"{len(vector)}. Pass the checkpoint that it was encoded with."
        )
    interaction = find_interaction(model) if rerank and pairs.has_tokens else None
    count = top if interaction is None else max(rerank, top)
    ranked = best_rows(pairs, side, vector, count, index=index, passes=passes)
    if interaction is not None and len(ranked.rows):
        scores = _interaction_scores(interaction, query, pairs, side, ranked.rows)
        ranked = ranked._replace(scores=scores).best(top)
    return list(zip(*(each.tolist() for each in ranked), strict=True))


def _interaction_scores(
    interaction: Interaction,
    query: Embeddings,
    pairs: EncodedPairs,
    side: Side,
    rows: torch.Tensor,
) -> torch.Tensor:
    """The scores `(n,)` of some rows of a side for a query, by an interaction."""
    blocks = []
    for block in rows.split(_BLOCK):
        candidates = unit_embeddings(pairs.with_tokens(side, block), torch.float32)
        if side == "audio":
            blocks.append(interaction(query, candidates).to_audio[0])
        else:
            blocks.append(interaction(candidates, query).to_text[0])
    scores = torch.cat(blocks)
    if not scores.isfinite().all():
        raise UsageError("The model's interaction makes NaN or infinity of the query and hits: `--rerank 0`.")
    return scores

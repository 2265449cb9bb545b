"""`ask-lightning search`: a text against encoded clips, or an audio file against encoded captions."""

import json
import pickle
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.cli.errors import UsageError, usage_errors
from ask_lightning.cli.retrieval_cli import load_class, make_model
from ask_lightning.cli.search_flags import RERANKED, parse_search_flags
from ask_lightning.data.audio.decoding import check_recording, open_audio, read_segment
from ask_lightning.data.caption_style import style_caption
from ask_lightning.encoding.encoders import call_encoder, encoder_name, find_encoders, find_interaction
from ask_lightning.encoding.outputs import as_encoded
from ask_lightning.interaction import Embeddings, Interaction, TokenEmbeddings, pooled, unit_embeddings
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
    pairs = EncodedPairs.load(options.encoded)
    if options.raw:
        pairs.calibration = None
    with usage_errors():
        model = load_model(pairs, options.ckpt_path)
    rerank = _num_reranked(model, pairs, 0 if options.raw else options.rerank)
    if options.text is not None:
        hits = find_clips(model, pairs, options.text, options.top, rerank=rerank)
    else:
        hits = find_captions(model, pairs, options.audio, options.top, rerank=rerank)
    if options.json:
        print(json.dumps([asdict(hit) for hit in hits], indent=2, ensure_ascii=False))
    else:
        _print(hits, pairs, f"{max(rerank, options.top)} best hits by cosine" if rerank else None)
    return hits


def _num_reranked(model: Any, pairs: EncodedPairs, wanted: int | None) -> int:
    """How many hits are sorted by the model's interaction; 0 without one, or without tokens in the file."""
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
        checkpoint: Path of the checkpoint; None for the path that the file names.

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
    if not Path(path).is_file():
        raise UsageError(
            f"There is no checkpoint {path!r}, with which the file was encoded. Pass `--ckpt_path`."
        )
    kind = load_class(str(pairs.model["class_path"]))
    if not (isinstance(kind, type) and issubclass(kind, pl.LightningModule)):
        raise UsageError(f"{pairs.model['class_path']} is no LightningModule.")
    try:
        model = kind.load_from_checkpoint(path, map_location="cpu").eval()
    except (RuntimeError, TypeError, KeyError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"{path} is no checkpoint of {pairs.model['class_path']}, which encoded the file. Pass the "
            "checkpoint that it was encoded with."
        ) from error
    if weights_fingerprint(model) != pairs.model["fingerprint"]:
        raise UsageError(
            f"{path} holds other weights than those that encoded the file: a later run or epoch has replaced "
            "them, and their embeddings cannot be compared. Encode the split anew, or pass as `--ckpt_path` "
            "a copy of the checkpoint that encoded the file."
        )
    return model


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
def find_clips(model: Any, pairs: EncodedPairs, text: str, top: int, *, rerank: int = RERANKED) -> list[Hit]:
    """Find the clips that match a text best.

    Args:
        model: The model that encoded the clips.
        pairs: The encoded clips.
        text: The query, which is written in the style of the captions before it is encoded.
        top: Number of clips to return.
        rerank: Number of best clips by cosine, at least `top`, that are sorted by the model's interaction, if
            it has one and there are tokens. 0: none.

    Returns:
        The clips, best first.

    Raises:
        UsageError: The query is empty, or the model has another embedding width.
    """
    styled = style_caption(text, pairs.caption_style)
    if not styled.strip():
        raise UsageError(f"Argument `--text` has to hold words, but got {text!r}.")
    query = _encode_query(model, 1, {"caption": [styled]})
    first_caption: dict[int, str] = {}
    for row, caption in zip(pairs.clip_of.tolist(), pairs.captions, strict=True):
        first_caption.setdefault(row, caption)
    return [
        Hit(score, cosine, pairs.names[row], first_caption[row], row)
        for score, cosine, row in _best_hits(model, pairs, "audio", query, top, rerank)
    ]


@torch.inference_mode()
def find_captions(
    model: Any, pairs: EncodedPairs, path: Path, top: int, *, rerank: int = RERANKED
) -> list[Hit]:
    """Find the captions that match an audio file best.

    Args:
        model: The model that encoded the captions.
        pairs: The encoded captions.
        path: Path of the audio file, of which the first 30 s are used.
        top: Number of captions to return.
        rerank: Number of best captions by cosine, at least `top`, that are sorted by the model's interaction,
            if it has one and there are tokens. 0: none.

    Returns:
        The captions, best first.

    Raises:
        UsageError: The model has another embedding width, or the sample rate is unknown.
        AudioFileError: The file cannot be used.
    """
    rate = pairs.sample_rate or model.hparams.get("sample_rate")
    if rate is None:
        raise UsageError(
            f"Neither the encoded data nor {type(model).__name__} says at which rate audio is to be read. "
            "Give the model a hyperparameter `sample_rate`, or encode data of a folder of audio files."
        )
    with open_audio(str(path), path) as recording:
        check_recording(recording, samples=False)
        waveform = read_segment(recording, rate, 0, int(_MAX_SECONDS * rate))  # (T,)
    batch = {"waveform": waveform[None], "num_samples": torch.tensor([len(waveform)])}
    query = _encode_query(model, 0, batch)
    clip_of = pairs.clip_of.tolist()
    return [
        Hit(score, cosine, pairs.names[clip_of[row]], pairs.captions[row], clip_of[row])
        for score, cosine, row in _best_hits(model, pairs, "text", query, top, rerank)
    ]


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
    model: Any, pairs: EncodedPairs, side: Literal["audio", "text"], query: Embeddings, top: int, rerank: int
) -> list[tuple[float, float, int]]:
    """Score, cosine and number of the rows of a side with the highest scores, best first."""
    rows = pairs.audio if side == "audio" else pairs.text
    vector = pooled(query)[0]  # (d,)
    if rows.shape[1] != len(vector):
        raise UsageError(
            f"The encoded file has embeddings of width {rows.shape[1]}, but the checkpoint makes "
            f"{len(vector)}. Pass the checkpoint that it was encoded with."
        )
    scores = cosines = rows @ vector
    if pairs.calibration is not None:
        scores = pairs.calibration.calibrate(cosines[None], side)[0]
    # The sort is stable, so that rows with equal scores keep their order.
    order = torch.argsort(scores, descending=True, stable=True)
    interaction = find_interaction(model)
    if rerank and interaction is not None and pairs.has_tokens:
        order = order[: max(rerank, top)]
        scores = scores.index_put((order,), _interaction_scores(interaction, query, pairs, side, order))
        order = order[torch.argsort(scores[order], descending=True, stable=True)]
    order = order[:top]
    return list(zip(scores[order].tolist(), cosines[order].tolist(), order.tolist(), strict=True))


def _interaction_scores(
    interaction: Interaction,
    query: Embeddings,
    pairs: EncodedPairs,
    side: Literal["audio", "text"],
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

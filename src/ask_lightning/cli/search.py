"""`ask-lightning search`: a text against encoded clips, or an audio file against encoded captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from ask_lightning.cli.encoded import EncodedPairs
from ask_lightning.cli.errors import UsageError
from ask_lightning.cli.flags import Flags
from ask_lightning.cli.training import load_class
from ask_lightning.data.audio.decoding import check_recording, open_audio, read_stretch
from ask_lightning.encoding.encoders import call_encoder, encoder_name, find_encoders
from ask_lightning.encoding.outputs import as_embeddings
from ask_lightning.functional import unit_length

_LONGEST_SECONDS = 30.0
_WIDEST = 72


@dataclass(frozen=True)
class Hit:
    """One result.

    Attributes:
        score: Cosine of query and result.
        clip: Name of the clip.
        caption: Of the clip, its first; or the one that was found.
    """

    score: float
    clip: str
    caption: str


def search(arguments: Sequence[str]) -> list[Hit]:
    """Run the command and print its table.

    Args:
        arguments: What follows `search` on the command line.

    Returns:
        The hits, best first.

    Raises:
        UsageError: The command line, the encoded file or the query cannot be used.
    """
    parser = Flags(prog="ask-lightning search", description=__doc__, allow_abbrev=False)
    parser.add_argument("encoded", type=Path, help="a file that `ask-lightning encode` wrote")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="find the clips that this describes")
    query.add_argument("--audio", type=Path, help="find the captions that describe this file")
    parser.add_argument("--top", type=int, default=10, help="number of hits (default: 10)")
    parser.add_argument("--ckpt_path", help="the checkpoint that encoded the file, if it has moved")
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise UsageError(f"Argument `--top` has to be at least 1, but got {options.top}.")
    pairs = EncodedPairs.load(options.encoded)
    model = load_model(pairs, options.ckpt_path)
    if options.text is not None:
        hits = find_clips(model, pairs, options.text, options.top)
    else:
        hits = find_captions(model, pairs, options.audio, options.top)
    print(hits_table(hits))
    return hits


def load_model(pairs: EncodedPairs, checkpoint: str | None = None) -> pl.LightningModule:
    """The model that encoded a file, in evaluation mode.

    Args:
        pairs: The contents of the file.
        checkpoint: Where the checkpoint is now. None: where it was.

    Raises:
        UsageError: It is not there.
    """
    path = checkpoint or pairs.model["checkpoint"]
    if path is None:
        raise UsageError("The file was encoded without a checkpoint. Pass `--ckpt_path`.")
    if not Path(path).is_file():
        raise UsageError(
            f"There is no checkpoint {path!r}, with which the file was encoded. Pass `--ckpt_path`."
        )
    kind = load_class(str(pairs.model["class_path"]))
    if not (isinstance(kind, type) and issubclass(kind, pl.LightningModule)):
        raise UsageError(f"{pairs.model['class_path']} is no LightningModule.")
    return kind.load_from_checkpoint(path, map_location="cpu").eval()


@torch.inference_mode()
def find_clips(model: Any, pairs: EncodedPairs, text: str, top: int) -> list[Hit]:
    """The clips that fit a text best.

    Args:
        model: That encoded them.
        pairs: The encoded clips.
        text: The query.
        top: How many.

    Raises:
        UsageError: The query is empty, or the model has another width.
    """
    if not text.strip():
        raise UsageError("Argument `--text` has to hold words, but it is empty.")
    query = _encode_query(model, 1, {"caption": [text]})  # (d,)
    first: dict[int, str] = {}
    for row, caption in zip(pairs.clip_of.tolist(), pairs.captions, strict=True):
        first.setdefault(row, caption)
    return [Hit(score, pairs.names[row], first[row]) for score, row in _best(pairs.audio, query, top)]


@torch.inference_mode()
def find_captions(model: Any, pairs: EncodedPairs, path: Path, top: int) -> list[Hit]:
    """The captions that fit an audio file best.

    Args:
        model: That encoded them.
        pairs: The encoded captions.
        path: Of the audio file, of which at most the first 30 s are heard.
        top: How many.

    Raises:
        UsageError: The model has another width.
        AudioFileError: The file cannot be used.
    """
    rate = int(model.hparams.get("sample_rate", 32000))
    with open_audio(str(path), path) as recording:
        check_recording(recording, samples=False)
        waveform = read_stretch(recording, rate, 0, int(_LONGEST_SECONDS * rate))  # (T,)
    batch = {"waveform": waveform[None], "num_samples": torch.tensor([len(waveform)])}
    query = _encode_query(model, 0, batch)  # (d,)
    return [
        Hit(score, pairs.names[int(pairs.clip_of[row])], pairs.captions[row])
        for score, row in _best(pairs.text, query, top)
    ]


def hits_table(hits: Sequence[Hit]) -> str:
    """Hits as text in columns.

    Args:
        hits: Best first.

    Examples:
        >>> print(hits_table([Hit(0.5, "file:a.wav", "rain")]))
        rank  score  clip        caption
           1  0.500  file:a.wav  rain
    """
    width = max([len("clip"), *(len(hit.clip) for hit in hits)])
    lines = [f"rank  score  {'clip':{width}}  caption"]
    for rank, hit in enumerate(hits, start=1):
        caption = hit.caption if len(hit.caption) <= _WIDEST else f"{hit.caption[: _WIDEST - 1]}…"
        lines.append(f"{rank:4d}  {hit.score:.3f}  {hit.clip:{width}}  {caption}")
    return "\n".join(lines)


def _encode_query(model: Any, side: int, batch: dict[str, Any]) -> torch.Tensor:
    """The embedding `(d,)` of a single audio (side 0) or text (side 1)."""
    encoder = find_encoders(model)[side]
    embeddings = as_embeddings(call_encoder(model, encoder, batch), encoder_name(encoder))  # (1, d)
    return unit_length(embeddings.float())[0]


def _best(rows: torch.Tensor, query: torch.Tensor, top: int) -> list[tuple[float, int]]:
    if rows.shape[1] != len(query):
        raise UsageError(
            f"The encoded file has embeddings of width {rows.shape[1]}, but the checkpoint makes "
            f"{len(query)}. Pass the checkpoint that it was encoded with."
        )
    scores = rows @ query
    # Of equal scores the first row comes first.
    order = torch.argsort(scores, descending=True, stable=True)[:top]
    return [(float(scores[row]), int(row)) for row in order]

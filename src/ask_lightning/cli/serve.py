"""`ask-lightning serve`: a local page on which the clips of an encoded file are searched and heard."""

import posixpath
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, overload

from ask_lightning.cli.encoded_pairs import EncodedPairs, Side
from ask_lightning.cli.errors import UsageError, usage_errors
from ask_lightning.cli.search import (
    calibrate_by_model,
    find_hits,
    load_model,
    num_reranked,
)
from ask_lightning.cli.search_flags import parse_serve_flags
from ask_lightning.cli.search_index import ChosenIndex, choose_index
from ask_lightning.data.caption_style import style_caption
from ask_lightning.data.clips import abbreviate
from ask_lightning.encoding.encoders import find_interaction
from ask_lightning.page import (
    MOST_SHOWN,
    Collection,
    Match,
    QueryError,
    Refinement,
    find_audio_files,
    is_loopback,
    listen,
    serve_collection,
)
from ask_lightning.utilities.optional_imports import import_optional

RANKED_AS_A_WHOLE = 10_000
"""Number of clips, and of captions, up to which all are ranked and filters choose among them."""


def serve(arguments: Sequence[str]) -> None:
    """Open the page and answer its requests until Ctrl-C.

    Args:
        arguments: What follows `serve` on the command line.

    Raises:
        UsageError: The command line, the encoded file or the folder of audio cannot be used, or the port is
            taken.
    """
    options = parse_serve_flags(arguments)
    try:
        for package in ("gradio", "matplotlib"):
            import_optional(package)
    except ImportError as error:
        raise UsageError(str(error)) from error
    pairs = EncodedPairs.load(options.encoded)
    with usage_errors():
        model = load_model(pairs, options.ckpt_path)
        calibrate_by_model(pairs, model, options.ckpt_path)
        rerank = num_reranked(model, pairs, options.rerank)
        sides: tuple[Side, ...] = get_args(Side)
        indexes = {side: choose_index(options.encoded, pairs, side, options.index) for side in sides}
        for chosen in indexes.values():
            print(chosen.said, file=sys.stderr)
        collection = make_collection(
            model, pairs, options.audio, options.encoded.name, rerank=rerank, indexes=indexes
        )
    try:
        with listen(options.host, options.port) as listening:
            host, port = listening.getsockname()[:2]
            if not is_loopback(options.host):
                print(f"Everyone who reaches {host} can use the page and hear the clips.")
            address = f"[{host}]" if ":" in host else host
            print(f"The page is at http://{address}:{port} until Ctrl-C.", flush=True)
            serve_collection(collection, listening, options.host)
    except OSError as error:
        raise UsageError(
            f"Nothing can listen at {options.host}, port {options.port} ({error.strerror or error}). Pass "
            "another `--port`, such as 0 for a free one, or another `--host`."
        ) from error


def make_collection(
    model: Any,
    pairs: EncodedPairs,
    folder: Path,
    title: str,
    *,
    rerank: int = 0,
    indexes: Mapping[Side, ChosenIndex] | None = None,
) -> Collection:
    """Make what the page shows of an encoded file; says which clips cannot be heard.

    Args:
        model: The model that encoded the file.
        pairs: The content of the file.
        folder: Folder of the clips' audio files.
        title: Name of the file.
        rerank: Number of best clips by cosine that are sorted by the model's interaction, if it has one and
            there are tokens. 0: none.
        indexes: What searches the clips and the captions. None: all are compared.

    Returns:
        The clips, with searches by the model.

    Raises:
        FileNotFoundError: There is no such folder.
        UsageError: The folder has not one file of the clips.
    """
    found = find_audio_files(folder, pairs.names, pairs.files or [""] * len(pairs.names))
    missing = [name for name, path in zip(pairs.names, found.paths, strict=True) if path is None]
    if len(missing) == len(pairs.names):
        raise UsageError(
            f"{folder} has no audio file of the {len(missing)} clips, such as {abbreviate(pairs.names, 1)}. "
            "Pass as `--audio` the folder with the files from which they were encoded."
        )
    if missing:
        several = f"; {len(found.ambiguous)} of them have several" if found.ambiguous else ""
        print(
            f"{len(missing)} of {len(pairs.names)} clips have no file of their own in {folder} and cannot be "
            f"heard{several}: {abbreviate(missing)}."
        )
    pairs = replace(pairs, files=_searched_names(pairs, found.paths))
    searches = {side: chosen.search for side, chosen in (indexes or {}).items()}
    by_index = [chosen.name for chosen in (indexes or {}).values() if chosen.search is not None]
    ranks_all = not by_index and max(len(pairs.names), len(pairs.captions)) <= RANKED_AS_A_WHOLE
    by_cosine = replace(pairs, calibration=None)
    # Captions that are compared with a sound: those of as many clips as are compared with a text.
    captions_compared = -(-rerank * len(pairs.captions) // len(pairs.names))
    # So many captions are of as many clips as can be shown.
    captions_shown = MOST_SHOWN * int(pairs.clip_of.bincount().max()) if len(pairs.captions) else 0

    def by_text(text: str, refined: bool, words: str) -> list[Match]:
        if not style_caption(text, pairs.caption_style).strip():
            raise QueryError(f"A query has to hold words, but “{text}” has none.")
        return answered(text, refined, words, len(pairs.names) if ranks_all else MOST_SHOWN, rerank)

    def by_sound(path: Path, refined: bool, words: str) -> list[Match]:
        return answered(
            path, refined, words, len(pairs.captions) if ranks_all else captions_shown, captions_compared
        )

    def answered(query: str | Path, refined: bool, words: str, total: int, compared: int) -> list[Match]:
        # What is not among the best by cosine is not compared by tokens, and has no such score.
        compared = compared if refined else 0
        try:
            hits = find_hits(
                model,
                pairs if refined else by_cosine,
                query,
                compared or total,
                rerank=compared,
                index=searches.get("audio" if isinstance(query, str) else "text"),
                contains=words,
                whole_clips=True,
            )
        except UsageError as error:
            raise QueryError(str(error)) from error
        return [Match(hit.row, hit.score, hit.cosine, hit.caption) for hit in hits]

    count = f"{len(pairs.names):,} clips" if len(pairs.names) > 1 else "1 clip"
    how = f", searched by the index {' and '.join(dict.fromkeys(by_index))}" if by_index else ""
    return Collection(
        title=f"{count} of {title}, encoded by {type(model).__name__}{how}",
        names=pairs.names,
        captions=_CaptionsOfClips(pairs),
        files=found.paths,
        embeddings=pairs.audio,
        by_text=by_text,
        by_sound=by_sound,
        file_names=pairs.files,
        refinement=_refinement(model, pairs, rerank, ranks_all),
        finds_all=ranks_all,
    )


def _searched_names(pairs: EncodedPairs, paths: Sequence[Path | None]) -> list[str]:
    """Names by which filters find the clips' files: as their dataset writes them, and as they are shown."""
    names = []
    for written, path in zip(pairs.files or [""] * len(paths), paths, strict=True):
        other = "" if path is None or path.name == posixpath.basename(written) else path.name
        names.append(f"{written}\n{other}".strip())
    return names


class _CaptionsOfClips(Sequence[list[str]]):
    """The captions of each clip, which are read when they are asked for."""

    def __init__(self, pairs: EncodedPairs) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs.names)

    @overload
    def __getitem__(self, row: int) -> list[str]: ...

    @overload
    def __getitem__(self, row: slice) -> list[list[str]]: ...

    def __getitem__(self, row: int | slice) -> list[str] | list[list[str]]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        return [self._pairs.captions[caption] for caption in self._pairs.captions_of(range(len(self))[row])]


def _refinement(model: Any, pairs: EncodedPairs, rerank: int, ranks_all: bool) -> Refinement | None:
    """What sorts the clips better than the cosine: frames and words, or a calibration."""
    if rerank:
        interaction = type(find_interaction(model)).__name__
        explanation = f"The {rerank} best clips by cosine, sorted by {interaction}"
        return Refinement("Compare frames and words", explanation, f"score of {interaction}", finds_all=False)
    if pairs.calibration is not None:
        kind = str(pairs.calibration.calibration)
        return Refinement("Calibrated scores", kind, "calibrated score", finds_all=ranks_all)
    return None

"""`ask-lightning serve`: a local page on which the clips of an encoded file are searched and heard."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.cli.errors import UsageError, usage_errors
from ask_lightning.cli.run_options import FlagParser
from ask_lightning.cli.search import Hit, find_captions, find_clips, load_model
from ask_lightning.data.caption_style import style_caption
from ask_lightning.data.clips import abbreviate
from ask_lightning.page import (
    Collection,
    Match,
    QueryError,
    find_audio_files,
    is_loopback,
    listen,
    serve_collection,
)
from ask_lightning.utilities.optional_imports import import_optional

_HIGHEST_PORT = 65535


def serve(arguments: Sequence[str]) -> None:
    """Open the page and answer its requests until Ctrl-C.

    Args:
        arguments: What follows `serve` on the command line.

    Raises:
        UsageError: The command line, the encoded file or the folder of audio cannot be used, or the port is
            taken.
    """
    parser = FlagParser(prog="ask-lightning serve", description=__doc__, allow_abbrev=False)
    parser.add_argument("encoded", type=Path, help="a file that `ask-lightning encode` wrote")
    parser.add_argument("--audio", type=Path, required=True, help="folder of the clips' audio files")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="port, 0 for a free one (default: 7860)")
    parser.add_argument("--ckpt_path", help="the checkpoint that encoded the file, if it has moved")
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= _HIGHEST_PORT:
        raise UsageError(
            f"Argument `--port` has to be from 0 to {_HIGHEST_PORT}, but got {options.port}. Leave it out "
            "for 7860."
        )
    try:
        for package in ("gradio", "matplotlib"):
            import_optional(package)
    except ImportError as error:
        raise UsageError(str(error)) from error
    pairs = EncodedPairs.load(options.encoded)
    with usage_errors():
        model = load_model(pairs, options.ckpt_path)
        collection = make_collection(model, pairs, options.audio, options.encoded.name)
    try:
        with listen(options.host, options.port) as listening:
            host, port = listening.getsockname()[:2]
            if not is_loopback(options.host):
                print(f"Everyone who reaches {options.host} can use the page and hear the clips.")
            address = f"[{host}]" if ":" in host else host
            print(f"The page is at http://{address}:{port} until Ctrl-C.", flush=True)
            serve_collection(collection, listening, options.host)
    except OSError as error:
        raise UsageError(
            f"Nothing can listen at {options.host}, port {options.port} ({error.strerror or error}). Pass "
            "another `--port`, such as 0 for a free one, or another `--host`."
        ) from error


def make_collection(model: Any, pairs: EncodedPairs, folder: Path, title: str) -> Collection:
    """Make what the page shows of an encoded file; says which clips cannot be heard.

    Args:
        model: The model that encoded the file.
        pairs: The content of the file.
        folder: Folder of the clips' audio files.
        title: Name of the file.

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
    if pairs.has_tokens:
        print("The page sorts by pooled embeddings; `ask-lightning search` sorts the best hits by tokens.")
    captions: list[list[str]] = [[] for _ in pairs.names]
    for row, caption in zip(pairs.clip_of.tolist(), pairs.captions, strict=True):
        captions[row].append(caption)
    by_cosine = replace(pairs, calibration=None)

    def by_text(text: str, calibrated: bool) -> list[Match]:
        if not style_caption(text, pairs.caption_style).strip():
            raise QueryError(f"A query has to hold words, but “{text}” has none.")
        return answered(lambda given: find_clips(model, given, text, len(pairs.names), rerank=0), calibrated)

    def by_sound(path: Path, calibrated: bool) -> list[Match]:
        return answered(
            lambda given: find_captions(model, given, path, len(pairs.captions), rerank=0), calibrated
        )

    def answered(search: Any, calibrated: bool) -> list[Match]:
        try:
            hits: list[Hit] = search(pairs if calibrated else by_cosine)
        except UsageError as error:
            raise QueryError(str(error)) from error
        return [Match(hit.row, hit.score, hit.cosine, hit.caption) for hit in hits]

    count = f"{len(pairs.names):,} clips" if len(pairs.names) > 1 else "1 clip"
    return Collection(
        title=f"{count} of {title}, encoded by {type(model).__name__}",
        names=pairs.names,
        captions=captions,
        files=found.paths,
        embeddings=pairs.audio,
        by_text=by_text,
        by_sound=by_sound,
        calibration="" if pairs.calibration is None else str(pairs.calibration.calibration),
    )

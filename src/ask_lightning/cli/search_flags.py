"""The flags of `search` and `serve`, which are read before the packages are imported that a search needs."""

import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ask_lightning.cli.errors import UsageError
from ask_lightning.cli.run_options import FlagParser

RERANKED = 100
"""Default of the number of hits that a model's interaction sorts."""

_HIGHEST_PORT = 65535


def parse_search_flags(arguments: Sequence[str]) -> Namespace:
    """Parse the command line of `search`.

    Args:
        arguments: What follows `search` on the command line.

    Returns:
        The values by the names of the flags; the file as `encoded`.

    Raises:
        UsageError: The command line cannot be used.

    Examples:
        >>> parse_search_flags(["clips.safetensors", "--text", "rain"]).top
        10
    """
    parser = FlagParser(
        prog="ask-lightning search",
        description="A text against encoded clips, or an audio file against encoded captions.",
        allow_abbrev=False,
    )
    parser.add_argument("encoded", type=Path, help="a file that `ask-lightning encode` wrote")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="find the clips that this describes")
    query.add_argument("--audio", type=Path, help="find the captions that describe this file")
    parser.add_argument("--top", type=int, default=10, help="number of hits (default: 10)")
    parser.add_argument(
        "--raw", action="store_true", help="sort by cosine, even if the file is calibrated or holds tokens"
    )
    _add_rerank(parser, ", at least --top")
    _add_index(parser)
    parser.add_argument(
        "--contains", default="", metavar="TEXT", help="only hits whose caption, name or file contains this"
    )
    parser.add_argument("--lowest", type=float, metavar="SCORE", help="only hits with this score or more")
    parser.add_argument("--json", action="store_true", help="print the hits as JSON alone")
    parser.add_argument(
        "--ckpt_path",
        help="the checkpoint that encoded the file, if it has moved, or the exported model of it",
    )
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise UsageError(f"Argument `--top` has to be at least 1, but got {options.top}.")
    if options.lowest is not None and math.isnan(options.lowest):
        raise UsageError("Argument `--lowest` has to be a number, but got nan.")
    _check_rerank(options)
    if options.raw and options.rerank:
        raise UsageError("`--raw` sorts by cosine, so `--rerank` has no effect. Leave one of them out.")
    return options


def _add_index(parser: FlagParser) -> None:
    parser.add_argument(
        "--index",
        default="auto",
        help="what finds the hits: exact compares all; ivf, hnsw or a Faiss factory string is an index, "
        "built once and kept beside the file, that may miss some; auto (default) compares all unless there "
        "are millions or an index is there",
    )


def _add_rerank(parser: FlagParser, at_least: str) -> None:
    parser.add_argument(
        "--rerank",
        type=int,
        help="number of best hits by cosine that a model with an interaction compares by tokens and sorts "
        f"anew (default: {RERANKED}{at_least}); 0: sort by cosine",
    )


def _check_rerank(options: Namespace) -> None:
    if options.rerank is not None and options.rerank < 0:
        raise UsageError(f"Argument `--rerank` has to be at least 0, but got {options.rerank}.")


def parse_serve_flags(arguments: Sequence[str]) -> Namespace:
    """Parse the command line of `serve`.

    Args:
        arguments: What follows `serve` on the command line.

    Returns:
        The values by the names of the flags; the file as `encoded`.

    Raises:
        UsageError: The command line cannot be used.

    Examples:
        >>> parse_serve_flags(["clips.safetensors", "--audio", "sounds"]).port
        7860
    """
    parser = FlagParser(
        prog="ask-lightning serve",
        description="A local page on which the clips of an encoded file are searched and heard.",
        allow_abbrev=False,
    )
    parser.add_argument("encoded", type=Path, help="a file that `ask-lightning encode` wrote")
    parser.add_argument("--audio", type=Path, required=True, help="folder of the clips' audio files")
    _add_rerank(parser, "")
    _add_index(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="port, 0 for a free one (default: 7860)")
    parser.add_argument(
        "--ckpt_path",
        help="the checkpoint that encoded the file, if it has moved, or the exported model of it",
    )
    options = parser.parse_args(arguments)
    _check_rerank(options)
    if not 0 <= options.port <= _HIGHEST_PORT:
        raise UsageError(
            f"Argument `--port` has to be from 0 to {_HIGHEST_PORT}, but got {options.port}. Leave it out "
            "for 7860."
        )
    return options

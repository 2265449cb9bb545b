"""A local page on which sounds are searched, heard and seen."""

from ask_lightning.page.audio_files import AudioFiles, find_audio_files
from ask_lightning.page.collection import MOST_SHOWN, Collection, Match, QueryError, Refinement
from ask_lightning.page.server import is_loopback, listen, serve_collection

__all__ = [
    "MOST_SHOWN",
    "AudioFiles",
    "Collection",
    "Match",
    "QueryError",
    "Refinement",
    "find_audio_files",
    "is_loopback",
    "listen",
    "serve_collection",
]

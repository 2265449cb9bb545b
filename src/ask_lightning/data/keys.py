"""Keys: what a recording is called in every dataset that holds it.

AudioCaps and the AudioSet part of WavCaps share recordings, Clotho and its FreeSound part do, and each spells
their ids in its own way. A key is one spelling for all: `youtube:vfY_TJq7n_U`, `freesound:180913`.
"""

import html
import re
import unicodedata
from collections.abc import Mapping

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au"})
"""Endings of the files that soundfile can read."""

NAMESPACES: Mapping[str, str] = {
    "audioset": "youtube",
    "audioset_sl": "youtube",
    "audiocaps": "youtube",
    "youtube": "youtube",
    "freesound": "freesound",
    "clotho": "freesound",
    "bbc": "bbc",
    "bbc_sound_effects": "bbc",
    "soundbible": "soundbible",
    "file": "file",
    "audiocap": "audiocap",
}
"""From the name of a collection, in lower case, to the first part of its keys."""

_YOUTUBE = re.compile(r"Y?([\w-]{11})(?:_\d+(?:\.\d+)?){0,2}", re.ASCII)
_FOREIGN = ("freesound", "bbc", "soundbible", "audiocap")


def stem(name: str) -> str:
    """A file's name without its folder and its ending, if that is one of audio.

    Args:
        name: Of a file or path, or an id.

    Examples:
        >>> stem("AudioSet_SL/Yb0RFKhbpFJA.wav"), stem("FR.CTC.08.CoyuyoS.001.wav"), stem("2219")
        ('Yb0RFKhbpFJA', 'FR.CTC.08.CoyuyoS.001', '2219')
    """
    # By hand, as pathlib takes ten times as long for half a million names.
    last = name.strip().rpartition("/")[2]
    head, dot, suffix = last.rpartition(".")
    return head if head and f"{dot}{suffix.lower()}" in AUDIO_SUFFIXES else last


def youtube_id(name: str) -> str | None:
    """The id of the video that a clip of AudioSet was cut from.

    Args:
        name: The id alone, after a `Y`, before start and end, or as the name of a file.

    Returns:
        Its eleven characters, or None for a name that cannot hold one.

    Examples:
        >>> [youtube_id(name) for name in ("b0RFKhbpFJA", "Yb0RFKhbpFJA.wav", "b0RFKhbpFJA_30_40", "rain")]
        ['b0RFKhbpFJA', 'b0RFKhbpFJA', 'b0RFKhbpFJA', None]
    """
    match = _YOUTUBE.fullmatch(stem(name))
    return match.group(1) if match else None


def plain_title(name: str) -> str:
    """The title of a recording without what copying, archives and file systems do to it.

    Args:
        name: Of a file.

    Returns:
        Letters and digits in lower case with single spaces between them.

    Examples:
        >>> plain_title("Grillons-d&#39;Italie.wav") == plain_title("grillons d'italie")
        True
    """
    text = unicodedata.normalize("NFKC", html.unescape(stem(name))).casefold()
    return re.sub(r"[\W_]+", " ", text).strip()


def key(namespace: str, name: str) -> str:
    """The key of a recording.

    Args:
        namespace: One of the values of `NAMESPACES`.
        name: Its id or, in the namespace `file`, its title.

    Examples:
        >>> key("youtube", "Yb0RFKhbpFJA.wav"), key("file", "Rain_1.wav"), key("freesound", "180913.flac")
        ('youtube:b0RFKhbpFJA', 'file:rain 1', 'freesound:180913')
    """
    if namespace == "youtube":
        return f"youtube:{youtube_id(name) or stem(name)}"
    if namespace == "file":
        return f"file:{plain_title(name) or stem(name)}"
    return f"{namespace}:{stem(name)}"


def possible_keys(name: str, collection: str | None = None) -> frozenset[str]:
    """The keys that someone who wrote this id may have meant.

    Args:
        name: A key, or an id as any of the datasets writes it.
        collection: Where the id is from, if that is known: a key of `NAMESPACES` in any case.

    Returns:
        The one key if the collection is known, else one for each in which the id makes sense.

    Examples:
        >>> sorted(possible_keys("180913", "FreeSound"))
        ['freesound:180913']
        >>> "youtube:b0RFKhbpFJA" in possible_keys("Yb0RFKhbpFJA.wav")
        True
    """
    namespace, separator, rest = name.strip().partition(":")
    if separator and namespace in NAMESPACES.values():
        return frozenset({key(namespace, rest)})
    known = NAMESPACES.get(collection.lower()) if collection else None
    if known:
        return frozenset({key(known, name)})
    keys = {key("file", name), *(key(other, name) for other in _FOREIGN)}
    if youtube_id(name):
        keys.add(key("youtube", name))
    return frozenset(keys)

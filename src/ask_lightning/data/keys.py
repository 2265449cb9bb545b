"""Keys: one name for each recording, the same in all datasets that hold it.

AudioCaps shares recordings with the AudioSet part of WavCaps, and Clotho with its FreeSound part, but each
dataset spells their ids in its own way. A key is one spelling for all, such as `youtube:vfY_TJq7n_U` or
`freesound:180913`.
"""

import html
import re
import unicodedata
from collections.abc import Collection, Mapping

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au"})
"""File name endings of the formats that soundfile reads."""

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
"""First part of the keys (the namespace) by the name of a collection in lower case."""

_YOUTUBE = re.compile(r"Y?([\w-]{11})(?:_\d+(?:\.\d+)?){0,2}", re.ASCII)
_NUMBERED = ("freesound", "bbc", "soundbible", "audiocap")


def file_stem(name: str) -> str:
    """The name of a file without its folder and without its ending, if that is an audio format.

    Args:
        name: Name or path of a file, or an id.

    Examples:
        >>> [file_stem(name) for name in ("AudioSet_SL/Yb0RFKhbpFJA.wav", "FR.CTC.08.001.wav", "2219")]
        ['Yb0RFKhbpFJA', 'FR.CTC.08.001', '2219']
    """
    # Not by pathlib, which takes ten times as long for half a million names.
    last = name.strip().rpartition("/")[2]
    head, dot, suffix = last.rpartition(".")
    return head if head and f"{dot}{suffix.lower()}" in AUDIO_SUFFIXES else last


def youtube_id(name: str) -> str | None:
    """The id of the YouTube video that a clip of AudioSet was cut from.

    Args:
        name: The id, perhaps with a `Y` in front, start and end behind it, or the ending of a file.

    Returns:
        The eleven characters of the id, or None for a name that cannot hold one.

    Examples:
        >>> [youtube_id(name) for name in ("b0RFKhbpFJA", "Yb0RFKhbpFJA.wav", "b0RFKhbpFJA_30_40", "rain")]
        ['b0RFKhbpFJA', 'b0RFKhbpFJA', 'b0RFKhbpFJA', None]
    """
    match = _YOUTUBE.fullmatch(file_stem(name))
    return match.group(1) if match else None


def normalize_title(name: str) -> str:
    """The title of a recording without differences that come from copying, archives and file systems.

    Args:
        name: Name of a file.

    Returns:
        Words of letters and digits in lower case, separated by single spaces.

    Examples:
        >>> normalize_title("Grillons-d&#39;Italie.wav") == normalize_title("grillons d'italie")
        True
    """
    text = unicodedata.normalize("NFKC", html.unescape(file_stem(name))).casefold()
    return re.sub(r"[\W_]+", " ", text).strip()


def plain_words(caption: str) -> str:
    """A caption in lower case and without punctuation, as in the packed files of ML-ACT.

    Args:
        caption: The caption.

    Examples:
        >>> plain_words("Ducks quack, loudly.")
        'ducks quack loudly'
    """
    return re.sub(r"[\W_]+", " ", caption.casefold()).strip()


def recording_key(namespace: str, name: str) -> str:
    """The key of a recording.

    Args:
        namespace: One of the values of `NAMESPACES`.
        name: Id of the recording or, in the namespace `file`, its title.

    Examples:
        >>> recording_key("youtube", "Yb0RFKhbpFJA.wav"), recording_key("freesound", "180913.flac")
        ('youtube:b0RFKhbpFJA', 'freesound:180913')
        >>> recording_key("file", "Rain_1.wav")
        'file:rain 1'
    """
    if namespace == "youtube":
        return f"youtube:{youtube_id(name) or file_stem(name)}"
    if namespace == "file":
        return f"file:{normalize_title(name) or file_stem(name)}"
    return f"{namespace}:{file_stem(name)}"


def stretch_keys(key: str, start: int | None, starts: Collection[int | None]) -> tuple[str, list[str]]:
    """The key and the aliases of a stretch of a recording.

    Args:
        key: Key of the recording.
        start: Start of the stretch in seconds, if it is known.
        starts: Starts of all stretches of the recording in a dataset. If there are several, each is a clip of
            its own.

    Examples:
        >>> stretch_keys("youtube:b0RFKhbpFJA", 30, {30})
        ('youtube:b0RFKhbpFJA', [])
        >>> stretch_keys("youtube:b0RFKhbpFJA", 30, {30, 130})
        ('youtube:b0RFKhbpFJA@30', ['youtube:b0RFKhbpFJA'])
    """
    if len(starts) < 2 or start is None:
        return key, []
    return f"{key}@{start}", [key]


def possible_keys(name: str, collection: str | None = None) -> frozenset[str]:
    """The keys that an id may stand for.

    Args:
        name: A key, or an id as any of the datasets writes it.
        collection: Collection that the id belongs to, if that is known: a key of `NAMESPACES`, in any case.

    Returns:
        One key if the collection is known, otherwise one for each namespace in which the id makes sense.

    Examples:
        >>> sorted(possible_keys("180913", "FreeSound"))
        ['freesound:180913']
        >>> "youtube:b0RFKhbpFJA" in possible_keys("Yb0RFKhbpFJA.wav")
        True
    """
    namespace, separator, rest = name.strip().partition(":")
    if separator and namespace in NAMESPACES.values():
        return frozenset({recording_key(namespace, rest)})
    known = NAMESPACES.get(collection.lower()) if collection else None
    if known:
        return frozenset({recording_key(known, name)})
    keys = {recording_key("file", name), *(recording_key(other, name) for other in _NUMBERED)}
    if youtube_id(name):
        keys.add(recording_key("youtube", name))
    return frozenset(keys)

"""Which file of a folder is which clip, and how a browser plays it."""

import io
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ask_lightning.data.audio.decoding import check_recording, open_audio
from ask_lightning.data.audio.media import MEDIA_SUFFIXES
from ask_lightning.data.keys import AUDIO_SUFFIXES, possible_keys
from ask_lightning.data.published.file_index import FolderIndex
from ask_lightning.utilities.optional_imports import import_optional

_MEDIA_TYPES = {
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
    ".oga": "audio/ogg",
    ".opus": "audio/ogg",
}
"""What browsers play as it is, by the ending of the file."""


@dataclass
class AudioFiles:
    """The files of clips.

    Attributes:
        paths: File of each clip; None where there is none, or not one alone.
        ambiguous: Names of the clips that have several files.
    """

    paths: list[Path | None] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)


def find_audio_files(folder: Path, names: Sequence[str], files: Sequence[str]) -> AudioFiles:
    """Find the audio files of clips below a folder.

    The path that a dataset writes counts most, then the name of the file, then the id of the recording, such
    as that of a YouTube video. No file outside the folder is taken, whatever a path says, but links in the
    folder are followed.

    Args:
        folder: Folder of the files, which may lie at any depth.
        names: Names of the clips: keys of recordings (see `ask_lightning.data.keys`), or ids.
        files: Name of each clip's file as its dataset writes it, empty where it is not known.

    Returns:
        The files that were found.

    Raises:
        FileNotFoundError: There is no such folder.

    Examples:
        >>> folder = getfixture("tmp_path")
        >>> (folder / "YvfY_TJq7n_U_130_140.wav").touch()
        >>> (folder / "Rain 1.wav").touch()
        >>> found = find_audio_files(folder, ["youtube:vfY_TJq7n_U", "freesound:12"], ["", "rain_1.flac"])
        >>> [path.name for path in found.paths]
        ['YvfY_TJq7n_U_130_140.wav', 'Rain 1.wav']
    """
    index = FolderIndex(folder, AUDIO_SUFFIXES | MEDIA_SUFFIXES)
    present = dict.fromkeys(index.names(index.count))
    found = AudioFiles()
    namesakes: _Namesakes | None = None
    for name, file in zip(names, files, strict=True):
        written = file or (name.removeprefix("file:") if name.startswith("file:") else "")
        if written in present:
            found.paths.append(folder / written)
            continue
        namesakes = namesakes or _Namesakes(folder, index, present)
        candidates = namesakes.of(name, written)
        if len(candidates) > 1:
            found.ambiguous.append(name)
        found.paths.append(folder / candidates[0] if len(candidates) == 1 else None)
    return found


class _Namesakes:
    """The files of clips that are not where their dataset says.

    Args:
        folder: Folder of the files.
        index: Its files.
        present: Their paths.
    """

    def __init__(self, folder: Path, index: FolderIndex, present: Iterable[str]) -> None:
        self._folder, self._index = folder, index
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_key: dict[str, list[str]] = defaultdict(list)
        for path in present:
            self._by_name[posixpath.basename(path)].append(path)
            for key in possible_keys(path):
                self._by_key[key].append(path)

    def of(self, name: str, written: str) -> list[str]:
        """The files that fit best, several if they fit equally well.

        Args:
            name: Name of the clip.
            written: Path of its file as the dataset writes it, or an empty text.
        """
        # A path may be an absolute one, or one with steps to the folder above.
        inside = os.path.relpath(Path(self._folder, written), self._folder) if written else ""
        inside = inside.replace(os.sep, "/")
        same_name = self._by_name.get(posixpath.basename(inside), [])
        ways = (
            [path for path in same_name if path == inside],
            [path for path in same_name if path.endswith(f"/{inside}")],
            same_name,
            self._index.find(written) if written else [],
            self._index.find_title(written) if written else [],
            _listed(self._by_key, possible_keys(name.partition("@")[0])),
        )
        return next((paths for paths in ways if paths), [])


def _listed(paths: dict[str, list[str]], keys: Iterable[str]) -> list[str]:
    """All paths under some keys, each once."""
    return list(dict.fromkeys(path for key in sorted(keys) for path in paths.get(key, [])))


def playable_sound(path: Path) -> tuple[Path | bytes, str]:
    """A sound in a format that browsers play.

    Args:
        path: Path of an audio file.

    Returns:
        The path itself if browsers play its format, otherwise the bytes of a wav file; and the media type.

    Raises:
        AudioFileError: The file cannot be read.

    Examples:
        >>> playable_sound(Path("rain.flac"))[1]
        'audio/flac'
    """
    media_type = _MEDIA_TYPES.get(path.suffix.lower())
    if media_type is not None:
        return path, media_type
    content = io.BytesIO()
    with open_audio(path.name, path) as recording:
        check_recording(recording, samples=False)
        samples = recording.read(0, recording.frames)  # (T, C)
    import_optional("soundfile").write(content, samples, recording.rate, format="WAV")
    return content.getvalue(), _MEDIA_TYPES[".wav"]

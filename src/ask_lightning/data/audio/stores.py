"""Where the audio of clips is."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from ask_lightning.data.audio.decoding import Recording, open_audio
from ask_lightning.data.clips import Clip


class AudioStore(Protocol):
    """Opens the audio of clips. Stores can be pickled, and read in forked processes."""

    def open(self, clip: Clip) -> AbstractContextManager[Recording]:
        """Open the audio of a clip for reading.

        Args:
            clip: One of the clips that the store was made for.

        Raises:
            AudioFileError: It cannot be read.
        """
        ...

    def origin(self, clip: Clip) -> tuple[Path, str]:
        """The file that holds the audio of a clip, and the place in the file if it holds several clips.

        Args:
            clip: One of the clips that the store was made for.
        """
        ...


class FileStore:
    """An audio file for each clip.

    Args:
        root: Folder of the files.
        files: Path of the file of each clip by key, relative to `root` or absolute.

    Examples:
        >>> store = FileStore("audio", {"youtube:vfY_TJq7n_U": "val/YvfY_TJq7n_U.wav"})
        >>> store.origin(Clip("youtube:vfY_TJq7n_U", ("ducks",), "vfY_TJq7n_U"))[0].as_posix()
        'audio/val/YvfY_TJq7n_U.wav'
    """

    def __init__(self, root: str | Path, files: Mapping[str, str]) -> None:
        self._root = Path(root)
        self._files = dict(files)

    def open(self, clip: Clip) -> AbstractContextManager[Recording]:
        """Open the file of a clip; see `AudioStore`."""
        path, _ = self.origin(clip)
        return open_audio(str(path), path)

    def origin(self, clip: Clip) -> tuple[Path, str]:
        """The file of a clip; see `AudioStore`."""
        return self._root / self._files[clip.key], ""

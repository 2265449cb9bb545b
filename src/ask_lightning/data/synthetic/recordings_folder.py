"""Writes synthetic soundscapes as a folder of recordings with a table, as users have them."""

import csv
from pathlib import Path

from ask_lightning.data.synthetic.soundscapes import Soundscapes
from ask_lightning.utilities.optional_imports import import_optional

_FORMATS = ("wav", "flac", "ogg", "mp3")


def write_recordings(
    folder: str | Path, *, num_clips: int = 40, seconds: float = 2.0, sample_rate: int = 44100, seed: int = 0
) -> Path:
    """Write `clips.csv`, with the columns `file` and `caption`, and `sounds/…` in wav, flac, ogg and mp3.

    Args:
        folder: Folder to write to, made if missing.
        num_clips: Number of clips, each with one caption, at least 1.
        seconds: Length of the clips, at least 0.5.
        sample_rate: Rate of the audio in Hz, at least 16000. mp3 files hold up to 48000.
        seed: Seed of the sounds, at least 0.

    Returns:
        The folder, as `FolderData` takes it.

    Raises:
        ImportError: soundfile is missing.

    Examples:
        >>> root = write_recordings(getfixture("tmp_path"), num_clips=4, seconds=0.5)
        >>> sorted(path.name for path in (root / "sounds").iterdir())
        ['sound-0.wav', 'sound-1.flac', 'sound-2.ogg', 'sound-3.mp3']
    """
    root = Path(folder)
    (root / "sounds").mkdir(parents=True, exist_ok=True)
    clips = Soundscapes(num_clips, seed=seed, seconds=seconds, captions_per_clip=1, sample_rate=sample_rate)
    with (root / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "caption"))
        for index, (caption,) in enumerate(clips.captions):
            name = f"sounds/sound-{index}.{_FORMATS[index % len(_FORMATS)]}"
            import_optional("soundfile").write(root / name, clips[index]["waveform"].numpy(), sample_rate)
            writer.writerow((name, caption))
    return root

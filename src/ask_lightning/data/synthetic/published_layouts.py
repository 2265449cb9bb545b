"""Writes synthetic soundscapes in the layouts of AudioCaps, Clotho and WavCaps, for demonstrations and tests.

The files differ from the published datasets in sound and size alone: the same code reads both.
"""

import csv
import json
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ask_lightning.data.published.collections import COLLECTIONS
from ask_lightning.data.splits import Split
from ask_lightning.data.synthetic.soundscapes import Soundscapes
from ask_lightning.utilities.optional_imports import import_optional

_START = 30  # seconds, of every clip of AudioCaps
_CLOTHO_SPLITS: dict[Split, str] = {"train": "development", "val": "validation", "test": "evaluation"}
_FIRST_SOUND: dict[Split, int] = {"train": 100_000, "val": 200_000, "test": 300_000}
_CAPTIONS = 5
# Offsets of the seeds of the three datasets, so that each has recordings of its own.
_AUDIOCAPS, _CLOTHO, _WAVCAPS = range(3)


def write_audiocaps(
    folder: str | Path,
    *,
    num_train: int = 24,
    num_val: int = 6,
    num_test: int = 6,
    seconds: float = 2.0,
    sample_rate: int = 32000,
    seed: int = 0,
) -> Path:
    """Write `train.csv`, `val.csv`, `test.csv` and `audio/{split}/Y{youtube_id}.wav`.

    Args:
        folder: Folder to write to, made if missing.
        num_train: Number of training clips, each with one caption.
        num_val: Number of validation clips, each with five captions.
        num_test: Number of test clips, each with five captions.
        seconds: Length of the clips, at least 0.5.
        sample_rate: Rate of the audio in Hz, at least 16000.
        seed: Seed of the sounds, at least 0.

    Returns:
        The folder, as `AudioCapsData` takes it.

    Raises:
        ImportError: soundfile is missing.

    Examples:
        >>> root = write_audiocaps(getfixture("tmp_path"), num_train=2, num_val=1, num_test=1, seconds=0.5)
        >>> sorted(path.name for path in root.iterdir())
        ['audio', 'test.csv', 'train.csv', 'val.csv']
    """
    root = Path(folder)
    sizes: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
    number = 90_000
    for split, size in sizes.items():
        clips = _make_soundscapes(
            size, split, seconds, sample_rate, 3 * seed + _AUDIOCAPS, 1 if split == "train" else 5
        )
        rows: list[Sequence[object]] = [("audiocap_id", "youtube_id", "start_time", "caption")]
        for index, captions in enumerate(clips.captions):
            video = _video_id(split, index)
            _write_audio(root / "audio" / split / f"Y{video}.wav", clips, index, sample_rate)
            for caption in captions:
                number += 1
                rows.append((number, video, _START, caption))
        _write_csv(root / f"{split}.csv", rows)
    return root


def write_clotho(
    folder: str | Path,
    *,
    num_train: int = 16,
    num_val: int = 6,
    num_test: int = 6,
    seconds: float = 2.0,
    sample_rate: int = 44100,
    seed: int = 0,
) -> Path:
    """Write the tables of captions and metadata of Clotho and `clotho_audio_files/{split}/{title}.wav`.

    Clips differ in length, as those of Clotho do: the shortest takes three quarters of `seconds`.

    Args:
        folder: Folder to write to, made if missing.
        num_train: Number of clips of the development split, each with five captions.
        num_val: Number of clips of the validation split, each with five captions.
        num_test: Number of clips of the evaluation split, each with five captions.
        seconds: Length of the longest clips, at least 0.7.
        sample_rate: Rate of the audio in Hz, at least 16000.
        seed: Seed of the sounds, at least 0.

    Returns:
        The folder, as `ClothoData` takes it.

    Raises:
        ImportError: soundfile is missing.

    Examples:
        >>> root = write_clotho(getfixture("tmp_path"), num_train=2, num_val=1, num_test=1, seconds=1)
        >>> len(list(root.glob("clotho_csv_files/*.csv")))
        6
    """
    root = Path(folder)
    sizes: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
    for split, size in sizes.items():
        name = _CLOTHO_SPLITS[split]
        clips = _make_soundscapes(size, split, seconds, sample_rate, 3 * seed + _CLOTHO, _CAPTIONS)
        captions: list[Sequence[object]] = [("file_name", *(f"caption_{i + 1}" for i in range(_CAPTIONS)))]
        metadata: list[Sequence[object]] = [("file_name", "keywords", "sound_id", "sound_link")]
        for index, texts in enumerate(clips.captions):
            title = f"Field recording no. {index + 1}, {name}.wav"
            share = 1 - 0.25 * (index % 3 + 1) / 3 if index else 1.0
            path = root / "clotho_audio_files" / name / title
            _write_audio(path, clips, index, sample_rate, share=share)
            captions.append((title, *texts))
            sound = _FIRST_SOUND[split] + index
            metadata.append((title, "soundscape", sound, f"https://freesound.org/s/{sound}"))
        _write_csv(root / "clotho_csv_files" / f"clotho_captions_{name}.csv", captions)
        _write_csv(root / "clotho_csv_files" / f"clotho_metadata_{name}.csv", metadata)
    return root


def write_wavcaps(
    folder: str | Path,
    *,
    num_clips: int = 32,
    overlap: int = 1,
    seconds: float = 2.0,
    sample_rate: int = 32000,
    seed: int = 0,
) -> Path:
    """Write the four JSON files of WavCaps and `audio/{collection}/{id}.flac`.

    As in the real WavCaps, some clips are evaluation clips of the other datasets, which should be left out.

    Args:
        folder: Folder to write to, made if missing.
        num_clips: Number of clips of all collections together, at least 4.
        overlap: Number of AudioSet clips, and of FreeSound clips, that have the ids of validation clips of
            `write_audiocaps` and `write_clotho`.
        seconds: Length of the clips, at least 0.5.
        sample_rate: Rate of the audio in Hz, at least 16000.
        seed: Seed of the sounds, at least 0.

    Returns:
        The folder, as `WavCaps` takes it.

    Raises:
        ImportError: soundfile is missing.
        ValueError: There are too few clips.

    Examples:
        >>> root = write_wavcaps(getfixture("tmp_path"), num_clips=4, overlap=0, seconds=0.5)
        >>> sorted(path.name for path in root.glob("json_files/*/*.json"))
        ['as_final.json', 'bbc_final.json', 'fsd_final.json', 'sb_final.json']
    """
    if num_clips < 4 or 4 * overlap > num_clips:
        raise ValueError(
            f"Argument `num_clips` has to be at least 4 and 4 × `overlap`, but got {num_clips} and {overlap}."
        )
    root = Path(folder)
    clips = _make_soundscapes(num_clips, "train", seconds, sample_rate, 3 * seed + _WAVCAPS, 1)
    entries: dict[str, list[dict[str, Any]]] = {name: [] for name in ("as", "fsd", "bbc", "sb")}
    folders = {known.table.removesuffix("_final.json"): known.name for known in COLLECTIONS}
    for index, (caption,) in enumerate(clips.captions):
        name = list(entries)[index % 4]
        order = index // 4
        facts = {"caption": caption, "duration": seconds, "audio": "wav_path"}
        if name == "as":
            video = _video_id("val" if order < overlap else "wavcaps", order)
            entry = {"id": f"Y{video}.wav", **facts}
        elif name == "fsd":
            sound = str(_FIRST_SOUND["val"] + order if order < overlap else 400_000 + order)
            link = f"https://freesound.org/people/demo/sounds/{sound}/download/{sound}.wav"
            entry = {"id": sound, "file_name": f"Take {order}.wav", "download_link": link, **facts}
        elif name == "bbc":
            entry = {"id": f"NHU{order:08d}", "category": "['Nature']", **facts}
        else:
            entry = {"id": str(order + 1), "title": f"Scene {order}", **facts}
        entries[name].append(entry)
        path = root / "audio" / folders[name] / f"{str(entry['id']).removesuffix('.wav')}.flac"
        _write_audio(path, clips, index, sample_rate)
    for name, listed in entries.items():
        path = root / "json_files" / folders[name] / f"{name}_final.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"num_captions_per_audio": 1, "data": listed}))
    return root


def _make_soundscapes(
    size: int, split: Split, seconds: float, sample_rate: int, seed: int, captions: int
) -> Soundscapes:
    """Render the soundscapes of a split."""
    return Soundscapes(
        size, split=split, seed=seed, seconds=seconds, captions_per_clip=captions, sample_rate=sample_rate
    )


def _video_id(split: str, index: int) -> str:
    """Eleven characters, as YouTube has them."""
    digest = blake2b(f"{split} {index}".encode(), digest_size=9).digest()
    return urlsafe_b64encode(digest).decode()[:11]


def _write_audio(path: Path, clips: Soundscapes, index: int, sample_rate: int, share: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    waveform = clips[index * clips.captions_per_clip]["waveform"].numpy()
    import_optional("soundfile").write(path, waveform[: int(share * len(waveform))], sample_rate)


def _write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)

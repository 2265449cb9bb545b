"""Data for audio–text retrieval.

Synthetic soundscapes, any folder of audio files with captions, and AudioCaps, Clotho and WavCaps.
"""

from ask_lightning.data.annotations import read_audiocaps, read_clotho, read_wavcaps
from ask_lightning.data.audiocaps import AudioCapsData
from ask_lightning.data.captions import CaptionedFile, read_captions, split_by_clip
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.clips import Clip
from ask_lightning.data.clotho import ClothoData
from ask_lightning.data.counts import PUBLISHED, SplitReport
from ask_lightning.data.datamodule import (
    EpochSampler,
    FolderData,
    PairData,
    RetrievalData,
    SoundscapeData,
    collate_pairs,
)
from ask_lightning.data.demo import write_audiocaps, write_clotho, write_wavcaps
from ask_lightning.data.features import log_mel
from ask_lightning.data.folder import AudioFolder
from ask_lightning.data.leakage import Leakage, check_leakage, find_leakage, leaked_ids
from ask_lightning.data.published import PublishedData
from ask_lightning.data.recordings import AudioFileError
from ask_lightning.data.soundscapes import Event, Scene, Soundscapes
from ask_lightning.data.synthesis import EVENT_PROBABILITIES, EVENT_TYPES, EventType
from ask_lightning.data.wavcaps import WavCaps

__all__ = [
    "EVENT_PROBABILITIES",
    "EVENT_TYPES",
    "PUBLISHED",
    "AudioCapsData",
    "AudioFileError",
    "AudioFolder",
    "CaptionedFile",
    "Clip",
    "ClipDataset",
    "ClothoData",
    "EpochSampler",
    "Event",
    "EventType",
    "FolderData",
    "Leakage",
    "PairData",
    "PublishedData",
    "RetrievalData",
    "Scene",
    "SoundscapeData",
    "Soundscapes",
    "SplitReport",
    "WavCaps",
    "check_leakage",
    "collate_pairs",
    "find_leakage",
    "leaked_ids",
    "log_mel",
    "read_audiocaps",
    "read_captions",
    "read_clotho",
    "read_wavcaps",
    "split_by_clip",
    "write_audiocaps",
    "write_clotho",
    "write_wavcaps",
]

"""Data for audio–text retrieval: synthetic soundscapes, and any folder of audio files with captions."""

from ask_lightning.data.captions import CaptionedFile, read_captions, split_by_clip
from ask_lightning.data.datamodule import (
    EpochSampler,
    FolderData,
    PairData,
    RetrievalData,
    SoundscapeData,
    collate_pairs,
)
from ask_lightning.data.features import log_mel
from ask_lightning.data.folder import AudioFileError, AudioFolder
from ask_lightning.data.soundscapes import Event, Scene, Soundscapes
from ask_lightning.data.synthesis import EVENT_PROBABILITIES, EVENT_TYPES, EventType

__all__ = [
    "EVENT_PROBABILITIES",
    "EVENT_TYPES",
    "AudioFileError",
    "AudioFolder",
    "CaptionedFile",
    "EpochSampler",
    "Event",
    "EventType",
    "FolderData",
    "PairData",
    "RetrievalData",
    "Scene",
    "SoundscapeData",
    "Soundscapes",
    "collate_pairs",
    "log_mel",
    "read_captions",
    "split_by_clip",
]

"""Data for audio–text retrieval.

Synthetic soundscapes, any folder of audio files with captions, and AudioCaps, Clotho and WavCaps.
"""

from ask_lightning.data.audio.decoding import AudioFileError
from ask_lightning.data.audio.features import log_mel
from ask_lightning.data.audio.options import AudioOptions
from ask_lightning.data.caption_style import plain_caption
from ask_lightning.data.captions import read_captions
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.clips import Clip
from ask_lightning.data.datamodules import (
    DatasetsDataModule,
    EpochSampler,
    FolderData,
    RetrievalDataModule,
    SoundscapeData,
    collate_pairs,
)
from ask_lightning.data.folder import AudioFolder
from ask_lightning.data.published.annotations import read_audiocaps, read_clotho, read_wavcaps
from ask_lightning.data.published.audiocaps import AudioCapsData
from ask_lightning.data.published.clotho import ClothoData
from ask_lightning.data.published.counts import PUBLISHED_COUNTS, SplitReport
from ask_lightning.data.published.datamodule import PublishedDataModule
from ask_lightning.data.published.enrichment import EnrichedCaptions
from ask_lightning.data.published.knowledge import KnowledgeSource
from ask_lightning.data.published.leakage import Leakage, check_leakage, find_leakage, leaked_ids
from ask_lightning.data.published.wavcaps import WavCaps
from ask_lightning.data.splits import split_by_clip
from ask_lightning.data.synthetic.published_layouts import write_audiocaps, write_clotho, write_wavcaps
from ask_lightning.data.synthetic.recordings_folder import write_recordings
from ask_lightning.data.synthetic.soundscapes import Event, Scene, Soundscapes
from ask_lightning.data.synthetic.synthesis import EVENT_PROBABILITIES, EVENT_TYPES, EventType

__all__ = [
    "EVENT_PROBABILITIES",
    "EVENT_TYPES",
    "PUBLISHED_COUNTS",
    "AudioCapsData",
    "AudioFileError",
    "AudioFolder",
    "AudioOptions",
    "Clip",
    "ClipDataset",
    "ClothoData",
    "DatasetsDataModule",
    "EnrichedCaptions",
    "EpochSampler",
    "Event",
    "EventType",
    "FolderData",
    "KnowledgeSource",
    "Leakage",
    "PublishedDataModule",
    "RetrievalDataModule",
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
    "plain_caption",
    "read_audiocaps",
    "read_captions",
    "read_clotho",
    "read_wavcaps",
    "split_by_clip",
    "write_audiocaps",
    "write_clotho",
    "write_recordings",
    "write_wavcaps",
]

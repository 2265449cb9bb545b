"""The four collections of WavCaps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Collection:
    """A collection of WavCaps.

    Attributes:
        name: Name of the collection, also of its folder of audio.
        namespace: Namespace of the keys of its clips.
        table: Name of the JSON file that lists its clips.
        folder_word: Word by which a folder of its audio is recognised.
        site: Part of the download links of its clips. Empty: they have none.
    """

    name: str
    namespace: str
    table: str
    folder_word: str
    site: str = ""


COLLECTIONS = (
    Collection("AudioSet_SL", "youtube", "as_final.json", "audioset"),
    Collection("BBC_Sound_Effects", "bbc", "bbc_final.json", "bbc", "bbcrewind"),
    Collection("FreeSound", "freesound", "fsd_final.json", "freesound", "freesound.org"),
    Collection("SoundBible", "soundbible", "sb_final.json", "soundbible", "soundbible"),
)
"""All collections, in the order of their names."""

"""The header lines of published annotation tables, and the frame of a JSON of WavCaps."""

AUDIOCAPS = "audiocap_id,youtube_id,start_time,caption\n"
CLOTHO = "file_name,caption_1,caption_2\n"


def wavcaps_json(*entries: dict, captions: int = 1) -> dict:
    """The content of a JSON file of WavCaps."""
    return {"num_captions_per_audio": captions, "data": list(entries)}

"""Files with a sound track, written by PyAV."""

from fractions import Fraction
from pathlib import Path

import numpy as np


def write_media(path: Path, samples: np.ndarray, rate: int, codec: str, *, picture: bool = False) -> Path:
    """A file with samples `(T,)` in one channel, behind a few black pictures if it shall be a film."""
    import av

    with av.open(str(path), "w") as container:
        film = container.add_stream("mpeg4", rate=10) if picture else None
        track = container.add_stream(codec, rate=rate, layout="mono")
        if film is not None:
            film.width = film.height = 32
            film.pix_fmt = "yuv420p"
            for number in range(5):
                shown = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
                shown.pts = number
                container.mux(film.encode(shown))
            container.mux(film.encode(None))
        heard = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
        heard.sample_rate, heard.pts, heard.time_base = rate, 0, Fraction(1, rate)
        fifo = av.AudioFifo()
        fifo.write(heard)
        size = track.codec_context.frame_size or 1024
        while (frame := fifo.read(size)) or (frame := fifo.read(size, partial=True)):
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return path


def write_film(path: Path) -> Path:
    """A film without a sound track."""
    import av

    with av.open(str(path), "w") as container:
        film = container.add_stream("mpeg4", rate=10)
        film.width = film.height = 32
        film.pix_fmt = "yuv420p"
        container.mux(
            film.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24"))
        )
        container.mux(film.encode(None))
    return path

"""What the page asks for clips by their number: sounds, spectrograms, cards."""

from collections.abc import MutableMapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ask_lightning.data.audio.decoding import AudioFileError
from ask_lightning.page.audio_files import playable_sound
from ask_lightning.page.clip_cards import CLIP_PATH, clip_card
from ask_lightning.page.collection import Collection
from ask_lightning.page.guard import Receive, Scope, Send
from ask_lightning.page.pictures import draw_spectrogram
from ask_lightning.page.texts import as_unicode
from ask_lightning.utilities.optional_imports import import_optional

# Spectrograms that are not drawn again.
_PICTURES_KEPT = 512


def add_clip_routes(app: Any, collection: Collection) -> None:
    """Add what the page asks for clips by their number.

    Args:
        app: The FastAPI application.
        collection: The clips.
    """
    responses = import_optional("starlette.responses")

    def refuse(message: str, status: int) -> Any:
        return responses.PlainTextResponse(as_unicode(message), status_code=status)

    def file_of(row: int) -> Path | None:
        return collection.files[row] if 0 <= row < len(collection) else None

    # Many clips are drawn again with each change of a filter, and anew where the file is another than it was.
    @lru_cache(maxsize=_PICTURES_KEPT)
    def picture(file: Path, changed: int, size: int) -> bytes:
        return draw_spectrogram(file)

    def gone(file: Path) -> Any:
        return refuse(f"{file.name}: the file is no longer there.", 404)

    class SoundFile(responses.FileResponse):  # type: ignore[misc,name-defined]
        """A file that may go before it is sent; nothing is sent of it before it is open."""

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            held: list[MutableMapping[str, Any]] = []
            is_open = False

            async def send_when_open(message: MutableMapping[str, Any]) -> None:
                nonlocal is_open
                held.append(message)
                if message["type"] == "http.response.start":
                    return
                is_open = True
                while held:
                    await send(held.pop(0))

            try:
                await super().__call__(scope, receive, send_when_open)
            except (OSError, RuntimeError):
                if is_open:
                    raise
                await gone(Path(self.path))(scope, receive, send)

    @app.api_route(f"{CLIP_PATH}/{{row}}", methods=["GET", "HEAD"], response_model=None)  # type: ignore[untyped-decorator]
    def sound(row: int) -> Any:
        file = file_of(row)
        if file is None:
            return refuse("There is no sound of this clip.", 404)
        if not file.is_file():
            return gone(file)
        try:
            content, media_type = playable_sound(file)
        except (AudioFileError, ImportError) as error:
            return refuse(str(error), 422)
        except OSError:
            return gone(file)
        headers = {"cache-control": "no-cache"}
        if isinstance(content, bytes):
            return responses.Response(content, media_type=media_type, headers=headers)
        return SoundFile(content, media_type=media_type, headers=headers)

    @app.get(f"{CLIP_PATH}/{{row}}/spectrogram.png", response_model=None)  # type: ignore[untyped-decorator]
    def spectrogram(row: int) -> Any:
        file = file_of(row)
        if file is None:
            return refuse("There is no sound of this clip.", 404)
        try:
            state = file.stat()
            content = picture(file, state.st_mtime_ns, state.st_size)
        except (AudioFileError, ImportError) as error:
            return refuse(str(error), 422)
        except OSError:
            return gone(file)
        return responses.Response(content, media_type="image/png", headers={"cache-control": "no-cache"})

    @app.get(f"{CLIP_PATH}/{{row}}/card", response_model=None)  # type: ignore[untyped-decorator]
    def card(row: int) -> Any:
        if not 0 <= row < len(collection):
            return refuse("There is no such clip.", 404)
        return responses.HTMLResponse(clip_card(collection, row))

"""Which requests the page's server answers."""

import json
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from ask_lightning.page.clip_cards import CLIP_PATH
from ask_lightning.utilities.optional_imports import import_optional

_UPLOAD = "/gradio_api/upload"
# What of Gradio's own server the page needs; the rest (proxy, video, file routes, …) is not there.
_GRADIO_PATHS = (
    "/config",
    "/theme.css",
    "/assets/",
    "/static/",
    "/svelte/",
    "/favicon.ico",
    "/manifest.json",
    "/gradio_api/app_id",
    "/gradio_api/cancel",
    "/gradio_api/heartbeat/",
    "/gradio_api/info",
    "/gradio_api/queue/",
    "/gradio_api/reset",
    "/gradio_api/startup-events",
    _UPLOAD,
)
_UPLOADED_FILE = "/gradio_api/file="
_QUESTION = "/gradio_api/queue/join"
_STARTED_ANEW = "the server has been started anew since this page was opened. Load the page again."
_LARGEST_QUESTION = 1024**2  # bytes; a question holds a text or the name of an uploaded sound
# Nothing is loaded from elsewhere or sent there, and no other site shows the page in a frame.
_CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; base-uri 'self'; "
    "object-src 'none'"
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """Answers the requests that the page makes and no others.

    Args:
        app: The application behind it.
        uploads: Folder of the sounds that users have given.
        key: Key of the collection.
    """

    def __init__(self, app: Any, uploads: Path, key: str) -> None:
        self.app = app
        self.uploads = uploads
        self.key = key
        self._uploading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it, see ASGI."""
        if scope["type"] == "http" and not is_served(scope["path"], self.uploads):
            await _refusal(404, "Not found")(scope, receive, send)
            return
        if scope["type"] == "http" and self._is_of_others(scope):
            await _refusal(410, _STARTED_ANEW)(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"].startswith(_QUESTION):
            body = await _body_of(receive, _LARGEST_QUESTION)
            if body is None:
                await _refusal(413, "The question is too long")(scope, receive, send)
                return
            if not names_uploads_alone(body, self.uploads):
                await _refusal(403, "A sound has to be uploaded first")(scope, receive, send)
                return
            receive = _again(body, receive)

        async def send_with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _CONTENT_POLICY.encode())
                sniffing = (b"x-content-type-options", b"nosniff")
                message["headers"] = [*message.get("headers", ()), policy, sniffing]
            await send(message)

        if scope["type"] == "http" and scope["path"] == _UPLOAD:
            await self._take_sound(scope, receive, send_with_policy)
        else:
            await self.app(scope, receive, send_with_policy)

    async def _take_sound(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an upload on, and remove what those that ended in the middle have left, as Gradio does not."""
        self._uploading += 1
        try:
            await self.app(scope, receive, send)
        except OSError as error:
            message = "A sound was not taken: %s. Free space in %s, or set TMPDIR to another disk."
            logging.getLogger("uvicorn.error").error(message, error, self.uploads)
        finally:
            self._uploading -= 1
            if not self._uploading:
                for part in self.uploads.iterdir():  # what is whole lies in folders
                    if part.is_file():
                        os.truncate(part, 0)  # which frees the disk although Gradio still has it open
                        part.unlink()

    def _is_of_others(self, scope: Scope) -> bool:
        """Whether a page asks for a clip by the number that another server gave it, before a restart."""
        keys = parse_qs(scope["query_string"].decode("latin-1")).get("of", [self.key])
        return scope["path"].startswith(CLIP_PATH) and keys != [self.key]


def is_served(path: str, uploads: Path) -> bool:
    """Whether the page has a use for a path.

    Args:
        path: Decoded path of a request.
        uploads: Folder of the sounds that users have given, which they hear again.

    Examples:
        >>> uploads = Path("/tmp/sounds")
        >>> [is_served(path, uploads) for path in ("/", "/clip/3", "/gradio_api/file=/tmp/sounds/7/a.wav")]
        [True, True, True]
        >>> [is_served(path, uploads) for path in ("/gradio_api/file=/etc/hosts", "/gradio_api/proxy=http://x")]
        [False, False]
        >>> is_served("/gradio_api/file=/tmp/sounds/../a.wav", uploads)
        False
    """
    if path.startswith(_UPLOADED_FILE):
        return _is_upload(path.removeprefix(_UPLOADED_FILE), uploads)
    return path == "/" or path.startswith((f"{CLIP_PATH}/", *_GRADIO_PATHS))


def names_uploads_alone(body: bytes, uploads: Path) -> bool:
    """Whether a question names no file but sounds that users have given.

    Gradio copies whatever file or address a question names to the folder of uploads, where it can be fetched.

    Args:
        body: The question as JSON.
        uploads: Folder of the sounds that users have given.

    Examples:
        >>> bodies = (b'["rain"]', b'[{"path": "/up/7/a.wav"}]', b'[{"path": "/etc/passwd"}]')
        >>> [names_uploads_alone(body, Path("/up")) for body in bodies]
        [True, True, False]
    """
    try:
        left = [json.loads(body)]
    except (ValueError, RecursionError):
        return False
    while left:
        part = left.pop()
        if isinstance(part, dict):
            if "path" in part and not _is_upload(part["path"], uploads):
                return False
            left += part.values()
        elif isinstance(part, list):
            left += part
    return True


def _is_upload(file: object, uploads: Path) -> bool:
    """Whether a path, which may be of any type, is one below the folder of uploads."""
    if not isinstance(file, str) or ".." in Path(file).parts:
        return False
    return uploads in Path(os.path.normpath(file)).parents


def _refusal(status: int, text: str) -> Any:
    """An answer without a page."""
    return import_optional("starlette.responses").PlainTextResponse(text, status_code=status)


async def _body_of(receive: Receive, largest: int) -> bytes | None:
    """The body of a request; `None` if it has more than so many bytes, the rest of which is not read."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > largest:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """What an application receives of a request whose body has been read."""
    bodies = [body]

    async def first_the_body() -> MutableMapping[str, Any]:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await receive()

    return first_the_body

"""The server of the page: which requests it answers, and with what."""

import json
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import lru_cache, partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from ask_lightning.data.audio.decoding import AudioFileError
from ask_lightning.page.audio_files import playable_sound
from ask_lightning.page.clip_cards import CLIP_PATH, answer_html, clip_card
from ask_lightning.page.clip_map import choose_rows, map_html, place_points
from ask_lightning.page.collection import MOST_SHOWN, Answer, Collection, answer_query, filter_matches
from ask_lightning.page.pictures import draw_spectrogram
from ask_lightning.page.texts import as_html, as_unicode
from ask_lightning.utilities.optional_imports import import_optional

LARGEST_UPLOAD = 64 * 1024**2
"""Size in bytes above which a sound is not taken."""

_HERE = Path(__file__).parent
_SECONDS_OF_UPLOADS = 3600
_SECONDS_TO_FINISH = 2  # of answers after Ctrl-C
_PICTURES_KEPT = 512
_NO_LIMIT = -1
_COUNTS = (1, MOST_SHOWN, 10)  # of hits: at least, at most, at first

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
    "/gradio_api/upload",
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

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _Guard:
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

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
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

        await self.app(scope, receive, send_with_policy)

    def _is_of_others(self, scope: _Scope) -> bool:
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


async def _body_of(receive: _Receive, largest: int) -> bytes | None:
    """The body of a request; `None` if it has more than so many bytes, the rest of which is not read."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > largest:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: _Receive) -> _Receive:
    """What an application receives of a request whose body has been read."""
    bodies = [body]

    async def first_the_body() -> MutableMapping[str, Any]:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await receive()

    return first_the_body


def make_app(collection: Collection, uploads: Path, hosts: list[str]) -> Any:
    """Make the application that shows a collection.

    Args:
        collection: The clips.
        uploads: Folder for the sounds that users give. The environment variable `GRADIO_TEMP_DIR` has to
            name it.
        hosts: Names under which the server may be called; `["*"]` for any.

    Returns:
        An ASGI application.

    Raises:
        ImportError: gradio is missing.
        ValueError: There are no clips.
    """
    if not len(collection):
        raise ValueError("Argument `collection` has to hold at least one clip, but it is empty.")
    fastapi = import_optional("fastapi")
    gradio = import_optional("gradio")
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_clip_routes(app, collection)
    app = gradio.mount_gradio_app(
        app,
        _make_blocks(gradio, collection),
        path="/",
        footer_links=[],
        run_history=False,
        max_file_size=LARGEST_UPLOAD,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        theme=_make_theme(gradio),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(_HERE / 'page.js').read_text(encoding='utf-8')}</script>",
    )
    app.add_middleware(_Guard, uploads=uploads, key=collection.key)
    # A site that gives its own name the address 127.0.0.1 must not read the page.
    app.add_middleware(
        import_optional("starlette.middleware.trustedhost").TrustedHostMiddleware, allowed_hosts=hosts
    )
    return app


def _make_theme(gradio: Any) -> Any:
    """Colours with enough contrast for text, and fonts of the system, so that none is loaded."""
    return gradio.themes.Soft(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["monospace"],
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_background_fill="none",
        block_title_padding="0",
        block_label_text_color="*body_text_color",
        block_label_text_color_dark="*body_text_color",
        block_label_background_fill="none",
        block_label_background_fill_dark="none",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_600",
        color_accent="*primary_700",
    )


def _add_clip_routes(app: Any, collection: Collection) -> None:
    """Add what the page asks for clips by their number."""
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

        async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
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


def _make_blocks(gradio: Any, collection: Collection) -> Any:
    """Lay out the page and connect its parts."""

    # A field in which nobody has typed yet may hold None.
    def show(answer: Answer, words: str | None, lowest: float, count: int) -> str:
        limit = lowest if lowest > _NO_LIMIT else None
        left = (words or "") if answer.finds_all else ""  # by which a search of the best ones went already
        shown = filter_matches(collection, answer.matches, words=left, lowest=limit, count=int(count))
        return answer_html(collection, answer, shown)

    def ask(query: str | Path | None, refined: bool, words: str | None, *others: Any) -> tuple[Answer, str]:
        answer = answer_query(collection, query, refined, words or "")
        return answer, show(answer, words, *others)

    def ask_sound(path: str | None, refined: bool, *filters: Any) -> tuple[Answer, str]:
        return ask(None if path is None else Path(path), refined, *filters)

    def ask_again(answer: Answer, refined: bool, *filters: Any) -> tuple[Answer, str]:
        if answer.query is None:
            return answer, show(answer, *filters)
        return ask(answer.query, refined, *filters)

    def filter_by_words(answer: Answer, refined: bool, *filters: Any) -> tuple[Answer, str]:
        if answer.finds_all:
            return answer, show(answer, *filters)
        return ask_again(answer, refined, *filters)

    with gradio.Blocks(
        title=as_unicode(f"Search sounds: {collection.title}"),
        analytics_enabled=False,
        delete_cache=(_SECONDS_OF_UPLOADS, _SECONDS_OF_UPLOADS),
        fill_width=True,
    ) as blocks:
        gradio.HTML(
            # What is said to screen readers stays the same element, for new ones are not listened to.
            '<a class="skip" href="#results">Skip to the results</a>'
            f'<header class="page" data-of="{collection.key}"><h1>Search sounds</h1>'
            f"<p>{as_html(collection.title)}</p></header>"
            '<div id="said" class="unseen" role="status" aria-live="polite"></div>',
            elem_id="page-header",
        )
        with gradio.Tabs():
            with gradio.Tab("Search"), gradio.Row(elem_id="search"):
                with gradio.Column(scale=1, min_width=280, elem_id="query"):
                    text = gradio.Textbox(
                        label="Describe a sound",
                        placeholder="a dog barks in the rain",
                        lines=1,
                        max_lines=1,
                        max_length=1000,
                        autofocus=True,
                        elem_id="text",
                    )
                    button = gradio.Button("Search", variant="primary", elem_id="ask")
                    sound = gradio.Audio(
                        label="Or give a sound",
                        sources=["upload", "microphone"],
                        type="filepath",
                        editable=False,
                        elem_id="sound",
                    )
                    with gradio.Accordion("Filters", open=True, elem_id="filters"):
                        words = gradio.Textbox(
                            label="Caption or name contains", lines=1, max_lines=1, elem_id="words"
                        )
                        lowest = gradio.Slider(
                            _NO_LIMIT,
                            1,
                            value=_NO_LIMIT,
                            step=0.01,
                            label="Lowest score",
                            info=f"{_NO_LIMIT}: no limit",
                            elem_id="lowest",
                        )
                        count = gradio.Slider(
                            *_COUNTS[:2], value=_COUNTS[2], step=1, label="Clips to show", elem_id="count"
                        )
                        refinement = collection.refinement
                        refined = gradio.Checkbox(
                            label="" if refinement is None else refinement.label,
                            info=None
                            if refinement is None
                            else f"{refinement.explanation}. Off: by cosine similarity.",
                            value=refinement is not None,
                            visible=refinement is not None,
                            elem_id="refined",
                        )
                with gradio.Column(scale=3, min_width=320):
                    found = gradio.HTML(answer_html(collection, Answer(), []), elem_id="answer")
            with gradio.Tab("Map", elem_id="map-tab"):
                rows = choose_rows(len(collection))
                gradio.HTML(map_html(collection, rows, place_points(collection.embeddings[rows])))
        answer = gradio.State(Answer())
        filters = [words, lowest, count]
        # One after another, in the order in which they were asked for: else what is given during a slow
        # search, such as another query or a filter, would be lost under the answer of that search.
        in_order = {"concurrency_id": "search", "trigger_mode": "always_last", "api_visibility": "private"}
        outputs = [answer, found]
        gradio.on([text.submit, button.click], ask, [text, refined, *filters], outputs, **in_order)
        gradio.on(
            [sound.upload, sound.stop_recording], ask_sound, [sound, refined, *filters], outputs, **in_order
        )
        # What is typed into the field of a slider is sent before it is whole, as nothing or beyond the ends.
        for slider, (least, most, usual) in ((lowest, (_NO_LIMIT, 1, _NO_LIMIT)), (count, _COUNTS)):
            slider.preprocess = partial(within, least=least, most=most, usual=usual)
        refined.input(ask_again, [answer, refined, *filters], outputs, **in_order)
        quietly = {"show_progress": "hidden", **in_order}
        # What is deleted from a field sends no `input`.
        words.change(filter_by_words, [answer, refined, *filters], outputs, **quietly)
        gradio.on([lowest.input, count.input], show, [answer, *filters], found, **quietly)
    return blocks


def within(value: object, least: float, most: float, usual: float) -> float:
    """The number that a slider stands for.

    Args:
        value: What the browser sent, of any type.
        least: The lowest number of the slider.
        most: The highest number of the slider.
        usual: What stands for a value that is no number, as while the field is empty.

    Examples:
        >>> [within(value, 1, 50, 10) for value in (7, 99, -3, None, "many")]
        [7, 50, 1, 10, 10]
    """
    if isinstance(value, int | float) and value == value:  # no NaN
        return min(max(value, least), most)
    return usual


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    Args:
        host: An address, or the name `localhost`.

    Examples:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """Take a port of this machine.

    Args:
        host: Address to listen at.
        port: The port; 0 for any that is free.

    Raises:
        OSError: The address is not one of this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        yield listening


def serve_collection(collection: Collection, listening: socket.socket, host: str) -> None:
    """Answer requests until the process is interrupted.

    Args:
        collection: The clips.
        listening: The port, from `listen`.
        host: The address that it listens at.

    Raises:
        ImportError: gradio is missing.
    """
    names = [host, "localhost", "127.0.0.1", "[::1]"] if is_loopback(host) else ["*"]
    made = tempfile.TemporaryDirectory(prefix="ask-lightning-page-")
    with _exit_on_sigterm(), made as folder, _uploads_to(folder):
        app = make_app(collection, Path(folder).resolve(), names)
        uvicorn = import_optional("uvicorn")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_SECONDS_TO_FINISH)
        server = uvicorn.Server(config)
        # A browser that still shows the page is cut off after Ctrl-C, which is no error to be told of.
        logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)
        server.run(sockets=[listening])


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process as an error does, by way of the ends of contexts; else it leaves files."""
    if threading.current_thread() is not threading.main_thread():  # which alone may ask for signals
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _uploads_to(folder: str) -> Iterator[None]:
    """Have Gradio keep uploads in a folder and report nothing to its makers."""
    given = {"GRADIO_TEMP_DIR": os.path.realpath(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

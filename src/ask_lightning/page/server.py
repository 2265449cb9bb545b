"""The server of the page."""

import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ask_lightning.page.clip_routes import add_clip_routes
from ask_lightning.page.collection import Collection
from ask_lightning.page.guard import Guard
from ask_lightning.page.layout import make_blocks, make_theme
from ask_lightning.utilities.optional_imports import import_optional

LARGEST_UPLOAD = 64 * 1024**2
"""Size in bytes above which a sound is not taken."""

_HERE = Path(__file__).parent
_SECONDS_TO_FINISH = 2  # of answers after Ctrl-C


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
    add_clip_routes(app, collection)
    app = gradio.mount_gradio_app(
        app,
        make_blocks(gradio, collection),
        path="/",
        footer_links=[],
        run_history=False,
        max_file_size=LARGEST_UPLOAD,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        theme=make_theme(gradio),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(_HERE / 'page.js').read_text(encoding='utf-8')}</script>",
    )
    app.add_middleware(Guard, uploads=uploads, key=collection.key)
    # A site that gives its own name the address 127.0.0.1 must not read the page.
    app.add_middleware(
        import_optional("starlette.middleware.trustedhost").TrustedHostMiddleware, allowed_hosts=hosts
    )
    return app


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

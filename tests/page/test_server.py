"""Which requests are answered, and with what."""

import errno
import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import soundfile

pytest.importorskip("gradio", reason='the page needs: pip install "ask-lightning[page]"')
import anyio
from fastapi.testclient import TestClient
from starlette.datastructures import UploadFile
from starlette.responses import FileResponse

from ask_lightning.page.clip_cards import answer_html
from ask_lightning.page.collection import answer_query
from ask_lightning.page.guard import is_served
from ask_lightning.page.server import listen, make_app
from tests.page.clips import make_collection, write_sounds


@pytest.fixture(name="client")
def client_fixture(tmp_path, monkeypatch):
    uploads, folder = tmp_path / "uploads", tmp_path / "audio"
    uploads.mkdir()
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    broken = folder / "broken.wav"
    broken.write_text("no sound")
    (folder / "secret.txt").write_text("secret")
    low, high, _ = write_sounds(folder)
    app = make_app(make_collection([low, high, None, broken]), uploads, ["127.0.0.1"])
    with TestClient(app, base_url="http://127.0.0.1") as client:
        client.folder = folder
        yield client


def test_a_clip_is_its_file(client):
    for row, name, media_type in ((0, "low.wav", "audio/wav"), (1, "high.flac", "audio/flac")):
        response = client.get(f"/clip/{row}")
        assert (response.status_code, response.headers["content-type"]) == (200, media_type)
        assert response.content == (client.folder / name).read_bytes()
    part = client.get("/clip/0", headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, (client.folder / "low.wav").read_bytes()[10:20])
    assert client.get("/clip/0/spectrogram.png").content.startswith(b"\x89PNG")
    assert "a low tone" in client.get("/clip/0/card").text


def test_what_cannot_be_heard_says_why(client):
    assert client.get("/clip/2").text == "There is no sound of this clip."
    drawn = client.get("/clip/3/spectrogram.png")
    assert drawn.status_code == 422
    assert drawn.text.startswith("broken.wav: not an audio file")
    (client.folder / "low.wav").unlink()
    gone = client.get("/clip/0")
    assert (gone.status_code, gone.text) == (404, "low.wav: the file is no longer there.")


def test_a_page_from_before_a_restart_gets_no_sounds_of_other_clips(client):
    for path in ("/clip/0", "/clip/0/spectrogram.png", "/clip/0/card"):
        assert client.get(f"{path}?of=these").status_code == 200
        other = client.get(f"{path}?of=others")
        assert (other.status_code, other.text) == (
            410,
            "the server has been started anew since this page was opened. Load the page again.",
        )


def test_a_file_that_goes_while_it_is_asked_for(client, monkeypatch):
    answer = FileResponse.__call__

    async def gone(response, *given):
        Path(response.path).unlink()
        await answer(response, *given)

    monkeypatch.setattr(FileResponse, "__call__", gone)
    heard = client.get("/clip/0")
    assert (heard.status_code, heard.text) == (404, "low.wav: the file is no longer there.")
    monkeypatch.undo()
    # Between the look at the file and its opening.
    opened = anyio.open_file

    async def gone_too(path, *given, **named):
        Path(path).unlink()
        return await opened(path, *given, **named)

    monkeypatch.setattr(anyio, "open_file", gone_too)
    heard = client.get("/clip/1")
    assert (heard.status_code, heard.text) == (404, "high.flac: the file is no longer there.")


def test_a_picture_is_that_of_the_present_file(client):
    low, high = (client.folder / name for name in ("low.wav", "high.flac"))
    pictures = [client.get(f"/clip/{row}/spectrogram.png").content for row in (0, 1)]
    soundfile.write(low, soundfile.read(high)[0], 16000)
    assert client.get("/clip/0/spectrogram.png").content == pictures[1] != pictures[0]
    low.unlink()
    drawn = client.get("/clip/0/spectrogram.png")
    assert (drawn.status_code, drawn.text) == (404, "low.wav: the file is no longer there.")


@pytest.mark.parametrize("row", ["4", "-1", "99999999999999999999"])
def test_there_are_no_other_clips(client, row):
    for path in (f"/clip/{row}", f"/clip/{row}/spectrogram.png", f"/clip/{row}/card"):
        assert client.get(path).status_code == 404


def test_nothing_else_is_served(client):
    secret = client.folder / "secret.txt"
    for path in (
        "/clip/..%2fsecret.txt",
        "/clip/",
        f"/gradio_api/file={secret}",
        f"/gradio_api/file={client.folder}",
        f"/gradio_api/file={client.folder / 'low.wav'}",
        f"/gradio_api/file={os.environ['GRADIO_TEMP_DIR']}/../audio/secret.txt",
        f"/gradio_api/file={os.environ['GRADIO_TEMP_DIR']}/%2e%2e/audio/secret.txt",
        "/gradio_api/proxy=http://example.org",
        "/gradio_api/file=http://example.org",
        "/docs",
        "/openapi.json",
        f"/file={secret}",
        "/static/..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/assets/..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    ):
        response = client.get(path)
        assert response.status_code in (400, 403, 404, 422), path
        assert "secret" not in response.text
        assert "root:" not in response.text


def test_the_page_loads_nothing_from_elsewhere(client):
    response = client.get("/")
    assert response.status_code == 200
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert "fonts.googleapis" not in client.get("/theme.css").text + response.text


def test_other_names_of_the_machine_are_refused(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400


def test_uploads_have_a_limit(client, monkeypatch):
    small = client.post("/gradio_api/upload", files={"files": ("a.wav", b"0" * 100)})
    assert small.status_code == 200
    huge = client.post("/gradio_api/upload", files={"files": ("a.wav", bytes(65 * 1024**2))})
    assert huge.status_code == 413
    assert "maximum allowed size" in huge.text


def number_of(client, question):
    """The number by which a request names a question."""
    asked = client.get("/config").json()["dependencies"]
    return next(each["id"] for each in asked if each["api_name"] == question)


def ask(client, sound):
    """What the page says of a sound, given as a request names it."""
    number = number_of(client, "ask_sound")
    data = [{"path": str(sound), "meta": {"_type": "gradio.FileData"}}, False, "", -1, 10]
    joined = client.post(
        "/gradio_api/queue/join", json={"data": data, "fn_index": number, "session_hash": "one"}
    )
    if joined.status_code != 200:
        return joined.status_code
    with client.stream("GET", "/gradio_api/queue/data?session_hash=one") as answer:
        return next(line for line in answer.iter_lines() if "process_completed" in line)


def test_an_upload_that_finds_the_disk_full_leaves_room_for_the_next(client, tmp_path, monkeypatch, caplog):
    written = []

    async def write_a_part(file, data):
        written.append(Path(file.file.name))
        written[-1].write_bytes(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(UploadFile, "write", write_a_part)
        assert client.post("/gradio_api/upload", files={"files": ("a.wav", b"0" * 100)}).status_code == 500
    assert written[0].parent == tmp_path / "uploads"
    assert not list((tmp_path / "uploads").iterdir())
    assert "A sound was not taken: [Errno 28] No space left on device. Free space in" in caplog.text
    (uploaded,) = client.post("/gradio_api/upload", files={"files": ("a.wav", b"0" * 100)}).json()
    assert Path(uploaded).read_bytes() == b"0" * 100


def test_a_sound_that_was_not_uploaded_is_no_question(client, tmp_path):
    """Gradio would copy it to the folder of uploads, from which everyone could fetch it."""
    for path in (
        client.folder / "secret.txt",
        "/etc/passwd",
        tmp_path / "uploads" / ".." / "audio" / "secret.txt",
        "uploads/a.wav",
        "https://example.com/a.wav",
    ):
        assert ask(client, path) == 403, path
    assert client.post("/gradio_api/queue/join", content=b"no JSON").status_code == 403
    assert list((tmp_path / "uploads").rglob("*")) == []
    sound = (client.folder / "low.wav").read_bytes()
    (uploaded,) = client.post("/gradio_api/upload", files={"files": ("mine.wav", sound)}).json()
    assert "for the sound mine.wav" in ask(client, uploaded)


def test_a_question_has_a_limit(client):
    answer = client.post("/gradio_api/queue/join", content=bytes(2 * 1024**2))
    assert (answer.status_code, answer.text) == (413, "The question is too long")


@pytest.mark.parametrize(
    ("lowest", "count", "shown"),
    [(None, None, 4), ("", [], 4), (99, 10, 1), (-7, 10, 4), (-1, 99, 4), (-1, 0, 1), (-1, 2.7, 2)],
)
def test_what_a_field_of_a_slider_holds_while_it_is_typed_is_no_error(client, lowest, count, shown, capsys):
    """An empty field sends nothing, and a number beyond the ends is sent before the browser corrects it."""
    data = ["high tone", False, "", lowest, count]
    joined = client.post(
        "/gradio_api/queue/join",
        json={"data": data, "fn_index": number_of(client, "ask"), "session_hash": "one"},
    )
    assert joined.status_code == 200
    with client.stream("GET", "/gradio_api/queue/data?session_hash=one") as answer:
        answered = [line for line in answer.iter_lines() if "process_completed" in line]
    assert f"{shown} of 4 clips" in answered[0]
    assert "Traceback" not in capsys.readouterr().err


def test_a_page_of_no_clips_is_refused(tmp_path):
    empty = replace(make_collection([None] * 4), names=[], captions=[], files=[])
    with pytest.raises(ValueError, match="`collection` has to hold at least one clip"):
        make_app(empty, tmp_path, ["127.0.0.1"])


def test_paths_that_climb_are_not_uploads(tmp_path):
    assert is_served(f"/gradio_api/file={tmp_path}/1/a.wav", tmp_path)
    assert not is_served(f"/gradio_api/file={tmp_path}", tmp_path)
    assert not is_served(f"/gradio_api/file={tmp_path}/1/../../a.wav", tmp_path)


def test_a_taken_port_is_an_error():
    with (
        listen("127.0.0.1", 0) as first,
        pytest.raises(OSError, match="in use"),
        listen("127.0.0.1", first.getsockname()[1]),
    ):
        pass


def test_m4a_is_played_where_pyav_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("av", reason='m4a needs: pip install "ask-lightning[media]"')
    from tests.helpers.media_files import write_media

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    tone = write_media(tmp_path / "tone.m4a", 0.5 * np.sin(np.arange(16000) / 5), 16000, "aac")
    collection = make_collection([None, None, None, tone])
    with TestClient(make_app(collection, tmp_path, ["127.0.0.1"]), base_url="http://127.0.0.1") as client:
        heard = client.get("/clip/3")
        assert (heard.status_code, heard.headers["content-type"]) == (200, "audio/wav")
        samples, rate = soundfile.read(io.BytesIO(heard.content))
        assert (rate, len(samples)) == (16000, pytest.approx(16000, abs=2048))
        assert abs(samples).max() == pytest.approx(0.5, abs=0.1)
        assert client.get("/clip/3/spectrogram.png").content.startswith(b"\x89PNG")
        assert answer_query(collection, tone).matches
    # Without it the page goes on, and says what to install.
    monkeypatch.setitem(sys.modules, "av", None)
    with TestClient(make_app(collection, tmp_path, ["127.0.0.1"]), base_url="http://127.0.0.1") as client:
        for path in ("/clip/3", "/clip/3/spectrogram.png"):
            refused = client.get(path)
            assert refused.status_code == 422
            assert 'pip install "ask-lightning[media]"' in refused.text
        assert 'pip install "ask-lightning[media]"' in answer_query(collection, tone).problem


SERVED = """
import contextlib, signal
from ask_lightning.page import listen, serve_collection
from tests.page.clips import make_collection

signal.signal(signal.SIGINT, signal.default_int_handler)
with listen("127.0.0.1", 0) as listening:
    print(listening.getsockname()[1], flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        serve_collection(make_collection([None] * 4), listening, "127.0.0.1")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_end_is_quiet_although_a_browser_shows_the_page(sent, status, tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    root = Path(__file__).parents[2]  # of `tests`
    variables = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", SERVED], cwd=root, env=variables, **pipes) as process:
        try:
            address = f"http://127.0.0.1:{int(process.stdout.readline())}"
            # By this a page hears that its server lives.
            with urlopen(f"{address}/gradio_api/heartbeat/abc", timeout=60) as heartbeat:
                heartbeat.read(1)
                assert list(tmp_path.glob("ask-lightning-page-*"))
                process.send_signal(sent)
                _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "Traceback" not in said, said
    assert "ERROR" not in said, said
    assert process.returncode == status
    assert not list(tmp_path.glob("ask-lightning-page-*"))


def test_a_name_that_is_no_unicode(tmp_path, monkeypatch):
    """Of a file from a system with another encoding: neither it nor the page beside it may fail."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (low, *_) = write_sounds(tmp_path)
    odd = low.rename(low.with_name(os.fsdecode(b"caf\xe9.wav")))
    collection = make_collection([odd, odd.with_name(os.fsdecode(b"\xff.wav")), None, None])
    collection = replace(collection, names=[odd.name, "high", "noise", "hostile"], title=odd.name)
    with TestClient(make_app(collection, tmp_path, ["127.0.0.1"]), base_url="http://127.0.0.1") as client:
        assert "caf\ufffd.wav" in client.get("/").text
        assert "caf\ufffd.wav" in client.get("/clip/0/card").text
        assert client.get("/clip/0").status_code == 200
        assert client.get("/clip/1").text == "\ufffd.wav: the file is no longer there."
        assert client.get("/clip/1/spectrogram.png").status_code == 404
    answer = answer_query(collection, "a")
    assert "caf\ufffd.wav" in answer_html(collection, answer, answer.matches)

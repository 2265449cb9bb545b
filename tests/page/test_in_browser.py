"""The page in a real browser: typed, heard, given sounds, and used by keyboard alone."""

import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from urllib.request import urlopen

import numpy as np
import pytest

pytest.importorskip("gradio", reason='the page needs: pip install "ask-lightning[page]"')
pytest.importorskip("selenium", reason="a browser is driven by selenium")
import uvicorn
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from ask_lightning.page.server import listen, make_app
from tests.helpers.media_files import write_media
from tests.page.clips import CALIBRATION, HOSTILE, TOKENS, make_collection, write_sounds

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its chromedriver is installed"),
]


class AccessibleParts:
    """The parts of a page that are there for screen readers, in their order."""

    def __init__(self, nodes) -> None:
        self._by_id = {node["nodeId"]: node for node in nodes}
        self._nodes = [node for node in nodes if not node.get("ignored")]

    def of_role(self, role):
        return [node for node in self._nodes if self.role(node) == role]

    def inside(self, node):
        """The parts below a part."""
        for child in map(self._by_id.get, node.get("childIds", ())):
            if child is not None:
                yield child
                yield from self.inside(child)

    def text(self, node):
        return " ".join(self.name(part) for part in self.inside(node) if self.role(part) == "StaticText")

    @staticmethod
    def role(node):
        return node.get("role", {}).get("value")

    @staticmethod
    def name(node):
        return node.get("name", {}).get("value", "").strip()

    @staticmethod
    def properties(node):
        return {each["name"]: each["value"].get("value") for each in node.get("properties", ())}

    def focusable(self):
        """Role and name of what the keyboard reaches, but for the parts of the browser's own players."""
        players = [id(part) for player in self.of_role("Audio") for part in self.inside(player)]
        return [
            (self.role(node), self.name(node))
            for node in self._nodes
            if self.properties(node).get("focusable")
            and id(node) not in players
            and self.role(node) != "RootWebArea"
        ]


class Page:
    """A browser that shows the page."""

    def __init__(self, driver, address, folder) -> None:
        self.driver, self.folder = driver, folder
        driver.get(address)

    def one(self, selector):
        return self.wait(lambda: self.driver.find_elements(By.CSS_SELECTOR, selector))[0]

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition):
        return WebDriverWait(self.driver, 60).until(lambda _: condition())

    def wait_for_text(self, selector, text):
        def has_text():
            return any(text in (each.text or "") for each in self.all(selector))

        self.wait(has_text)

    def accessible(self):
        """The accessibility tree: what a screen reader is told of the page."""
        return AccessibleParts(self.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"])

    def press(self, *keys):
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def go_to(self, text, *, backwards=False):
        """Press Tab, or Shift and Tab, until a part with this text has the focus."""
        for _ in range(60):
            step = webdriver.ActionChains(self.driver)
            if backwards:
                step.key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
            else:
                step.send_keys(Keys.TAB).perform()
            # What the page says, whether or not it is drawn by now.
            if self.focused.get_attribute("textContent").strip() == text:
                return
        raise AssertionError(f"Nothing that is reached by the keyboard reads {text!r}.")

    @property
    def focused(self):
        return self.driver.switch_to.active_element

    def upload(self, path):
        self.one("#sound input[type=file]").send_keys(str(path))


@contextmanager
def served(app, port=0):
    """The port at which a server answers with an application."""
    with listen("127.0.0.1", port) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=20)


@contextmanager
def browser():
    """A browser without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.add_argument("--autoplay-policy=no-user-gesture-required")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@contextmanager
def opened(tmp_path, monkeypatch, refinement=None, wait=lambda text: None):
    """A browser that has opened the page of four clips, whose search first waits."""
    uploads, collection = write_collection(tmp_path, monkeypatch, refinement)

    def by_text(text, *given):
        wait(text)
        return collection.by_text(text, *given)

    app = make_app(replace(collection, by_text=by_text), uploads, ["127.0.0.1", "localhost"])
    with served(app) as port, browser() as driver:
        yield Page(driver, f"http://127.0.0.1:{port}", tmp_path / "audio")


def write_collection(tmp_path, monkeypatch, refinement=None):
    """A folder for uploads, and four clips of which two can be heard."""
    uploads, folder = tmp_path / "uploads", tmp_path / "audio"
    uploads.mkdir()
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    low, high, _ = write_sounds(folder)
    (folder / "broken.wav").write_text("no sound")
    return uploads, make_collection([low, high, None, folder / "broken.wav"], refinement)


@pytest.fixture(name="page")
def page_fixture(tmp_path, monkeypatch):
    with opened(tmp_path, monkeypatch) as page:
        yield page


@pytest.fixture
def page_of_tokens(tmp_path, monkeypatch):
    with opened(tmp_path, monkeypatch, TOKENS) as page:
        yield page


def test_the_page_in_a_browser(page):
    # Keyboard alone: the text field is reached by Tab, Enter asks.
    page.one("#text textarea, #text input")
    for _ in range(12):
        if page.driver.switch_to.active_element.get_attribute("placeholder"):
            break
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
    page.driver.switch_to.active_element.send_keys("high tone", Keys.ENTER)
    page.wait_for_text("#answer .status", "4 of 4 clips")
    cards = page.all("#answer .clip h3")
    assert [card.text for card in cards] == ["a high tone", "a low tone", "noise", HOSTILE]
    assert "taken" not in page.driver.title

    # The first hit plays, and is the file.
    audio = page.one("#answer .clip audio")
    with urlopen(audio.get_attribute("src")) as response:
        assert response.status == 200
        assert response.read() == (page.folder / "high.flac").read_bytes()
    page.driver.execute_script("arguments[0].play()", audio)
    page.wait(lambda: page.driver.execute_script("return arguments[0].currentTime", audio) > 0)
    assert page.driver.execute_script("return arguments[0].duration", audio) == pytest.approx(1, abs=0.05)
    page.wait(lambda: page.one("#answer .clip img").get_property("naturalWidth") == 63)
    page.driver.execute_script("document.querySelectorAll('#answer img').forEach(i => i.loading = 'eager')")
    page.wait_for_text("#answer .problem", "broken.wav: not an audio file")

    # A sound, then one that is none, then one that is too large.
    page.upload(page.folder / "low.wav")
    page.wait_for_text("#answer .status", "for the sound low.wav")
    page.one("#words textarea, #words input").send_keys("humming")
    page.wait_for_text("#answer .status", "1 of 4 clips")

    # The map by keyboard.
    (tab,) = [tab for tab in page.all("button[role=tab]") if tab.text == "Map"]
    tab.send_keys(Keys.ENTER)
    point = page.one('.map .point[tabindex="0"]')
    page.driver.execute_script("arguments[0].focus()", point)
    webdriver.ActionChains(page.driver).send_keys(Keys.ARROW_RIGHT).perform()
    reached = page.driver.switch_to.active_element
    if reached == point:  # nothing lies to the right of it
        webdriver.ActionChains(page.driver).send_keys(Keys.ARROW_LEFT).perform()
        reached = page.driver.switch_to.active_element
    assert reached != point
    webdriver.ActionChains(page.driver).send_keys(Keys.ENTER).perform()
    row = reached.get_attribute("data-row")
    page.wait(lambda: page.all(f'#map-clip .clip[data-row="{row}"]'))
    logged = [line for line in page.driver.get_log("browser") if "Content Security" in line["message"]]
    assert not logged


def test_a_filter_that_is_deleted_filters_no_more(page):
    page.one("#text textarea, #text input").send_keys("high tone", Keys.ENTER)
    page.wait_for_text("#answer .status", "4 of 4 clips")
    words = page.one("#words textarea, #words input")
    words.send_keys("hum")
    page.wait_for_text("#answer .status", "1 of 4 clips")
    words.send_keys("x")
    page.wait_for_text("#answer .status", "No clip")
    words.send_keys(Keys.BACKSPACE)
    page.wait_for_text("#answer .status", "1 of 4 clips")
    words.send_keys(Keys.CONTROL, "a")
    words.send_keys(Keys.DELETE)
    page.wait_for_text("#answer .status", "4 of 4 clips")


def test_what_is_given_during_a_search_is_not_lost(tmp_path, monkeypatch):
    begun, goes_on = threading.Event(), threading.Event()

    def wait(text):
        if text == "low tone":
            begun.set()
            assert goes_on.wait(60)

    with opened(tmp_path, monkeypatch, CALIBRATION, wait) as page:
        try:
            field = page.one("#text textarea, #text input")
            field.send_keys("low tone", Keys.ENTER)
            assert begun.wait(60)
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys("high tone", Keys.ENTER)
            page.one("#words textarea, #words input").send_keys("tone")
            page.one("#refined input").click()
            # The first search, the filter and the switch have been asked for; the other query waits.
            asked = "return performance.getEntriesByType('resource').filter(e => /join/.test(e.name)).length"
            page.wait(lambda: page.driver.execute_script(asked) >= 3)
        finally:
            goes_on.set()
        page.wait_for_text("#answer .status", "2 of 4 clips for “high tone”, best first by cosine")


def test_a_page_that_stays_open_over_a_restart_with_other_clips(tmp_path, monkeypatch):
    uploads, collection = write_collection(tmp_path, monkeypatch)
    other = replace(collection, title="other clips", key="others")
    apps = [make_app(clips, uploads, ["127.0.0.1"]) for clips in (collection, other)]
    with browser() as driver:
        with served(apps[0]) as port:
            page = Page(driver, f"http://127.0.0.1:{port}", tmp_path / "audio")
            page.one("#text textarea, #text input").send_keys("high tone", Keys.ENTER)
            page.wait_for_text("#answer .status", "4 of 4 clips")
        with served(apps[1], port):
            # Its numbers are those of the earlier clips, and so are its title and its map.
            page.driver.execute_script("document.querySelector('#answer audio').play().catch(() => 0)")
            page.wait_for_text("#answer .problem", "No sound: the server has been started anew")
            page.one("#ask").click()
            page.wait_for_text("header.page p", "other clips")


@pytest.mark.parametrize(
    ("name", "codec", "picture"),
    [("tone.m4a", "aac", False), ("tone.webm", "libopus", False), ("film.mp4", "aac", True)],
)
def test_a_sound_track_is_taken_as_a_query(page, name, codec, picture):
    pytest.importorskip("av", reason='m4a needs: pip install "ask-lightning[media]"')
    write_media(page.folder / name, 0.5 * np.sin(np.arange(48000) / 5), 48000, codec, picture=picture)
    page.wait(lambda: "video/*" in page.one("#sound input[type=file]").get_attribute("accept"))
    page.upload(page.folder / name)
    page.wait_for_text("#answer .status", f"for the sound {name}")


def test_a_film_that_is_dropped_is_taken_as_a_query(page):
    page.one("#sound input[type=file]")
    page.driver.execute_script(
        """
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File(["no film"], "film.mp4", { type: "video/mp4" }));
        const drop = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer });
        document.querySelector("#sound button").dispatchEvent(drop);
        """
    )
    page.wait_for_text("#answer .problem", "film.mp4: ")


@pytest.mark.parametrize(
    ("size", "said"), [(100, "not an audio file"), (65 * 1024**2, "maximum allowed size")]
)
def test_uploads_that_cannot_be_used(page, size, said):
    path = page.folder / "given.wav"
    path.write_bytes(b"x" * size)
    page.one("#sound")
    page.upload(path)
    page.wait(lambda: said in page.one("body").text)


def test_what_a_screen_reader_is_told(page):
    page.one("#text textarea, #text input")
    page.wait(lambda: "Reset: Clips to show" in [name for _, name in page.accessible().focusable()])
    parts = page.accessible()
    assert page.driver.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"
    focusable = parts.focusable()
    assert all(name for _, name in focusable), focusable
    assert len(set(focusable)) == len(focusable), focusable
    assert focusable[0] == ("link", "Skip to the results")
    (shown, other) = parts.of_role("tab")
    assert (parts.name(shown), parts.name(other)) == ("Search", "Map")
    assert [bool(parts.properties(tab).get("selected")) for tab in (shown, other)] == [True, False]
    assert [parts.name(panel) for panel in parts.of_role("tabpanel")] == ["Search"]
    (filters,) = [node for node in parts.of_role("button") if parts.name(node) == "Filters"]
    assert parts.properties(filters)["expanded"] is True
    assert "Or give a sound" in [parts.name(node) for node in parts.of_role("group")]

    def said():
        """The text of the region whose changes are read aloud, and which element it is."""
        region = page.one("#said")
        return region.get_attribute("textContent"), region.id

    before, region = said()
    assert before == ""
    page.one("#text textarea, #text input").send_keys("high tone", Keys.ENTER)
    page.wait_for_text("#answer .status", "4 of 4 clips")
    page.wait(lambda: "4 of 4 clips for “high tone”" in said()[0])
    assert said()[1] == region  # a region that is new would not be read
    parts = page.accessible()
    live = [node for node in parts.of_role("status") if "4 of 4 clips" in parts.text(node)]
    assert [parts.properties(node)["live"] for node in live] == ["polite"]

    levels = [parts.properties(node)["level"] for node in parts.of_role("heading")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    (clips,) = [node for node in parts.of_role("list") if "best first" in parts.name(node)]
    found = [parts.name(node) for node in parts.inside(clips) if parts.role(node) == "article"]
    assert found == ["a high tone", "a low tone", "noise", HOSTILE]
    assert len([node for node in parts.inside(clips) if parts.role(node) == "listitem"]) == 4
    named = [name for role, name in parts.focusable() if role == "Audio"]
    assert named[:2] == ["Sound of high.flac: a high tone", "Sound of low.wav: a low tone"]
    pictures = [parts.name(node) for node in parts.inside(clips) if parts.role(node) == "image"]
    assert pictures[:2] == ["Spectrogram of high.flac: a high tone", "Spectrogram of low.wav: a low tone"]

    page.one("#filters button.label-wrap").send_keys(Keys.ENTER)

    def is_closed():
        parts = page.accessible()
        (filters,) = [node for node in parts.of_role("button") if parts.name(node) == "Filters"]
        return parts.properties(filters)["expanded"] is False

    page.wait(is_closed)


def test_by_keyboard_from_the_first_link_to_a_sound_and_the_map(page):
    field = page.one("#text textarea, #text input")
    field.send_keys("high tone", Keys.ENTER)
    page.wait_for_text("#answer .status", "4 of 4 clips")
    page.driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.go_to("Skip to the results")
    page.wait(lambda: page.focused.location["x"] >= 0)
    page.press(Keys.ENTER)
    page.wait(lambda: page.focused.get_attribute("id") == "results")
    page.press(Keys.TAB)
    sound = page.focused
    assert sound.get_attribute("aria-label") == "Sound of high.flac: a high tone"
    page.press(Keys.SPACE)
    page.wait(lambda: page.driver.execute_script("return arguments[0].currentTime > 0", sound))

    # Backwards to the tabs, and on the map by the same link.
    page.go_to("Map", backwards=True)
    page.press(Keys.ENTER)
    page.one(".map .point")
    page.go_to("Skip to the results", backwards=True)
    page.press(Keys.ENTER)
    page.wait(lambda: page.focused.get_attribute("class").split()[:1] == ["point"])
    label = page.focused.get_attribute("aria-label")
    page.press(Keys.ENTER)
    page.wait(lambda: page.one("#said").get_attribute("textContent") == f"Opened: {label}")
    parts = page.accessible()
    (opened,) = [node for node in parts.of_role("region") if parts.name(node) == "Opened clip"]
    assert [parts.name(node) for node in parts.inside(opened) if parts.role(node) == "article"]
    assert all(name for _, name in parts.focusable()), parts.focusable()


def test_a_narrow_screen(page):
    """A telephone shows the cards in nearly its whole width, and nothing beyond it."""
    size = {"width": 375, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.one("#text textarea, #text input").send_keys("high tone", Keys.ENTER)
    page.wait_for_text("#answer .status", "4 of 4 clips")
    assert page.one("#answer .clip").size["width"] > 320
    assert page.driver.execute_script("return document.documentElement.scrollWidth") == 375


def test_a_switch_that_searches_within_the_words(page_of_tokens):
    page = page_of_tokens
    page.one("#text textarea, #text input").send_keys("high tone", Keys.ENTER)
    page.wait_for_text("#answer .status", "4 clips for “high tone”, best first by score of Late")
    page.one("#words textarea, #words input").send_keys("humming")
    page.wait_for_text("#answer .status", "1 clip for “high tone”, best first by score of Late")
    page.one("#refined input").click()
    page.wait_for_text("#answer .status", "1 of 4 clips for “high tone”, best first by cosine")

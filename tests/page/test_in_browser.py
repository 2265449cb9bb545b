"""The page in a real browser: typed, heard, given sounds, and used by keyboard alone."""

import shutil
import threading
from urllib.request import urlopen

import pytest

pytest.importorskip("gradio", reason='the page needs: pip install "ask-lightning[page]"')
pytest.importorskip("selenium", reason="a browser is driven by selenium")
import uvicorn
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from ask_lightning.page.server import listen, make_app
from tests.page.clips import HOSTILE, make_collection, write_sounds

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its chromedriver is installed"),
]


class Page:
    """A browser that shows the page."""

    def __init__(self, driver, address, folder) -> None:
        self.driver, self.address, self.folder = driver, address, folder

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

    def upload(self, path):
        self.one("#sound input[type=file]").send_keys(str(path))


@pytest.fixture(name="page")
def page_fixture(tmp_path, monkeypatch):
    uploads, folder = tmp_path / "uploads", tmp_path / "audio"
    uploads.mkdir()
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    low, high, _ = write_sounds(folder)
    (folder / "broken.wav").write_text("no sound")
    app = make_app(
        make_collection([low, high, None, folder / "broken.wav"]), uploads, ["127.0.0.1", "localhost"]
    )
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.add_argument("--autoplay-policy=no-user-gesture-required")
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            driver.get(address)
            yield Page(driver, address, folder)
        finally:
            driver.quit()
            server.should_exit = True
            thread.join(timeout=20)


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


@pytest.mark.parametrize(
    ("size", "said"), [(100, "not an audio file"), (65 * 1024**2, "maximum allowed size")]
)
def test_uploads_that_cannot_be_used(page, size, said):
    path = page.folder / "given.wav"
    path.write_bytes(b"x" * size)
    page.one("#sound")
    page.upload(path)
    page.wait(lambda: said in page.one("body").text)

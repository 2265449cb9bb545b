"""Spectrograms, cards and the map, without a browser."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest
import soundfile
import torch

from ask_lightning.data import AudioFileError
from ask_lightning.page.clip_cards import answer_html, clip_card
from ask_lightning.page.clip_map import HEIGHT, WIDTH, choose_rows, map_html, place_points
from ask_lightning.page.collection import Answer, answer_query, filter_matches
from ask_lightning.page.pictures import draw_spectrogram, spectrogram_pixels
from tests.page.clips import CALIBRATION, make_collection, write_sounds


class Tags(HTMLParser):
    """All elements of HTML, with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.found if name == tag]


def test_a_spectrogram_has_high_tones_above_low_ones(tmp_path):
    low, high, _ = write_sounds(tmp_path)
    places = []
    for path in (low, high):
        pixels = matplotlib.image.imread(io.BytesIO(draw_spectrogram(path)))  # (H, W, 4)
        assert pixels.shape[0] == 128
        places.append(int(pixels[..., :3].sum(axis=(1, 2)).argmax()))
    assert places[1] + 20 < places[0]


def test_silence_is_dark_and_level_does_not_matter():
    assert spectrogram_pixels(torch.zeros(16000)).max() == 0
    noise = torch.rand(16000, generator=torch.Generator().manual_seed(0)) - 0.5
    loud, soft = spectrogram_pixels(noise), spectrogram_pixels(0.5 * noise)
    torch.testing.assert_close(loud, soft, atol=1e-3, rtol=0)
    assert (float(loud.min()), float(loud.max())) >= (0, 1)


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / "a.wav").write_text("no sound")
    with pytest.raises(AudioFileError, match=r"^a.wav: not an audio file"):
        draw_spectrogram(tmp_path / "a.wav")


def test_a_card_has_a_player_with_a_name_and_a_picture_with_a_text():
    collection = make_collection([Path("x/low.wav"), None, None, None])
    tags = Tags(clip_card(collection, 0))
    (audio,), (image,) = tags.all("audio"), tags.all("img")
    assert (audio["src"], audio["aria-label"]) == ("/clip/0?of=these", "Sound of low.wav: a low tone")
    assert image["src"] == "/clip/0/spectrogram.png?of=these"
    assert image["alt"] == "Spectrogram of low.wav: a low tone"
    assert "humming" in clip_card(collection, 0)
    silent = clip_card(collection, 1)
    assert not Tags(silent).all("audio")
    assert "no file of this clip" in silent


def test_answers_say_what_they_show_and_escape_what_they_hold():
    collection = make_collection([None, None, None, Path('"><b>.wav')], refinement=CALIBRATION)
    answer = answer_query(collection, "<i>tone</i>", refined=True)
    html = answer_html(collection, answer, filter_matches(collection, answer.matches, count=4))
    tags = Tags(html)
    assert "4 of 4 clips for “&lt;i&gt;tone&lt;/i&gt;”, best first by calibrated score." in html
    assert len(tags.all("article")) == 4
    assert not tags.all("i")
    assert not tags.all("b")
    assert [image["src"] for image in tags.all("img")] == ["/clip/3/spectrogram.png?of=these"]
    assert "score -0.500" in html
    assert "cosine 0.000" in html
    assert "No clip for" in answer_html(collection, answer, [])
    assert 'role="alert">broken &amp; gone<' in answer_html(collection, Answer(problem="broken & gone"), [])
    assert "Describe a sound" in answer_html(collection, Answer(), [])


def test_the_bar_is_full_at_the_best_and_empty_at_the_worst():
    collection = make_collection([None] * 4)
    answer = answer_query(collection, "high tone")
    widths = re.findall(r"width: (\d+)%", answer_html(collection, answer, answer.matches))
    assert widths == ["100", "50", "0", "0"]


def test_the_map_keeps_shapes_and_stays_in_its_frame():
    random = torch.Generator().manual_seed(0)
    plane = torch.randn(50, 2, generator=random) * torch.tensor([3.0, 1.0])
    turned, _ = torch.linalg.qr(torch.randn(16, 16, generator=random))
    places = place_points(plane @ turned[:2])
    assert places.amin() >= 0
    assert (places.amax(dim=0) <= torch.tensor([WIDTH, HEIGHT])).all()
    # Up to mirroring, the wide direction of the cloud is that of the map.
    centred = plane - plane.mean(dim=0)
    _, _, axes = torch.linalg.svd(centred.double(), full_matrices=False)
    expected = centred.double() @ axes[0]
    correlation = torch.corrcoef(torch.stack([expected, places[:, 0].double()]))[0, 1]
    assert abs(correlation) == pytest.approx(1, abs=1e-4)
    same = place_points(torch.ones(3, 8))
    torch.testing.assert_close(same, torch.tensor([[WIDTH / 2, HEIGHT / 2]]).expand(3, 2))
    assert place_points(torch.ones(1, 1)).shape == (1, 2)


def test_points_of_the_map_are_named_and_one_is_reached_by_tab():
    collection = make_collection([Path("low.wav"), None, None, None])
    html = map_html(collection, [0, 2, 3], place_points(torch.eye(3)))
    points = Tags(html).all("circle")
    assert [point["tabindex"] for point in points] == ["0", "-1", "-1"]
    assert [point["data-row"] for point in points] == ["0", "2", "3"]
    assert points[0]["aria-label"] == "a low tone, low.wav"
    assert "humming" in points[0]["data-texts"]
    assert "3 of 4 clips." in html
    assert not Tags(html).all("img")
    assert choose_rows(10, 4) == [0, 2, 5, 7]
    assert choose_rows(5000)[-1] == 4997


def test_a_sound_of_no_length_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", torch.zeros(0).numpy(), 16000)
    with pytest.raises(AudioFileError, match="no samples"):
        draw_spectrogram(tmp_path / "a.wav")

"""`serve`: what it makes of an encoded file, and command lines that it refuses."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import soundfile

pytest.importorskip("gradio", reason='the page needs: pip install "ask-lightning[page]"')

from ask_lightning.cli import serve
from ask_lightning.cli.encoded_pairs import EncodedPairs, Side
from ask_lightning.cli.search import load_model
from ask_lightning.cli.search_flags import parse_search_flags, parse_serve_flags
from ask_lightning.cli.search_index import choose_index
from ask_lightning.cli.serve import make_collection
from ask_lightning.page import MOST_SHOWN, QueryError
from ask_lightning.page.collection import answer_query, filter_matches
from tests.helpers.command_line import ASK, ask_lightning, last_checkpoint, refusal
from tests.helpers.encoded_files import random_pairs, save_with_model

FILE = Path("a.safetensors")


def test_an_encoded_file_as_a_collection(demo, trained, capsys):
    checkpoint = ("--ckpt_path", last_checkpoint(trained))
    output = ("--output", "a.safetensors", "--calibrate", "true")
    ask_lightning("encode", "--config", ASK, demo, *checkpoint, *output)
    pairs = EncodedPairs.load(Path("a.safetensors"))
    folder = Path(demo.removeprefix("--demo=")) / "AudioCaps"
    collection = make_collection(load_model(pairs), pairs, folder, "a.safetensors")
    assert [path.stem for path in collection.files] == [f"Y{name.partition(':')[2]}" for name in pairs.names]
    assert collection.captions[1] == pairs.captions[5:10]
    for flags, calibrated in (([], True), (["--raw"], False)):
        hits = ask_lightning("search", "a.safetensors", "--text", "rain", *flags)
        found = collection.by_text("rain", calibrated, "")
        assert [pairs.names[match.row] for match in found] == [hit.clip for hit in hits]
        assert [match.score for match in found] == [hit.score for hit in hits]
        hits = ask_lightning("search", "a.safetensors", "--audio", collection.files[2], "--top", 30, *flags)
        found = collection.by_sound(collection.files[2], calibrated, "")
        assert [match.caption for match in found] == [hit.caption for hit in hits]
    with pytest.raises(QueryError, match="has to hold words"):
        collection.by_text("?!", False, "")

    Path("empty").mkdir()
    message = refusal(capsys, "serve", "a.safetensors", "--audio", "empty")
    assert message.startswith("empty has no audio file of the 6 clips, such as ")
    message = refusal(capsys, "serve", "a.safetensors", "--audio", "nowhere")
    assert message == "There is no folder of audio files at nowhere."
    message = refusal(capsys, "serve", "a.safetensors", "--audio", folder, "--host", "203.0.113.1")
    assert message.startswith("Nothing can listen at 203.0.113.1, port 7860 (")


def test_command_lines_that_are_refused(capsys):
    assert "required: --audio" in refusal(capsys, "serve", "a.safetensors")
    message = refusal(capsys, "serve", "a.safetensors", "--audio", ".", "--port", "70000")
    assert message.startswith("Argument `--port` has to be from 0 to 65535, but got 70000.")
    message = refusal(capsys, "serve", "a.safetensors", "--audio", ".")
    assert message.startswith("There is no file 'a.safetensors'.")


@pytest.fixture
def sound(tmp_path, monkeypatch):
    """A sound to ask with, and 300 files that stand for those of `random_pairs`."""
    monkeypatch.chdir(tmp_path)
    folder = Path("sounds/folder")
    folder.mkdir(parents=True)
    for clip in range(300):
        (folder / f"{clip}.wav").touch()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000)
    soundfile.write("query.wav", noise, 16000)
    return Path("query.wav")


def collection_by(index: str):
    """The page of a file that is searched by an index."""
    pairs = EncodedPairs.load(FILE)
    indexes = {side: choose_index(FILE, pairs, side, index) for side in get_args(Side)}
    return make_collection(load_model(pairs), pairs, Path("sounds"), FILE.name, indexes=indexes)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("index", ["exact", "Flat", "IVF4,SQ8;nprobe=4"])
def test_a_page_that_finds_the_best_alone_shows_what_one_does_that_ranks_all(
    sound, index, calibrated, monkeypatch
):
    save_with_model(random_pairs(captions=3, calibrated=calibrated), FILE)
    whole = collection_by("exact")
    monkeypatch.setattr(serve, "RANKED_AS_A_WHOLE", 299)
    best = collection_by(index)
    assert (whole.finds_all, best.finds_all) == (True, False)
    for query in ("rain", sound):
        for refined in (False, True):
            ranked = answer_query(whole, query, refined)
            assert (ranked.finds_all, len(ranked.matches)) == (True, 300)
            found = answer_query(best, query, refined)
            assert not found.finds_all
            assert MOST_SHOWN <= len(found.matches) < 300
            assert found.matches == ranked.matches[: len(found.matches)]
    # What a filter lets pass is looked for among all.
    ranked = filter_matches(whole, answer_query(whole, "rain", True).matches, words="bell", count=50)
    found = answer_query(best, "rain", refined=True, words="bell")
    assert len(found.matches) == 30
    assert list(found.matches) == ranked
    assert [match.row for match in answer_query(best, "rain", words="/123.WAV").matches] == [123]
    # One of the three captions of each clip contains it; the clip is shown with its best one.
    for words in (f", {row}" for row in (0, 299, 300, 601)):
        ranked = filter_matches(whole, answer_query(whole, sound, True).matches, words=words, count=50)
        assert ranked
        assert list(answer_query(best, sound, refined=True, words=words).matches) == ranked


def test_a_page_filters_as_a_search_does_and_by_the_file_that_it_shows(sound, monkeypatch):
    pairs = random_pairs()
    pairs.files = ["folder/Bell 0.WAV", "other/1.wav", "", *pairs.files[3:]]
    save_with_model(pairs, FILE)
    Path("sounds/folder/0.wav").rename("sounds/folder/bell_0.flac")
    for limit in (299, 300):
        monkeypatch.setattr(serve, "RANKED_AS_A_WHOLE", limit)
        page = collection_by("exact")
        for words, rows in (
            ("folder/29", {29, *range(290, 300)}),
            ("Folder/bell 0", {0}),
            ("other/", {1}),
            ("file:2.wav", {2}),
        ):
            found = answer_query(page, "rain", words=words)
            shown = filter_matches(page, found.matches, words=words, count=50)
            assert {match.row for match in shown} == rows
            hits = ask_lightning("search", FILE, "--text", "rain", "--contains", words, "--top", 50)
            assert [match.row for match in shown] == [hit.row for hit in hits]
        for words in ("bell_0.FLAC", "0.flac"):
            found = answer_query(page, "rain", words=words)
            assert [match.row for match in filter_matches(page, found.matches, words=words)] == [0]


def test_the_command_serves_by_an_index_that_search_uses_too(sound, monkeypatch, capsys):
    save_with_model(random_pairs(calibrated=True), FILE)
    served = []
    monkeypatch.setattr(serve, "serve_collection", lambda collection, *_: served.append(collection))
    given = ("serve", FILE, "--audio", "sounds", "--port", 0)
    ask_lightning(*given, "--index", "ivf")
    said = capsys.readouterr().err
    assert "The 300 clips are searched by the index ivf (a.safetensors.audio.ivf.faiss)" in said
    assert "The 600 captions are searched by the index ivf (a.safetensors.text.ivf.faiss)" in said
    assert served[-1].title.endswith("encoded by TinyRetriever, searched by the index ivf")
    ask_lightning("search", FILE, "--text", "rain", "--index", "ivf")
    said = capsys.readouterr().err
    assert "Building" not in said
    ask_lightning(*given)  # an index that is there is used
    assert "searched by the index ivf" in capsys.readouterr().err
    ask_lightning(*given, "--index", "exact")
    assert "All 300 clips are compared" in capsys.readouterr().err
    assert served[-1].finds_all
    message = refusal(capsys, *map(str, given), "--index", "best")
    assert "but got 'best'" in message


def test_both_commands_take_the_same_index_by_default():
    search = parse_search_flags(["a.safetensors", "--text", "rain"])
    assert parse_serve_flags(["a.safetensors", "--audio", "sounds"]).index == search.index == "auto"

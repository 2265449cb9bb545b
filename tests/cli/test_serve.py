"""`serve`: what it makes of an encoded file, and command lines that it refuses."""

from pathlib import Path

import pytest

pytest.importorskip("gradio", reason='the page needs: pip install "ask-lightning[page]"')

from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.cli.search import load_model
from ask_lightning.cli.serve import make_collection
from ask_lightning.page import QueryError
from tests.helpers.command_line import ASK, ask_lightning, last_checkpoint, refusal


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

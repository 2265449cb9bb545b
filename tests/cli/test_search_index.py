"""The index beside an encoded file: built once, of these very embeddings, and what `search` says of it."""

import json
from pathlib import Path

import pytest
import torch

from ask_lightning.cli import run as run_command
from ask_lightning.cli import search_index
from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.cli.errors import UsageError
from ask_lightning.cli.search_index import StoredIndex, choose_index, factory_of
from ask_lightning.knowledge.faiss_search import FaissSearch
from tests.helpers.command_line import ask_lightning, refusal
from tests.helpers.encoded_files import random_pairs, save_with_model

FILE = Path("a.safetensors")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(**options) -> EncodedPairs:
    random_pairs(**options).save(FILE)
    return EncodedPairs.load(FILE)


@pytest.mark.parametrize("name", ["ivf", "hnsw", "IVF4,Flat;nprobe=2", "Flat"])
@pytest.mark.parametrize("side", ["audio", "text"])
def test_an_index_is_built_once_and_kept(name, side, monkeypatch):
    pairs = saved()
    built = choose_index(FILE, pairs, side, name)
    stored = StoredIndex(FILE, side, name)
    assert stored.is_of(pairs)
    assert not StoredIndex(FILE, "text" if side == "audio" else "audio", name).is_of(pairs)
    monkeypatch.setattr(FaissSearch, "__init__", None)  # nothing is built again
    again = choose_index(FILE, EncodedPairs.load(FILE), side, name)
    queries = getattr(pairs, side)[:5]
    for one, two in zip(built.search(queries, 7), again.search(queries, 7), strict=True):
        assert torch.equal(one, two)
    assert stored.path.name in again.said
    assert sorted(path.name for path in Path().iterdir()) == sorted(
        [FILE.name, stored.path.name, stored.path.with_suffix(".json").name]
    )


def test_an_index_of_other_embeddings_is_built_anew(capsys):
    choose_index(FILE, saved(), "audio", "ivf")
    assert "once:" in capsys.readouterr().err
    changed = saved(seed=1)
    assert not StoredIndex(FILE, "audio", "ivf").is_of(changed)
    search = choose_index(FILE, changed, "audio", "ivf").search
    assert "The encoded file has changed since its index was built." in capsys.readouterr().err
    assert search(changed.audio[:1], 1)[1].item() == 0
    # The same embeddings in a file that was written again are the same.
    again = saved(seed=1)
    choose_index(FILE, again, "audio", "ivf")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", ["cut", "other note", "list as note", "no note", "noise", "zeros"])
def test_a_damaged_index_is_built_anew(damage, capsys):
    pairs = saved()
    choose_index(FILE, pairs, "audio", "ivf")
    index = StoredIndex(FILE, "audio", "ivf").path
    note, content = index.with_suffix(".json"), index.read_bytes()
    if damage == "cut":
        index.write_bytes(content[:-100])
    elif damage == "noise":
        index.write_bytes(b"x" * len(content))
    elif damage == "zeros":  # within the lists, which Faiss reads without a word
        index.write_bytes(content[: len(content) // 2] + bytes(512) + content[len(content) // 2 + 512 :])
    elif damage == "list as note":
        note.write_text("[1]")
    elif damage == "no note":
        note.unlink()
    else:
        note.write_text(json.dumps({"format": "another"}))
    capsys.readouterr()
    search = choose_index(FILE, pairs, "audio", "ivf").search
    said = capsys.readouterr().err
    assert "Building the index IVF" in said
    assert (f"{index} is damaged." in said) == (damage in ("cut", "noise", "zeros"))
    assert search(pairs.audio[7:8], 1)[1].item() == 7


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (None, "is missing or damaged, which says of what"),
        ({"format": "ask-lightning index 1"}, "was built by another version of ask-lightning"),
        ({"factory": "IVF8,SQ8"}, "is an index IVF8,SQ8"),
        ({"checksum": 1}, "The encoded file has changed"),
    ],
)
def test_what_is_said_of_an_index_that_is_built_anew_is_true(entries, reason, capsys):
    pairs = saved()
    choose_index(FILE, pairs, "audio", "ivf")
    note = StoredIndex(FILE, "audio", "ivf").path.with_suffix(".json")
    if entries is None:
        note.unlink()
    else:
        note.write_text(json.dumps(json.loads(note.read_text()) | entries))
    capsys.readouterr()
    choose_index(FILE, pairs, "audio", "ivf")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Building" in line]
    assert reason in line
    assert ("The encoded file has changed" in line) == ("changed" in reason)


def test_a_note_of_earlier_embeddings_does_not_outlive_their_index(monkeypatch, capsys):
    choose_index(FILE, saved(), "audio", "ivf")
    changed = saved(seed=1)
    with monkeypatch.context() as killed:
        killed.setattr(StoredIndex, "_note_of", lambda *_: 1 / 0)  # between the index and its note
        killed.setattr(StoredIndex, "load", lambda *_: None)
        with pytest.raises(ZeroDivisionError):
            StoredIndex(FILE, "audio", "ivf").build(changed, "clips")
    capsys.readouterr()
    pairs = saved()  # the earlier model has encoded the clips again
    search = choose_index(FILE, pairs, "audio", "ivf").search
    assert "Building the index IVF" in capsys.readouterr().err
    assert [search(pairs.audio[row : row + 1], 1)[1].item() for row in range(20)] == list(range(20))


def test_a_folder_that_cannot_be_written_to(monkeypatch, capsys):
    pairs = saved()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FaissSearch, "save", refuse)
    chosen = choose_index(FILE, pairs, "audio", "ivf")
    assert chosen.search(pairs.audio[7:8], 1)[1].item() == 7
    assert (
        "cannot be kept as a.safetensors.audio.ivf.faiss (No space left on device)" in capsys.readouterr().err
    )
    assert "(memory)" in chosen.said
    assert [path.name for path in Path().iterdir()] == [FILE.name]


def test_what_auto_picks(monkeypatch):
    pairs = saved()
    chosen = choose_index(FILE, pairs, "audio", "auto")
    assert (chosen.name, chosen.search) == ("exact", None)
    assert chosen.said == "All 300 clips are compared with a query."
    monkeypatch.setattr(search_index, "COMPARED_BY_AUTO", 299)
    assert choose_index(FILE, pairs, "audio", "auto").name == "ivf"
    assert choose_index(FILE, pairs, "audio", "exact").name == "exact"
    monkeypatch.setattr(search_index, "COMPARED_BY_AUTO", 1000)
    # An index that is there is used, of the same side only.
    chosen = choose_index(FILE, pairs, "audio", "auto")
    assert chosen.name == "ivf"
    assert "`--index exact` compares all." in chosen.said
    assert choose_index(FILE, pairs, "text", "auto").name == "exact"
    # The one that misses less, if it has been built.
    choose_index(FILE, pairs, "audio", "hnsw")
    assert choose_index(FILE, pairs, "audio", "auto").name == "hnsw"
    assert choose_index(FILE, saved(seed=1), "audio", "auto").name == "exact"


def test_indexes_that_cannot_be(capsys):
    pairs = saved()
    for name, part in (("nonsense", "but got 'nonsense'"), ("IVF1000,Flat", "has to suit 300 rows")):
        with pytest.raises(UsageError, match=part) as refused:
            choose_index(FILE, pairs, "audio", name)
        assert "has to be auto, exact, ivf, hnsw or a Faiss factory string" in str(refused.value)
    assert [path.name for path in Path().iterdir()] == [FILE.name]


@pytest.mark.parametrize("rows", [1, 2, 20, 5000])
def test_named_indexes_suit_any_number_of_rows(rows):
    for name in ("ivf", "hnsw"):
        vectors = random_pairs(rows, 1).audio
        found = FaissSearch(vectors, factory_of(name, rows))(vectors[-1:], 1)
        assert found[1].item() == rows - 1


def test_the_command_finds_by_each_index_what_comparing_all_finds(capsys):
    save_with_model(random_pairs(calibrated=True), FILE)
    capsys.readouterr()
    for flags in ([], ["--raw"], ["--contains", "bell"], ["--lowest", "0.05"], ["--json"]):
        given = ["search", str(FILE), "--text", "rain", *flags]
        hits = ask_lightning(*given, "--index", "exact")
        assert hits
        for index in ("Flat", "IVF4,SQ8;nprobe=4"):
            found = ask_lightning(*given, "--index", index)
            assert found == hits
    bells = ask_lightning("search", FILE, "--text", "rain", "--contains", "bell ", "--top", 50)
    assert len(bells) == 30
    assert all(hit.row % 10 == 0 for hit in bells)
    assert all(hit.caption.startswith("Bell") for hit in bells)
    (one,) = ask_lightning("search", FILE, "--text", "rain", "--contains", "folder/123.WAV")
    assert one.row == 123
    scores = [hit.score for hit in ask_lightning("search", FILE, "--text", "rain", "--top", 300)]
    above = ask_lightning("search", FILE, "--text", "rain", "--top", 300, "--lowest", scores[20])
    assert [hit.score for hit in above] == scores[:21]
    assert ask_lightning("search", FILE, "--text", "rain", "--contains", "nothing has this") == []


def test_the_command_says_what_found_the_hits(capsys):
    save_with_model(random_pairs(), FILE)
    capsys.readouterr()
    run_command(["search", str(FILE), "--text", "rain", "--json"])
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "All 300 clips are compared with a query."
    assert len(json.loads(printed.out)) == 10
    run_command(["search", str(FILE), "--text", "rain", "--json", "--index", "hnsw"])
    printed = capsys.readouterr()
    assert "The 300 clips are searched by the index hnsw (a.safetensors.audio.hnsw.faiss)" in printed.err
    assert len(json.loads(printed.out)) == 10
    message = refusal(capsys, "search", str(FILE), "--text", "rain", "--index", "best")
    assert "but got 'best'" in message

"""Searching by a model's interaction: the best hits by cosine are sorted by their tokens."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.cli.errors import UsageError
from ask_lightning.cli.search import find_hits, load_model
from ask_lightning.data import collate_pairs
from ask_lightning.interaction import Similarities
from ask_lightning.metrics import interaction_ranks
from tests.helpers.command_line import ask_lightning, last_checkpoint, refusal

SOUNDS = [
    "rain",
    "a dog barks",
    "wind in trees",
    "bells",
    "a car passes by",
    "someone speaks",
    "birds",
    "waves",
]


def write_data() -> None:
    random = np.random.default_rng(0)
    rows = ["filename,caption"]
    for number, sound in enumerate(SOUNDS):
        for take in (0, 1):
            # Clips of different lengths and loudness.
            noise = random.uniform(-1, 1, 6000 + 1700 * number) * 0.5 ** (number + take)
            soundfile.write(f"{number}-{take}.wav", noise, 16000)
            rows.append(f"{number}-{take}.wav,{sound} {'again and again' if take else 'once'}")
    Path("clips.csv").write_text("\n".join(rows))


def write_config(interaction: str) -> None:
    Path("mine.yaml").write_text(
        "compose: [run]\n"
        f"model: {{class_path: TinyRetriever, init_args: {{width: 16, interaction: {interaction}}}}}\n"
        "data: {class_path: FolderData, init_args: {root: ., annotations: clips.csv, fractions: "
        "[0.25, 0.5, 0.25], seconds: 2, batch_size: 4}}\n"
        "trainer: {accelerator: cpu, max_epochs: 1}\n"
    )


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A model with prototypes, trained for an epoch, and its validation clips in a file; their folder."""
    folder = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_data()
        write_config("prototypes")
        ask_lightning("fit", "--config", "mine.yaml", "--run", "run")
        given = ("--config", "mine.yaml", "--ckpt_path", last_checkpoint(Path("run").absolute()))
        cli = ask_lightning("encode", *given, "--split", "val", "--output", "a.safetensors")
    return folder, given, cli.datamodule.datasets["val"]


@pytest.fixture
def pairs(encoded, monkeypatch):
    monkeypatch.chdir(encoded[0])
    return EncodedPairs.load(Path("a.safetensors"))


@torch.no_grad()
def test_hits_have_the_ranks_of_the_metric_where_all_are_compared(encoded, pairs):
    model = load_model(pairs)
    batch = collate_pairs(list(encoded[2]))
    audio, text = model.encode_audio(batch), model.encode_text(batch)
    assert pairs.audio_lengths.tolist() == audio.valid.sum(dim=1).tolist()
    assert len(set(pairs.audio_lengths.tolist())) > 2
    torch.testing.assert_close(pairs.audio_tokens, audio.tokens[audio.valid], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pairs.text_tokens, text.tokens[text.valid], atol=1e-5, rtol=1e-4)
    ranks = interaction_ranks(audio, text, torch.arange(8), model.interaction)
    for row, (name, caption) in enumerate(zip(pairs.names, pairs.captions, strict=True)):
        clips = find_hits(model, pairs, caption, 8, rerank=8)
        assert [hit.clip for hit in clips].index(name) + 1 == ranks.text_to_audio[row]
        found = find_hits(model, pairs, Path(name.removeprefix("file:")), 8, rerank=8)
        assert [hit.caption for hit in found].index(caption) + 1 == ranks.audio_to_text[row]
        assert [hit.score for hit in clips] == sorted((hit.score for hit in clips), reverse=True)
        order = (pairs.audio @ pairs.text[row]).argsort(descending=True).tolist()
        by_cosine = [hit.clip for hit in find_hits(model, pairs, caption, 8, rerank=0)]
        assert by_cosine == [pairs.names[place] for place in order]


def test_only_the_best_by_cosine_are_compared(pairs):
    model = load_model(pairs)
    for caption in pairs.captions:
        by_cosine, few, all_hits = (
            find_hits(model, pairs, caption, top, rerank=rerank) for top, rerank in ((8, 0), (1, 3), (8, 8))
        )
        first = {hit.clip for hit in by_cosine[:3]}
        assert few[0].clip == next(hit.clip for hit in all_hits if hit.clip in first)
        # As many as are shown are compared.
        assert find_hits(model, pairs, caption, 8, rerank=2) == all_hits


def test_scores_that_are_no_numbers_are_refused(pairs):
    model = load_model(pairs)
    model.interaction.register_forward_hook(
        lambda _, given, found: Similarities(*(x * torch.nan for x in found[:2]))
    )
    for query in ("rain", Path("0-0.wav")):
        assert len(find_hits(model, pairs, query, 3, rerank=0)) == 3
        with pytest.raises(UsageError, match="NaN or infinity"):
            find_hits(model, pairs, query, 3, rerank=3)


def test_the_command_says_what_hits_are_sorted_by(pairs, encoded, capsys):
    by_tokens = ask_lightning("search", "a.safetensors", "--text", pairs.captions[0], "--top", 2)
    model = load_model(pairs)
    assert by_tokens == find_hits(model, pairs, pairs.captions[0], 2)
    raw = ask_lightning("search", "a.safetensors", "--text", pairs.captions[0], "--raw")
    assert raw == ask_lightning("search", "a.safetensors", "--text", pairs.captions[0], "--rerank", 0)
    assert [hit.score for hit in raw] == [hit.cosine for hit in raw]
    assert "at least 0, but got -1" in refusal(
        capsys, "search", "a.safetensors", "--text", "rain", "--rerank", "-1"
    )


def test_tokens_in_half_precision_and_none(pairs, encoded, capsys):
    _, given, _ = encoded
    ask_lightning("encode", *given, "--split", "val", "--output", "half.safetensors", "--tokens", "float16")
    half = EncodedPairs.load(Path("half.safetensors"))
    assert half.audio_tokens.dtype == torch.float16
    assert torch.equal(half.audio, pairs.audio)
    model = load_model(pairs)
    for whole, rounded in zip(
        *(find_hits(model, stored, "rain", 8) for stored in (pairs, half)), strict=True
    ):
        assert rounded.score == pytest.approx(whole.score, abs=1e-3)
    ask_lightning("encode", *given, "--split", "val", "--output", "none.safetensors", "--tokens", "none")
    none = EncodedPairs.load(Path("none.safetensors"))
    assert not none.has_tokens
    # Takes of one clip are then averaged, which is the same for one take.
    torch.testing.assert_close(none.audio, pairs.audio)
    hits = ask_lightning("search", "none.safetensors", "--text", "rain")
    by_cosine = find_hits(model, pairs, "rain", 10, rerank=0)
    assert [hit.clip for hit in hits] == [hit.clip for hit in by_cosine]
    assert [hit.score for hit in hits] == pytest.approx([hit.cosine for hit in by_cosine], abs=1e-6)
    message = refusal(capsys, "search", "none.safetensors", "--text", "rain", "--rerank", "5")
    assert message == (
        "Argument `--rerank` has no effect, because the file holds no frames and words. Encode the split "
        "with `--tokens float32`."
    )


def test_calibrated_search_is_of_cosines(pairs, encoded, capsys):
    message = refusal(capsys, "encode", *encoded[1], "--calibrate", "true", "--output", "b.safetensors")
    assert message == (
        "Calibrated search is of cosine similarities, but TinyRetriever compares tokens. Leave `--calibrate` "
        "out."
    )
    cli = ask_lightning("test", *encoded[1])
    assert not [name for name in cli.trainer.callback_metrics if "calibrated" in name]


def test_a_model_without_interaction_has_nothing_to_compare(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_data()
    write_config("null")
    ask_lightning("fit", "--config", "mine.yaml", "--run", "run")
    given = ("--config", "mine.yaml", "--ckpt_path", last_checkpoint(Path("run")))
    ask_lightning("encode", *given, "--split", "val", "--output", "a.safetensors")
    assert not EncodedPairs.load(Path("a.safetensors")).has_tokens
    assert len(ask_lightning("search", "a.safetensors", "--text", "rain")) == 8
    message = refusal(capsys, "search", "a.safetensors", "--text", "rain", "--rerank", "5")
    assert message.endswith("has no effect, because TinyRetriever compares pooled embeddings.")


def test_words_that_are_no_numbers_are_refused(pairs, encoded, capsys, monkeypatch):
    model = load_model(pairs)
    encode = type(model).encode_text

    def broken(self, batch):
        embeddings = encode(self, batch)
        embeddings.tokens[0, 0] = torch.nan
        return embeddings

    monkeypatch.setattr(type(model), "encode_text", broken)
    message = refusal(capsys, "encode", *encoded[1], "--split", "val", "--output", "b.safetensors")
    assert message.startswith("The model makes NaN or infinity of 1 of the 4 pairs of a batch, which")
    message = refusal(capsys, "search", "a.safetensors", "--text", "rain")
    assert message.startswith("The model makes NaN or infinity of the query")


def test_the_page_sorts_by_tokens_as_the_command_does(pairs):
    pytest.importorskip("gradio", reason='the page needs: pip install "ask-lightning[page]"')
    from ask_lightning.cli.serve import make_collection
    from ask_lightning.page.collection import answer_query

    model = load_model(pairs)
    collection = make_collection(model, pairs, Path(), "a.safetensors", rerank=3)
    assert collection.refinement.explanation.startswith("The 3 best clips by cosine, sorted by ")
    caption, sound = pairs.captions[0], Path(pairs.names[0].removeprefix("file:"))
    answer = answer_query(collection, caption, refined=True)
    hits = find_hits(model, pairs, caption, 3, rerank=3)
    assert [(match.row, match.score, match.cosine) for match in answer.matches] == [
        (hit.row, hit.score, hit.cosine) for hit in hits
    ]
    answer = answer_query(collection, sound, refined=True)
    assert [match.caption for match in answer.matches] == [
        hit.caption for hit in find_hits(model, pairs, sound, 3, rerank=3)
    ]
    # What a filter lets pass is compared, not what is left of the three.
    answer = answer_query(collection, caption, refined=True, words="again")
    assert len(answer.matches) == min(3, sum("again" in text for text in pairs.captions))
    assert all("again" in match.caption for match in answer.matches)
    # Without the refinement all clips are sorted by cosine.
    answer = answer_query(collection, caption, refined=False)
    assert [match.row for match in answer.matches] == [
        hit.row for hit in find_hits(model, pairs, caption, 8, rerank=0)
    ]
    assert make_collection(model, pairs, Path(), "a.safetensors").refinement is None

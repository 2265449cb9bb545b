"""MTEB evaluates a model of ours on a retrieval task that is made on the spot, in both directions."""

import numpy as np
import pytest
import torch

from ask_lightning.functional import unit_length
from ask_lightning.models import MTEBEncoder, TinyRetriever
from tests.helpers.retrievers import CAPTIONS, noise

mteb = pytest.importorskip("mteb", reason='mteb is not installed: pip install "ask-lightning[mteb]"')

from datasets import Dataset  # noqa: E402
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models.models_protocols import EncoderProtocol  # noqa: E402

RATE = 16000
NUM_CLIPS = 12
COMMON = {
    "description": "Noise and words.",
    "reference": "https://example.org",
    "dataset": {"path": "none/none", "revision": "1"},
    "type": "Any2AnyRetrieval",
    "modalities": ["audio", "text"],
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "main_score": "hit_rate_at_5",
    "date": ("2020-01-01", "2020-01-02"),
    "domains": ["AudioScene"],
    "task_subtypes": [],
    "license": "cc0-1.0",
    "annotations_creators": "derived",
    "dialect": [],
    "sample_creation": "created",
    "bibtex_citation": "",
}


def clips() -> list[np.ndarray]:
    """Of different lengths."""
    return [noise(1, 0.3 + 0.05 * row, RATE, seed=row)[0].numpy() for row in range(NUM_CLIPS)]


def texts() -> list[str]:
    return [f"{CAPTIONS[row % len(CAPTIONS)]} number {row}!" for row in range(NUM_CLIPS)]


class _NoiseTask(AbsTaskRetrieval):
    audio_is_query: bool

    def load_data(self, **options) -> None:
        if self.data_loaded:
            return
        ids = [f"{row:02d}" for row in range(NUM_CLIPS)]
        heard = Dataset.from_dict(
            {"id": ids, "audio": [{"array": clip, "sampling_rate": RATE} for clip in clips()]}
        )
        read = Dataset.from_dict({"id": ids, "text": texts()})
        queries, corpus = (heard, read) if self.audio_is_query else (read, heard)
        self.queries, self.corpus = {"test": queries}, {"test": corpus}
        self.relevant_docs = {"test": {number: {number: 1} for number in ids}}
        self.data_loaded = True


class TextToAudio(_NoiseTask):
    audio_is_query = False
    metadata = TaskMetadata(name="NoiseT2A", category="t2a", **COMMON)


class AudioToText(_NoiseTask):
    audio_is_query = True
    metadata = TaskMetadata(name="NoiseA2T", category="a2t", **COMMON)


def tiny(**options) -> TinyRetriever:
    torch.manual_seed(0)
    return TinyRetriever(width=8, sample_rate=RATE, **options).eval()


@pytest.mark.parametrize("task", [TextToAudio, AudioToText])
def test_mteb_finds_what_our_embeddings_find(task, tmp_path):
    model = tiny()
    encoder = MTEBEncoder(model, "me/tiny", caption_style="plain")
    assert isinstance(encoder, EncoderProtocol)
    result = mteb.evaluate(
        encoder, task(), encode_kwargs={"batch_size": 5}, cache=None, show_progress_bar=False
    )
    (scores,) = result.task_results[0].scores["test"]

    with torch.no_grad():
        audio = torch.cat([model.encode_audio({"waveform": torch.tensor(clip)[None]}) for clip in clips()])
        plain = [text.lower().replace(",", "").rstrip("!") for text in texts()]
        text = model.encode_text({"caption": plain})
    similarity = (audio @ text.T if task.audio_is_query else text @ audio.T).double()
    ranks = 1 + (similarity > similarity.diagonal()[:, None]).sum(dim=1)
    for k in (1, 5, 10):
        assert scores[f"hit_rate_at_{k}"] == pytest.approx(float((ranks <= k).double().mean()), abs=1e-4)


def test_long_clips_are_cut_and_others_resampled():
    model = tiny()
    encoder = MTEBEncoder(model, "me/tiny", max_seconds=0.5)
    long = noise(1, 1.0, RATE)[0].numpy()
    rows = Dataset.from_dict({"audio": [{"array": long, "sampling_rate": RATE}]})
    loader = torch.utils.data.DataLoader(rows, batch_size=1)
    found = encoder.encode(loader, task_metadata=None, hf_split="test", hf_subset="default")
    with torch.no_grad():
        expected = model.encode_audio({"waveform": torch.tensor(long[: RATE // 2])[None]})
    torch.testing.assert_close(found, expected)
    rows = Dataset.from_dict({"audio": [{"array": long, "sampling_rate": 2 * RATE}]})
    loader = torch.utils.data.DataLoader(rows, batch_size=1)
    assert encoder.encode(loader, task_metadata=None, hf_split="test", hf_subset="default").shape == (1, 8)


def test_similarities_are_cosines():
    encoder = MTEBEncoder(tiny(), "me/tiny")
    first, second = torch.randn(3, 8), torch.randn(3, 8)
    expected = unit_length(first) @ unit_length(second).T
    torch.testing.assert_close(encoder.similarity(first.numpy(), second.numpy()), expected)
    torch.testing.assert_close(encoder.similarity_pairwise(first, second), expected.diagonal())


def test_what_mteb_cannot_evaluate_is_refused():
    with pytest.raises(ValueError, match="TinyRetriever compares tokens by an interaction"):
        MTEBEncoder(tiny(interaction="frames"), "me/tiny")
    with pytest.raises(ValueError, match="Argument `name` has to be 'organisation/model', but got 'tiny'"):
        MTEBEncoder(tiny(), "tiny")
    model = tiny()
    del model.hparams["sample_rate"]
    with pytest.raises(ValueError, match="Give it a hyperparameter `sample_rate`"):
        MTEBEncoder(model, "me/tiny")
    rows = Dataset.from_dict({"image": ["x"]})
    encoder = MTEBEncoder(tiny(), "me/tiny")
    with pytest.raises(ValueError, match="has to hold either audio or text, but got none"):
        encoder.encode(
            torch.utils.data.DataLoader(rows), task_metadata=None, hf_split="test", hf_subset="default"
        )

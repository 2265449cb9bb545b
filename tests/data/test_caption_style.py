"""Captions in lower case without punctuation, wherever a model reads them."""

import shutil
import warnings

import numpy as np
import pytest
import soundfile

from ask_lightning.data import (
    AudioFolder,
    Clip,
    ClothoData,
    EnrichedCaptions,
    FolderData,
    KnowledgeSource,
    plain_caption,
)
from ask_lightning.data.caption_style import style_clips
from tests.helpers.published import audiocaps, clotho, wavcaps


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("A man is speaking, then a dog barks.", "a man is speaking then a dog barks"),
        ("wind blows , and stops .", "wind blows and stops"),
        ('"Hello!" - someone said: it\'s half-open; why?', "hello - someone said it's half-open why"),
        ("already plain ", "already plain"),
        ("dog (barking) | cat*", "dog barking cat"),
        ("雨，風。", "雨 風"),
    ],
)
def test_the_rules_of_the_public_code(raw, plain):
    """Those of `_sentence_process` in ML-ACT and of `text_preprocess` in ML-CLAP.

    github.com/XinhaoMei/audio-text_retrieval at 13c21d9, github.com/zyyan4/ml-clap at 154393e.
    """
    assert plain_caption(raw) == plain
    assert plain_caption(plain) == plain


def test_captions_of_punctuation_are_left_out_and_named():
    clips = [Clip("file:a", ("Rain.", "..."), "a.wav"), Clip("file:b", ("!",), "b.wav")]
    with pytest.warns(UserWarning, match=r"captions of 2 clips \(a.wav, b.wav\)"):
        styled = style_clips(clips, "plain")
    assert [(clip.name, clip.captions) for clip in styled] == [("a.wav", ("rain",))]
    assert style_clips(clips, "raw") == clips


@pytest.fixture
def folder(tmp_path):
    rows = ["filename,caption"]
    for index in range(8):
        soundfile.write(tmp_path / f"{index}.wav", np.zeros(16000), 16000)
        rows.append(f'{index}.wav,"Rain, number {index}."')
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    return tmp_path


def test_folders(folder):
    table = folder / "clips.csv"
    assert AudioFolder(folder, table)[3]["caption"] == "Rain, number 3."
    assert AudioFolder(folder, table, caption_style="plain")[3]["caption"] == "rain number 3"
    options = {"fractions": (0.5, 0.5), "seconds": 1, "batch_size": 4}
    data = FolderData(folder, table, caption_style="plain", **options)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.ordered_dataloader("train")):
        assert all(caption.startswith("rain number") for caption in next(iter(loader))["caption"])
    assert data.knowledge_dataset()[0]["caption"].startswith("rain number")
    with pytest.raises(ValueError, match=r"`caption_style` has to be .*, but got 'lower'"):
        AudioFolder(folder, table, caption_style="lower")


@pytest.mark.parametrize("make", [audiocaps, clotho])
@pytest.mark.parametrize("source", ["training", "wavcaps"])
def test_published_splits_and_their_knowledge(make, source, written):
    knowledge = KnowledgeSource(wavcaps=written / "wavcaps" if source == "wavcaps" else None)
    data = make(written, caption_style="plain", knowledge=knowledge)
    raw = make(written, knowledge=knowledge)
    parts = [(data.datasets[split], raw.datasets[split]) for split in ("train", "val", "test")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts.append((data.knowledge_dataset(), raw.knowledge_dataset()))
    for plain, original in parts:
        captions = [caption for clip in plain.clips for caption in clip.captions]
        published = [caption for clip in original.clips for caption in clip.captions]
        assert captions == [plain_caption(caption) for caption in published]
        assert make is audiocaps or captions != published, "synthetic AudioCaps is plain"
        assert plain[0]["caption"] == captions[0]


def test_enriched_captions(written, tmp_path):
    clips = audiocaps(written).datasets["train"].clips
    table = "\n".join(f'{clip.name},"Heard: {clip.name.lower()}!"' for clip in clips)
    (tmp_path / "enriched.csv").write_text(f"youtube_id,caption\n{table}")
    enriched = EnrichedCaptions(str(tmp_path / "enriched.csv"), used_in="knowledge")
    data = audiocaps(written, enriched=enriched, caption_style="plain")
    assert data.knowledge_dataset()[0]["caption"].startswith("heard ")


def test_wavcaps_alone(written, tmp_path):
    shutil.copytree(written / "wavcaps", tmp_path / "wavcaps")
    for path in (tmp_path / "wavcaps").rglob("*.json"):
        path.write_text(path.read_text().replace('"caption": "', '"caption": "Loud, '))
    assert wavcaps(tmp_path)[0]["caption"].startswith("Loud, ")
    assert wavcaps(tmp_path, caption_style="plain")[0]["caption"].startswith("loud ")


def test_files_packed_by_ml_act_agree_with_the_tables(tmp_path):
    """ML-ACT writes rewritten captions into its HDF5 files, with the space that the full stop left."""
    h5py = pytest.importorskip("h5py")
    captions = ["Birds sing , then stop.", "It is quiet; a bird?"]
    packed = ["birds sing then stop ", "it is quiet a bird "]
    (tmp_path / "csv").mkdir()
    soundfile.write(tmp_path / "csv" / "Birds.wav", np.zeros(32000), 32000)
    (tmp_path / "csv" / "val.csv").write_text(
        "file_name,caption_1,caption_2\nBirds.wav," + ",".join(f'"{caption}"' for caption in captions)
    )
    (tmp_path / "hdf5").mkdir()
    with h5py.File(tmp_path / "hdf5" / "val.h5", "w") as file:
        file["audio_name"], file["caption"] = ["Birds.wav"], [packed]
        file["audio_length"], file["waveform"] = [32000], np.zeros((1, 32000), np.float32)
    for style, agree in (("plain", True), ("raw", False)):
        csv, hdf5 = (
            ClothoData(tmp_path / layout, check_counts=False, caption_style=style).datasets["val"].clips
            for layout in ("csv", "hdf5")
        )
        assert ([clip.captions for clip in csv] == [clip.captions for clip in hdf5]) == agree

"""What the knowledge is built from: no random crops, no evaluation clips, enriched captions if asked for."""

import json
import shutil

import lightning as L
import pytest
import torch

from ask_lightning import ASKModule, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.data import (
    EnrichedCaptions,
    KnowledgeSource,
    WavCaps,
    leaked_ids,
    read_audiocaps,
)
from ask_lightning.models import TinyRetriever
from tests.helpers.published import audiocaps, clotho, wavcaps


@pytest.mark.parametrize("enriched", [False, True])
def test_the_knowledge_has_no_missing_clips(roots, enriched):
    files = sorted((roots / "audiocaps" / "audio" / "train").iterdir())
    files[0].unlink()
    files[1].write_bytes(b"no audio")
    options = {}
    if enriched:
        captions = {
            clip.key: ["in other words"] for clip in read_audiocaps(roots / "audiocaps" / "train.csv")
        }
        (roots / "enriched.json").write_text(json.dumps(captions))
        options["enriched"] = EnrichedCaptions(roots / "enriched.json")
    with pytest.warns(UserWarning, match="1 clips have no audio|Left out 1 clips"):
        knowledge = audiocaps(roots, **options).knowledge_dataset()
    assert len(knowledge) == 6
    captions = {knowledge[row]["caption"] for row in range(len(knowledge))}
    assert (captions == {"in other words"}) == enriched


def test_the_knowledge_of_the_training_set_has_no_random_crops(written):
    data = audiocaps(written)
    source = data.knowledge_dataset()
    assert source is data.knowledge_dataset()
    assert [item["clip_id"] for item in source] == [item["clip_id"] for item in data.datasets["train"]]
    before = source[0]["waveform"]
    source.set_epoch(5)
    data.datasets["train"].set_epoch(5)
    assert torch.equal(source[0]["waveform"], before)
    assert not torch.equal(data.datasets["train"][0]["waveform"], before)


def test_wavcaps_as_knowledge_without_evaluation_clips(written, said):
    for data, key in (
        (audiocaps(written, knowledge=KnowledgeSource(written / "wavcaps")), "youtube:"),
        (clotho(written, knowledge=KnowledgeSource(written / "wavcaps")), "freesound:200000"),
    ):
        source = data.knowledge_dataset()
        assert isinstance(source, WavCaps)
        assert len(source) == 15
        left_out = "Left out of the knowledge: 1 of 16 clips that validation or test sets hold"
        assert said[-1].startswith(f"{left_out} ({key}")
        evaluation = {clip.key for split in ("val", "test") for clip in data.datasets[split].clips}
        assert not evaluation & {clip.key for clip in source.clips}


def test_knowledge_that_is_all_evaluation_clips(roots):
    shutil.copy(roots / "audiocaps" / "train.csv", roots / "audiocaps" / "val.csv")
    with pytest.raises(
        ValueError, match=r"All 8 clips of the knowledge are validation or test clips. Pass anot"
    ):
        audiocaps(roots).knowledge_dataset()


def test_evaluation_clips_in_the_knowledge_are_warned_about(written):
    data = audiocaps(written, knowledge=KnowledgeSource(written / "wavcaps", exclude_evaluation=False))
    with pytest.warns(
        UserWarning, match=r"of 16 clips 1 by id \(youtube:.*`KnowledgeSource\(exclude_evaluation=True\)`"
    ):
        assert len(data.knowledge_dataset()) == 16


def test_captions_of_evaluation_clips_in_the_knowledge_are_warned_about(roots):
    table = roots / "audiocaps" / "train.csv"
    first = read_audiocaps(roots / "audiocaps" / "test.csv")[0].captions[0]
    rows = table.read_text().splitlines()
    rows[1] = ",".join([*rows[1].split(",")[:3], f'"{first.upper()}!"'])
    table.write_text("\n".join(rows))
    with pytest.warns(UserWarning, match=r"1 of 8 clips of the knowledge have the words of .*stay in it"):
        assert len(audiocaps(roots).knowledge_dataset()) == 8


def test_evaluation_clips_of_another_dataset_can_be_held_out(written):
    data = audiocaps(written, knowledge=KnowledgeSource(written / "wavcaps"))
    data.hold_out(clotho(written).evaluation_clips())
    kept = {clip.key for clip in data.knowledge_dataset().clips}
    assert len(kept) == 14
    assert not kept & {clip.key for clip in clotho(written).evaluation_clips()}
    with pytest.raises(RuntimeError, match="`hold_out` comes too late: `knowledge_dataset` has been called"):
        data.hold_out([])


def test_ids_to_exclude_can_be_written_down_and_read(written, tmp_path):
    evaluation = [clotho(written).datasets[split] for split in ("val", "test")]
    ids = leaked_ids(wavcaps(written), *evaluation)
    assert ids == ["freesound:200000"]
    (tmp_path / "exclude.txt").write_text("\n".join(ids))
    for exclude in (ids, str(tmp_path / "exclude.txt")):
        source = wavcaps(written, exclude=exclude)
        assert len(source) == 15
        assert leaked_ids(source, *evaluation) == []


def test_lists_for_training_and_for_knowledge_are_two(written):
    keys = [clip.key for clip in audiocaps(written).datasets["train"].clips]
    data = audiocaps(written, exclude=keys[:2], knowledge=KnowledgeSource(exclude=keys[:3]))
    assert len(data.datasets["train"]) == 6
    assert len(data.knowledge_dataset()) == 5


def test_one_recording_has_one_clip_id_in_batches_and_knowledge(written):
    source = wavcaps(written)
    evaluation = {item["clip_id"] for item in audiocaps(written).datasets["val"]}
    assert len(evaluation & {item["clip_id"] for item in source}) == 1
    evaluation = {item["clip_id"] for item in clotho(written).datasets["val"]}
    assert len(evaluation & {item["clip_id"] for item in source}) == 1


@pytest.mark.parametrize(
    ("place", "mode", "train", "knowledge"),
    [("knowledge", "replace", 8, 9), ("train", "add", 10, 8), ("both", "add", 10, 10)],
)
def test_enriched_captions_go_where_they_should(written, tmp_path, place, mode, train, knowledge):
    clips = audiocaps(written).datasets["train"].clips
    path = tmp_path / "enriched.json"
    path.write_text(f'{{"Y{clips[0].name}.wav": ["one new caption", "another"]}}')
    data = audiocaps(written, enriched=EnrichedCaptions(path, mode, place))
    with pytest.warns(UserWarning, match="captions for 1 of 8 clips of AudioCaps train") as caught:
        data.knowledge_dataset()
    assert len(caught) == 1
    assert (len(data.datasets["train"]), len(data.knowledge_dataset())) == (train, knowledge)
    texts = [item["caption"] for item in data.knowledge_dataset()]
    assert ("another" in texts) == (place != "train")


class Trained(TinyRetriever):
    def __init__(self):
        super().__init__(width=8, sample_rate=32000)
        self.seen = []

    def encode_audio(self, batch):
        self.seen.append(batch["clip_id"].tolist())
        return super().encode_audio(batch)


@pytest.mark.parametrize("make", [audiocaps, clotho])
@pytest.mark.parametrize("knowledge", ["train", "wavcaps"])
def test_training_with_ask(written, make, knowledge):
    data = make(written, knowledge=KnowledgeSource(written / "wavcaps" if knowledge == "wavcaps" else None))
    loss = ReliabilityOTLoss(num_neighbors=3)
    model = Trained()
    wrapped = ASKModule(model, loss, ids="clip_id")
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=2,
        num_sanity_val_steps=0,
        callbacks=[KnowledgeRefreshCallback(source=data.knowledge_dataset, num_prototypes=4)],
    )
    trainer.fit(wrapped, datamodule=data)
    assert loss.knowledge.fine.audio.shape[0] == len(data.knowledge_dataset())
    known = set(loss.knowledge.ids.tolist())
    assert known == {item["clip_id"] for item in data.knowledge_dataset()}
    if knowledge == "train":
        assert {number for batch in model.seen for number in batch} >= known

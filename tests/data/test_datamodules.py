"""Loaders: layout of batches, an order that depends on seed and epoch alone, parts that share no clip."""

import unicodedata
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

from ask_lightning.data import (
    AudioFolder,
    DatasetsDataModule,
    EpochSampler,
    FolderData,
    RetrievalDataModule,
    SoundscapeData,
    Soundscapes,
    collate_pairs,
)
from ask_lightning.encoding.source_loader import source_loader


class Listener(L.LightningModule):
    """Remembers which clips it saw; draws as many random numbers as it is told."""

    def __init__(self, draws: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.draws = draws
        self.seen = []

    def training_step(self, batch, batch_idx):
        torch.rand(self.draws)
        self.seen.append(batch["clip_id"].tolist())
        return self.weight * 0

    def configure_optimizers(self):
        # As schedules do: Lightning sets up the loaders for it, before a resumed run knows its epoch.
        _ = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model: L.LightningModule, data: RetrievalDataModule, epochs: int = 2, ckpt_path=None) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def soundscapes(**options) -> SoundscapeData:
    sizes = {"num_train": 10, "num_val": 3, "num_test": 2, "seconds": 0.5, "batch_size": 4}
    return SoundscapeData(**(sizes | options))


def test_layout_of_batches():
    data = soundscapes(eval_captions_per_clip=2)
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    batch = batches[0]
    assert set(batch) == {"waveform", "num_samples", "caption", "clip_id", "caption_id"}
    assert batch["waveform"].shape == (4, 8000)
    assert batch["num_samples"].tolist() == [8000] * 4
    assert len(batch["caption"]) == 4
    assert isinstance(batch["caption"][0], str)
    assert batch["clip_id"].dtype == torch.int64
    assert torch.cat([batch["clip_id"] for batch in data.val_dataloader()]).tolist() == [0, 0, 1, 1, 2, 2]
    assert sum(len(batch["caption"]) for batch in data.test_dataloader()) == 4
    batch = next(iter(soundscapes(features="log_mel", num_mels=32).val_dataloader()))
    assert set(batch) == {"log_mel", "caption", "clip_id", "caption_id"}
    assert batch["log_mel"].shape == (4, 32, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_val": 0}, "`num_val` has to be an integer of at least 1, but got 0"),
        ({"scenes_seed": -1}, "`scenes_seed` has to be an integer of at least 0, but got -1"),
        ({"eval_captions_per_clip": 6}, r"`eval_captions_per_clip` has to be in \[1, 5\], but got 6"),
    ],
)
def test_sizes_are_checked_under_their_own_names(options, message):
    with pytest.raises(ValueError, match=message):
        soundscapes(**options)


def test_audio_settings_of_a_folder_are_checked_before_files_are_read(tmp_path):
    with pytest.raises(ValueError, match="`seconds` has to be at least"):
        FolderData(tmp_path, tmp_path / "no.csv", seconds=0)


def test_two_runs_see_the_same_batches_whatever_else_they_draw():
    one, other, third = Listener(), Listener(draws=3), Listener()
    fit(one, soundscapes())
    torch.manual_seed(99)
    fit(other, soundscapes())
    fit(third, soundscapes(seed=1))
    assert one.seen == other.seen
    assert one.seen[:2] != one.seen[2:], "the second epoch has an order of its own"
    assert one.seen != third.seen


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_goes_on_with_the_batches_of_its_epoch(num_workers, tmp_path):
    whole, first, second = Listener(), Listener(), Listener()
    fit(whole, soundscapes(num_workers=num_workers), epochs=3)
    fit(first, soundscapes(num_workers=num_workers), epochs=1).save_checkpoint(tmp_path / "last.ckpt")
    fit(second, soundscapes(num_workers=num_workers), epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert first.seen + second.seen == whole.seen


def test_processes_share_out_the_pairs_and_shuffle_alike():
    clips = Soundscapes(10, seconds=0.5)
    orders = []
    for epoch in range(2):
        samplers = [EpochSampler(clips, num_replicas=2, rank=rank, seed=0) for rank in range(2)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        orders.append([list(sampler) for sampler in samplers])
        assert sorted(orders[-1][0] + orders[-1][1]) == list(range(10))
    assert orders[0] != orders[1]


def test_loaders_leave_the_global_generator_alone():
    data = soundscapes()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def folder(tmp_path, record):
    rows = ["filename,caption,recording"]
    for index in range(20):
        record(f"{index}.wav", seconds=2, pitch=100 * (index + 1))
        rows.append(f"{index}.wav,tone number {index},recording {index // 2}")
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    return tmp_path


def folder_data(folder, **options) -> FolderData:
    options = {
        "clip_id_column": "recording",
        "fractions": (0.6, 0.2, 0.2),
        "seconds": 1,
        "batch_size": 4,
    } | options
    return FolderData(folder, folder / "clips.csv", **options)


def test_a_folder_has_the_same_batches(folder):
    batch = next(iter(folder_data(folder).train_dataloader()))
    assert set(batch) == {"waveform", "num_samples", "caption", "clip_id", "caption_id"}
    assert batch["waveform"].shape == (4, 16000)
    batch = next(iter(folder_data(folder, features="log_mel").train_dataloader()))
    assert set(batch) == {"log_mel", "caption", "clip_id", "caption_id"}
    assert batch["log_mel"].shape == (4, 63, 64)


def test_parts_of_a_folder_share_no_clip_and_only_training_crops_at_random(folder):
    data = folder_data(folder)
    assert {name: len(part) for name, part in data.datasets.items()} == {"train": 12, "val": 4, "test": 4}
    clips = [{clip.recording for clip in part.clips} for part in data.datasets.values()]
    assert not clips[0] & clips[1] | clips[0] & clips[2] | clips[1] & clips[2]
    for name, part in data.datasets.items():
        before = part[0]["waveform"]
        part.set_epoch(1)
        assert torch.equal(before, part[0]["waveform"]) == (name != "train")


def test_training_tells_the_dataset_its_epoch(folder):
    class Ear(Listener):
        def training_step(self, batch, batch_idx):
            first_samples = dict(zip(batch["caption"], batch["waveform"][:, 0].tolist(), strict=True))
            self.seen.append(sorted(first_samples.items()))
            return self.weight * 0

    def crops(**options):
        ear = Ear()
        fit(ear, folder_data(folder, batch_size=12, **options))
        return ear.seen

    first = crops()
    assert first[0] != first[1]
    assert crops() == first
    assert crops(num_workers=2) == first


@pytest.mark.parametrize(
    "join", [lambda clips: Subset(clips, range(12)), lambda clips: ConcatDataset([clips])]
)
def test_parts_of_a_dataset_are_told_the_epoch(folder, join):
    clips = folder_data(folder, batch_size=4).datasets["train"]
    loader = DatasetsDataModule(join(clips), clips, batch_size=4).train_dataloader()
    crops = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        crops.append(sorted(float(value) for batch in loader for value in batch["waveform"][:, 0]))
    assert crops[0] != crops[1]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_persistent_workers_are_told_the_epoch(folder, context):
    dataset = AudioFolder(folder, folder / "clips.csv", sample_rate=8000, seconds=0.1, crop="random")
    sampler = EpochSampler(dataset, num_replicas=1, rank=0, seed=0)
    options = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": context}
    loader = DataLoader(dataset, None, sampler=sampler, **options)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for row, item in zip(sampler, loader, strict=True):
            expected = dataset[row]["waveform"]
            assert torch.equal(item["waveform"], expected)
    before = dataset[0]["waveform"]
    dataset.variant().set_epoch(7)
    assert torch.equal(dataset[0]["waveform"], before)


def test_a_bad_file_is_reported_once_for_all_parts(folder):
    (folder / "3.wav").unlink()
    with pytest.warns(UserWarning, match="Left out 1") as caught:
        assert sum(len(part) for part in folder_data(folder).datasets.values()) == 19
    assert len([warning for warning in caught if "Left out" in str(warning.message)]) == 1


def test_a_missing_file_moves_no_clip_to_another_part(folder):
    def parts():
        return {clip.key: name for name, part in folder_data(folder).datasets.items() for clip in part.clips}

    before = parts()
    (folder / "0.wav").unlink()
    with pytest.warns(UserWarning, match="Left out 1"):
        after = parts()
    assert after == {key: name for key, name in before.items() if key != "file:0.wav"}


def test_training_clips_that_new_rows_have_moved_into_evaluation_are_told(folder):
    class Checked(Listener):
        def validation_step(self, batch, batch_idx):
            pass

    rows = (folder / "clips.csv").read_text().split("\n")
    checkpoint = folder / "last.ckpt"

    def data_of(number):
        (folder / "clips.csv").write_text("\n".join(rows[: number + 1]))
        return folder_data(folder, clip_id_column=None)

    def clips(data, *splits):
        return {clip.name for split in splits for clip in data.datasets[split].clips}

    before = data_of(14)
    trainer = fit(Checked(), before)
    trainer.save_checkpoint(checkpoint)
    after = data_of(20)
    moved = clips(before, "train") & clips(after, "val", "test")
    assert moved, "else the rows have to be others"
    with pytest.warns(
        UserWarning, match=rf"{len(moved)} of 8 validation and test clips \({min(moved)}.*were training clips"
    ):
        trainer.validate(Checked(), after, ckpt_path=checkpoint, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*were training clips")
        trainer.validate(Checked(), data_of(14), ckpt_path=checkpoint, verbose=False)


@pytest.mark.parametrize("columns", [("recording", None), (None, "recording")], ids=["lost", "new"])
def test_training_clips_are_known_where_the_table_has_lost_or_got_its_clip_ids(folder, columns):
    before, after = (folder_data(folder, clip_id_column=column) for column in columns)
    trained = {clip.key for clip in before.datasets["train"].clips}
    evaluated = [clip for split in ("val", "test") for clip in after.datasets[split].clips]
    moved = [clip.name for clip in evaluated if clip.key in trained]
    assert moved, "else the rows have to be others"
    with pytest.warns(UserWarning, match=f"{len(moved)} of {len(evaluated)} validation and test clips "):
        after.load_state_dict(before.state_dict())


def names_of_parts(root: Path, names: list[str]) -> dict[str, set[str]]:
    root.mkdir()
    for name in names:
        soundfile.write(root / name, np.zeros(800), 8000)
    (root / "clips.csv").write_text("\n".join(["file,caption", *(f"{name},{name[0]}" for name in names)]))
    data = FolderData(root, sample_rate=8000, seconds=0.1, fractions=(0.5, 0.3, 0.2), check="none")
    return {
        split: {unicodedata.normalize("NFC", clip.name) for clip in part.clips}
        for split, part in data.datasets.items()
    }


def test_parts_are_the_same_in_every_order_of_the_rows_and_on_every_system(tmp_path):
    names = [f"{number} \N{LATIN SMALL LETTER E WITH ACUTE}.wav" for number in range(20)]
    expected = names_of_parts(tmp_path / "first", names)
    assert names_of_parts(tmp_path / "second", names[::-1]) == expected
    assert (
        names_of_parts(tmp_path / "third", [unicodedata.normalize("NFD", name) for name in names]) == expected
    )


def test_knowledge_and_encoding_have_no_random_crops(folder):
    data = folder_data(folder)
    source = data.knowledge_dataset()
    assert source is data.knowledge_dataset(), "else each refresh would take it for other data"
    assert [item["clip_id"] for item in source] == [item["clip_id"] for item in data.datasets["train"]]
    encoded = data.ordered_dataloader("train").dataset[0]
    source.set_epoch(3)
    assert torch.equal(source[0]["waveform"], encoded["waveform"])
    assert not torch.equal(source[0]["waveform"], data.datasets["train"][0]["waveform"])
    assert soundscapes().knowledge_dataset().scenes


def test_the_training_data_become_knowledge_without_random_crops(folder):
    """Where a user passes no source, and where training is a part of datasets or several of them."""
    data = folder_data(folder)
    train = data.datasets["train"]
    middle = train.without_random_crops()
    (batch,) = source_loader(None, DataLoader(train, batch_size=99, collate_fn=collate_pairs))
    assert torch.equal(batch["waveform"], collate_pairs(list(middle))["waveform"])
    joined = ConcatDataset([Subset(train, [3, 1]), train])
    val = data.datasets["val"]
    for source in (
        DatasetsDataModule(joined, val).knowledge_dataset(),
        DatasetsDataModule(joined, val).ordered_dataloader("train").dataset,
        source_loader(joined, None, batch_size=2).dataset,
    ):
        for index, place in ((0, 3), (1, 1), (2, 0)):
            assert torch.equal(source[index]["waveform"], middle[place]["waveform"])
    assert not torch.equal(joined[2]["waveform"], middle[0]["waveform"])


def test_given_parts(folder):
    def part(*indices, **options):
        rows = ["filename,caption", *(f"{index}.wav,tone {index}" for index in indices)]
        (folder / "part.csv").write_text("\n".join(rows))
        return AudioFolder(folder, folder / "part.csv", seconds=1, **options)

    data = DatasetsDataModule(part(0, 1, 2, 3, crop="random"), part(4, 5), batch_size=2)
    assert len(data.train_dataloader()) == 2
    assert len(data.val_dataloader()) == 1
    with pytest.raises(ValueError, match=r"There is no test dataset, only train, val"):
        data.test_dataloader()


def test_mistakes():
    with pytest.raises(ValueError, match="`batch_size` has to be an integer of at least 2, but got 1"):
        soundscapes(batch_size=1)
    with pytest.raises(ValueError, match="`seed` has to be an integer of at least 0, but got -1"):
        soundscapes(seed=-1)
    with pytest.raises(
        ValueError, match=r"The 10 training pairs of a process do not fill a batch of 32.*Lower `batch_size`"
    ):
        fit(Listener(), soundscapes(batch_size=32))
    with pytest.raises(ValueError, match=r"`fractions` has to be 2 or 3 numbers, but got \(1.0,\)"):
        FolderData(".", "clips.csv", fractions=(1.0,))


def test_soundscape_parts_are_of_one_world():
    data = soundscapes(scenes_seed=5)
    expected = Soundscapes(3, split="val", seed=5, seconds=0.5)
    assert data.datasets["val"].scenes == expected.scenes
    assert np.all([scene not in data.datasets["train"].scenes for scene in expected.scenes])

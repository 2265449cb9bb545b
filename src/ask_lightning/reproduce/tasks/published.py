"""AudioCaps and Clotho, with the models of the paper or with a small one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import yaml
from torch.utils.data import Dataset

from ask_lightning.data import (
    AudioCapsData,
    ClipDataset,
    ClothoData,
    EnrichedCaptions,
    KnowledgeSource,
    PublishedDataModule,
)
from ask_lightning.data.splits import SPLITS
from ask_lightning.models import CEDSonar, ResNet38BERT, TinyRetriever
from ask_lightning.reproduce.tasks.loaded_data import LoadedData, Parts
from ask_lightning.reproduce.tasks.pretrained_model import PretrainedModel
from ask_lightning.reproduce.tasks.task import Task
from ask_lightning.utilities.arguments import check_choice

Backbone = Literal["resnet38_bert", "ced_sonar", "tiny"]
"""`"resnet38_bert"`: `ResNet38BERT`. `"ced_sonar"`: `CEDSonar`. `"tiny"`: `TinyRetriever`."""

DatasetName = Literal["audiocaps", "clotho"]
"""`"audiocaps"`: `AudioCapsData`. `"clotho"`: `ClothoData`."""

_MODULES: Mapping[str, type[PublishedDataModule]] = {"audiocaps": AudioCapsData, "clotho": ClothoData}
_MODELS: Mapping[str, Callable[..., pl.LightningModule]] = {
    "resnet38_bert": ResNet38BERT,
    "ced_sonar": CEDSonar,
    "tiny": TinyRetriever,
}
# The paper's options stand in the configs of the command line, and so do those that shrink them.
_CONFIGS = Path(__file__).parents[2] / "configs"
_WEIGHTS_FOLDER = "weights"
# What the config of a backbone says, for the one that has none.
_TINY: Mapping[str, Any] = {
    "model": {"init_args": {"learning_rate": 2e-3, "sample_rate": 16000}},
    "data": {"init_args": {"caption_style": "plain", "sample_rate": 16000}},
    "trainer": {"max_epochs": 10},
    "ask": {"refresh": {"T": 3}},
}


def audiocaps_task(root: Path, **options: Any) -> Task:
    """AudioCaps with the paper's models and schedule.

    Args:
        root: Folder of AudioCaps, with annotations and audio files at any depth.
        options: All other arguments of `published_task`.

    Returns:
        The task. Data are read, and weights pretrained, when they are first used.
    """
    return published_task("audiocaps", root, **options)


def clotho_task(root: Path, **options: Any) -> Task:
    """Clotho with the paper's models and schedule.

    Args:
        root: Folder of Clotho, with annotations and audio files at any depth.
        options: All other arguments of `published_task`.

    Returns:
        The task. Data are read, and weights pretrained, when they are first used.
    """
    return published_task("clotho", root, **options)


def published_task(
    dataset: DatasetName,
    root: Path,
    *,
    enriched: Path | None = None,
    wavcaps: Path | None = None,
    transfer_root: Path | None = None,
    backbone: Backbone = "resnet38_bert",
    audio_weights: str | None = None,
    text_weights: str | None = None,
    shrunken: bool = False,
    seconds: float | None = None,
    cache: str | None = None,
    num_workers: int | None = None,
    pretraining_epochs: int | None = None,
    pretraining_seed: int = 0,
    pretraining_folder: Path = Path("runs/pretrained"),
    learning_rate: float | None = None,
    batch_size: int | None = None,
    max_epochs: int | None = None,
    T: int | None = None,
    num_prototypes: int | None = None,
    accelerator: str = "auto",
) -> Task:
    """A published dataset with the models and the schedule of the paper.

    Options that are None are the paper's, as the shipped configs of `ask-lightning fit` have them: 50 epochs
    of ResNet-38 and BERT, whose learning rate is divided by ten every 20, or 10 epochs of CED and SONAR,
    where it is every 4. Unlike there, all methods keep the epoch with the highest mean recall of both
    directions.

    Other knowledge is that of the paper's Table 1: `"WavCaps"`, and `"training clips, other captions"`, the
    training set as somebody has annotated it anew. The validation and test clips of the dataset, and of the
    other one if its folder is given, are left out of both.

    Args:
        dataset: `"audiocaps"` or `"clotho"`.
        root: Folder of the dataset, with annotations and audio files at any depth.
        enriched: Other captions of the training clips by clip id, a CSV or JSON; see `read_captions_by_id`.
            None: there is no such knowledge.
        wavcaps: Folder of WavCaps. None: there is no such knowledge.
        transfer_root: Folder of the other one of the two datasets, whose test part is the other domain. None:
            there is none.
        backbone: `"resnet38_bert"` is ML-ACT's and `"ced_sonar"` ML-CLAP's, which the paper trains.
            `"tiny"` is a small model for a machine without a GPU.
        audio_weights: Weights of the audio encoder, a path or a name on the Hugging Face hub. None: those of
            the paper, `weights/ResNet38_mAP=0.434.pth` or `mispeech/ced-base`.
        text_weights: Weights of the text encoder, a folder or a name on the hub. None: those of the paper,
            `bert-base-uncased` or `cointegrated/SONAR_200_text_encoder`.
        shrunken: Whether everything is as small as it gets, to see whether it runs: few, narrow layers with
            random weights, crops of 0.7 s, batches of 8, 12 prototypes, two epochs and a refresh in each.
        seconds: Length of a training crop of AudioCaps, and the longest that a waveform of Clotho may be.
            None: 10 and 30.
        cache: Place for decoded audio, `"memory"` or a folder. None: it is decoded anew.
        num_workers: Number of worker processes of each loader. None: 4.
        pretraining_epochs: Number of epochs of NT-Xent on the training part before; all losses start from
            these weights. None: 6 for the tiny model, whose first weights are random, otherwise 0.
        pretraining_seed: Seed of the pretraining.
        pretraining_folder: Folder where the pretrained weights are kept.
        learning_rate: Learning rate at the start, also of the pretraining. None: 5e-5, or 2e-3 for the tiny
            model.
        batch_size: Number of pairs in a batch, at least 2. None: 32 of AudioCaps, 24 of Clotho.
        max_epochs: Number of epochs of each run. None: 50 with ResNet-38 and BERT, otherwise 10.
        T: Number of epochs from one refresh of the knowledge to the next. None: 15, for the tiny model 3.
        num_prototypes: Number of coarse prototypes. None: 512.
        accelerator: Accelerator of the trainer.

    Returns:
        The task. Data are read, and weights pretrained, when they are first used.

    Raises:
        FileNotFoundError: A file or folder is not there.
        ValueError: An argument is outside its range, or weights are given for a model that has random ones.
    """
    check_choice("dataset", dataset, get_args(DatasetName))
    check_choice("backbone", backbone, get_args(Backbone))
    places = {"root": root, "enriched": enriched, "wavcaps": wavcaps, "transfer_root": transfer_root}
    for name, path in places.items():
        _check_there(name, path)
    weights = {
        name: given
        for name, given in (("audio_weights", audio_weights), ("text_weights", text_weights))
        if given is not None
    }
    if weights and (shrunken or backbone == "tiny"):
        raise ValueError(
            f"Argument `{next(iter(weights))}` has to be left out, because the weights of a tiny or shrunken "
            "model are random."
        )
    config = _Config.read(dataset, backbone, shrunken)
    learning_rate = config.learning_rate if learning_rate is None else learning_rate
    batch_size = config.batch_size if batch_size is None else batch_size
    loaders = {
        "batch_size": batch_size,
        "num_workers": config.num_workers if num_workers is None else num_workers,
    }
    given_refresh = {"T": T, "num_prototypes": num_prototypes}
    if pretraining_epochs is None:
        pretraining_epochs = (2 if shrunken else 6) if backbone == "tiny" else 0
    own = _Clips(dataset, root, backbone, shrunken, seconds, cache)
    other: _Clips | None = None
    if transfer_root is not None:
        other_name: DatasetName = "clotho" if dataset == "audiocaps" else "audiocaps"
        other = _Clips(other_name, transfer_root, backbone, shrunken, None, cache)
    folders = _Folders(own, enriched, wavcaps, other)
    description = {
        "root": str(root),
        "backbone": backbone,
        **weights,
        "shrunken": shrunken,
        "seconds": seconds,
        "batch_size": batch_size,
    }
    make_data = partial(_SeededCrops, partial(_parts, folders), **loaders)
    model = PretrainedModel(
        partial(_MODELS[backbone], **(config.model | weights)),
        make_data,
        learning_rate=learning_rate,
        epochs=pretraining_epochs,
        seed=pretraining_seed,
        folder=pretraining_folder,
        accelerator=accelerator,
        options={"task": dataset, **description},
        trainer_options=config.trainer_options,
    )
    knowledge: dict[str, Callable[[], Dataset[Any]]] = {}
    if wavcaps is not None:
        knowledge["WavCaps"] = partial(_wavcaps, folders)
    if enriched is not None:
        knowledge["training clips, other captions"] = partial(_other_captions, folders)
    transfer: dict[str, Callable[[int], LoadedData]] = {}
    if other is not None:
        transfer[_title(other)] = partial(LoadedData, partial(_test_part, other), **loaders)
    return Task(
        name=dataset,
        make_data=make_data,
        make_model=model.make_model,
        learning_rate=learning_rate,
        max_epochs=config.max_epochs if max_epochs is None else max_epochs,
        refresh=config.refresh | {name: one for name, one in given_refresh.items() if one is not None},
        description={
            **description,
            "pretraining_epochs": pretraining_epochs,
            "pretraining_seed": pretraining_seed,
        },
        make_token_model=model.make_token_model,
        knowledge_sources=knowledge,
        transfer=transfer,
        accelerator=accelerator,
        trainer_options=config.trainer_options,
        prepare=partial(_prepare, model),
    )


@dataclass(frozen=True)
class _Config:
    """What the shipped configs say of a dataset and a backbone."""

    model: dict[str, Any]
    learning_rate: float
    data: dict[str, Any]
    batch_size: int
    num_workers: int
    trainer_options: dict[str, Any]
    max_epochs: int
    refresh: dict[str, Any]

    @classmethod
    def read(cls, dataset: str, backbone: str, shrunken: bool) -> _Config:
        """Merge the parts, and in the end those that shrink them."""
        merged: dict[str, Any] = {}
        for part in (dataset, "ask", backbone):
            _merge(merged, _TINY if part == "tiny" else _read(_CONFIGS / "parts" / f"{part}.yaml"))
        for part in ("run", dataset, "ask", backbone) if shrunken else ():
            _merge(merged, {} if part == "tiny" else _read(_CONFIGS / "demo" / f"{part}.yaml"))
        model, data = merged["model"]["init_args"], merged["data"]["init_args"]
        if isinstance(model.get("audio_weights"), str):
            model["audio_weights"] = model["audio_weights"].replace("{weights}", _WEIGHTS_FOLDER)
        trainer = merged["trainer"]
        return cls(
            learning_rate=model.pop("learning_rate"),
            model=model,
            batch_size=data.pop("batch_size"),
            num_workers=data.pop("num_workers"),
            data={name: value for name, value in data.items() if name != "root"},
            trainer_options={name: value for name, value in trainer.items() if name == "gradient_clip_val"},
            max_epochs=trainer["max_epochs"],
            refresh=merged["ask"]["refresh"],
        )


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def _merge(config: dict[str, Any], update: Mapping[str, Any]) -> None:
    """Merge mappings, in place and at any depth."""
    for key, value in update.items():
        if isinstance(value, Mapping):
            _merge(config.setdefault(key, {}), value)
        else:
            config[key] = value


@dataclass(frozen=True)
class _Clips:
    """A dataset, and how its clips are read."""

    dataset: DatasetName
    root: Path
    backbone: str
    shrunken: bool
    seconds: float | None
    cache: str | None = field(repr=False)  # where audio is kept decides no result

    def module(self, **options: Any) -> PublishedDataModule:
        """A data module that reads them."""
        data = _Config.read(self.dataset, self.backbone, self.shrunken).data
        if self.seconds is not None:
            data["seconds"] = self.seconds
        return _MODULES[self.dataset](self.root, cache=self.cache, **(data | options))


@dataclass(frozen=True)
class _Folders:
    """The dataset of a task, the sources of other knowledge, and the dataset of the other domain."""

    own: _Clips
    enriched: Path | None
    wavcaps: Path | None
    other: _Clips | None


class _SeededCrops(LoadedData):
    """Loaders over loaded clips, whose random crops have the seed of the batches."""

    def build(self) -> Parts:
        parts = super().build()
        train = parts["train"]
        assert isinstance(train, ClipDataset)
        return {**parts, "train": train.variant(seed=self._seed)}


@cache
def _module(folders: _Folders) -> PublishedDataModule:
    """The data module of the training clips, whose knowledge has the other captions if there are any."""
    if folders.enriched is None:
        return folders.own.module()
    return folders.own.module(enriched=EnrichedCaptions(folders.enriched, used_in="knowledge"))


@cache
def _parts(folders: _Folders) -> Parts:
    data = _module(folders)
    missing = [split for split in SPLITS if split not in data.datasets]
    if missing:
        raise FileNotFoundError(
            f"{folders.own.root}: there are no annotations of {' and '.join(missing)} below it, but a "
            "comparison needs all three parts."
        )
    data.setup("fit")
    return {split: data.datasets[split] for split in SPLITS}


@cache
def _test_part(clips: _Clips) -> Parts:
    data = clips.module()
    if "test" not in data.datasets:
        raise FileNotFoundError(f"{clips.root}: there are no annotations of a test part below it.")
    return {"test": data.datasets["test"]}


@cache
def _other_captions(folders: _Folders) -> ClipDataset:
    """The training clips with the other captions, without clips of any evaluation."""
    return _knowledge_of(_module(folders), folders)


@cache
def _wavcaps(folders: _Folders) -> ClipDataset:
    """WavCaps without clips of any evaluation."""
    return _knowledge_of(folders.own.module(knowledge=KnowledgeSource(wavcaps=folders.wavcaps)), folders)


def _knowledge_of(data: PublishedDataModule, folders: _Folders) -> ClipDataset:
    if folders.other is not None:
        data.hold_out(folders.other.module().evaluation_clips())
    return data.knowledge_dataset()


def _prepare(model: PretrainedModel, log: Callable[[str], object]) -> None:
    """Pretrain, and make a model once, so that weights which are missing are told before the first run."""
    model.prepare(log)
    model.make_model(model.learning_rate)


def _title(clips: _Clips) -> str:
    return _MODULES[clips.dataset].dataset_name


def _check_there(name: str, path: Path | None) -> None:
    if path is not None and not path.exists():
        raise FileNotFoundError(
            f"Argument `{name}` has to be the path of something that exists, but got {str(path)!r}. Correct "
            "the path."
        )

"""The model card of an exported model, in the layout of the Hugging Face hub."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from ask_lightning.cli.errors import UsageError
from ask_lightning.cli.model_section import load_class
from ask_lightning.data import PublishedDataModule
from ask_lightning.metrics import Calibration
from ask_lightning.metrics.table import COLUMNS, percentages, score_table
from ask_lightning.models import Retriever
from ask_lightning.utilities.optional_imports import import_optional
from ask_lightning.utilities.text_tables import Cell, markdown_table

_TASK = "audio-text-retrieval"
_SHIPPED = "ask_lightning.models"
_RAW, _CALIBRATED = "by cosine", "calibrated"
_EXPLANATION = (
    "A2T is audio-to-text, T2A text-to-audio retrieval; R@k is the share of queries with a hit among the "
    "first k, mAP@10 the mean average precision cut at 10. Of ties {ties}. `results.json` and its like have "
    "all metrics and the versions of the packages."
)


def model_card(
    model: pl.LightningModule,
    name: str,
    *,
    config: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    source: str | None = None,
    is_calibrated: bool = False,
) -> str:
    """Write the model card of a model.

    Args:
        model: The model.
        name: Name of the model, or of its repository.
        config: The config of the training. None: it is not known.
        results: The results of tests of these weights, without paths, the latest first.
        source: What loads it, as the argument of `from_pretrained`. None: the name.
        is_calibrated: Whether a calibration of search lies beside the model.

    Returns:
        Markdown with a head in YAML.
    """
    hub = import_optional("huggingface_hub")
    config = config or {}
    data = config.get("data") or {}
    dataset = _dataset_name(data.get("class_path"))
    loss = _loss(model, config)
    tags = [_TASK, "audio", "text", "feature-extraction", "pytorch-lightning"]
    head = hub.ModelCardData(
        library_name="ask-lightning",
        tags=[*tags, *(["clap"] if _is_clap(model) else [])],
        datasets=None if dataset is None else [dataset.lower()],
        metrics=["recall", "map"],
        model_name=name,
        eval_results=[entry for one in results for entry in _eval_results(hub, one)] or None,
    )
    sections = [
        f"# {name}",
        _what_it_is(model, config, dataset),
        "## Training",
        _training(model, config, loss, dataset),
        "## Results",
        *(map(_results, results) if results else ["This checkpoint has not been tested."]),
        *([_EXPLANATION.format(ties=results[0]["protocol"]["ties"])] if results else []),
        "## Use",
        _use(model, source or name, (data.get("init_args") or {}).get("caption_style"), is_calibrated),
        "## Limits",
        _limits(model),
    ]
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _what_it_is(model: pl.LightningModule, config: Mapping[str, Any], dataset: str | None) -> str:
    """The first paragraph."""
    kind = type(model)
    said = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
    own = f" ({said.rstrip('.')})" if said and kind.__module__.startswith(_SHIPPED) else ""
    trained = f", trained on {dataset}" if dataset else ""
    text = (
        f"`{kind.__name__}`{own}{trained}: an audio encoder and a text encoder of one embedding space, with "
        "which sounds are found by a description and descriptions by a sound. It was trained with "
        "ask-lightning."
    )
    if _asks(config) and str(_loss(model, config)[0]) == "ReliabilityOTLoss":
        text += " The training is ASK of the paper [arXiv 2512.19703](https://arxiv.org/abs/2512.19703)."
    return text


def _training(
    model: pl.LightningModule,
    config: Mapping[str, Any],
    loss: tuple[str, dict[str, Any]],
    dataset: str | None,
) -> str:
    """Loss, data and hyperparameters."""
    hyperparameters = _code_block(dict(model.hparams))
    if "trainer" not in config:
        return f"The config of the training is not known. Hyperparameters of the model:\n\n{hyperparameters}"
    trainer, data = config.get("trainer") or {}, (config.get("data") or {}).get("init_args") or {}
    rows: list[list[Cell]] = [["loss", loss[0]]]
    own = str((config.get("data") or {}).get("class_path")).rpartition(".")[2]
    rows.append(["dataset", dataset or own])
    if _asks(config) and (knowledge := _knowledge(data)):
        rows.append(["knowledge", knowledge])
    given = {
        "epochs": trainer.get("max_epochs"),
        "batch size of a device": data.get("batch_size"),
        "devices": trainer.get("devices"),
        "precision": trainer.get("precision"),
        "gradient clipping": trainer.get("gradient_clip_val"),
        "seed": config.get("seed_everything"),
        "captions": data.get("caption_style"),
        "seconds of a clip": data.get("seconds"),
    }
    rows += [[name, str(value)] for name, value in given.items() if value is not None]
    parts = [markdown_table(["", "value"], rows)]
    if loss[1]:
        parts.append(f"Arguments of the loss:\n\n{_code_block(loss[1])}")
    parts.append(f"Hyperparameters of the model:\n\n{hyperparameters}")
    return "\n\n".join(parts)


def _results(results: Mapping[str, Any]) -> str:
    """The table of the results of a test, and the protocol."""
    scores = _percent(results)
    columns, cells = score_table(scores, "%")
    protocol = results["protocol"]
    counts = [f"{protocol[what]} {what}" for what in ("clips", "captions") if protocol[what] is not None]
    where = f"the {protocol['split']} split of {protocol['dataset'] or protocol['data']}"
    text = [f"On {where}" + (f" ({', '.join(counts)})" if counts else "") + ":"]
    shown = [[f"{cell:.1f}" if isinstance(cell, float) else cell for cell in row] for row in cells]
    text.append(markdown_table(columns, shown))
    if _CALIBRATED in scores:
        chosen = results["calibration"]
        how = "" if chosen is None else f" ({Calibration(**chosen)}, chosen on the validation split)"
        text.append(
            "Calibrated search subtracts from each score how near the candidate is to the queries of the "
            f"training split{how}."
        )
    if protocol["limited_to_batches"] is not None:
        text.append(
            f"Only the first {protocol['limited_to_batches']} batches were tested: no result to report."
        )
    if missing := protocol["clips_without_audio"]:
        text.append(f"{len(missing)} clips of the split had no audio and were left out.")
    return "\n\n".join(text)


def _use(model: pl.LightningModule, source: str, caption_style: str | None, is_calibrated: bool) -> str:
    """How the model is loaded and called."""
    kind = type(model)
    rate = dict(model.hparams).get("sample_rate")
    loader = "from_pretrained"
    lines = ["```python", "import torch", f"from ask_lightning.models import {loader}", ""]
    lines.append(f'model = {loader}("{source}")')
    if kind.__module__.startswith(_SHIPPED):
        text = "a dog barks then it rains" if caption_style == "plain" else "A dog barks, then it rains."
        lines += [
            "with torch.inference_mode():",
            f'    audio = model.encode_audio({{"waveform": torch.zeros(1, {10 * int(rate or 16000)})}})',
            f'    text = model.encode_text({{"caption": ["{text}"]}})',
        ]
        compared = getattr(model, "interaction", None) is not None
        similarity = "model.interaction(text, audio).to_audio" if compared else "text @ audio.T"
        lines.append(f"    similarity = {similarity}")
        if is_calibrated and not compared:
            lines[2:3] = [
                "from ask_lightning.metrics import HubCalibration",
                f"from ask_lightning.models import {loader}, load_calibration",
            ]
            lines += [
                "",
                f'bank, calibration = load_calibration("{source}")',
                "hubs = HubCalibration.from_bank(bank, audio, text, calibration)",
                'calibrated = hubs.calibrate(similarity, "audio")',
            ]
    lines.append("```")
    said = [f'`pip install "ask-lightning[audio]"`, then:\n\n{chr(10).join(lines)}']
    if rate is not None:
        said.append(
            f"Waveforms are mono, at {rate} Hz; `from_pretrained(…, sample_rate=…)` takes those of another "
            "rate."
        )
    if caption_style == "plain":
        said.append(
            "Captions of the training were in lower case and without punctuation: write queries so, by "
            "`ask_lightning.data.plain_caption`."
        )
    if not kind.__module__.startswith(_SHIPPED):
        said.append(f"The module `{kind.__module__}`, which defines the class, has to be importable.")
    if _is_clap(model):
        said.append(
            "It is a `ClapModel` as well, for transformers without this library: "
            f'`ClapModel.from_pretrained("{source}")`, and, where there is a tokenizer, '
            f'`ClapProcessor.from_pretrained("{source}")`.'
        )
    return "\n\n".join(said)


def _limits(model: pl.LightningModule) -> str:
    seconds = dict(model.hparams).get("max_seconds")
    lines = [
        "- It knows sounds and words like those of its training data; on other collections it may find less.",
        "- Scores order candidates. They are no probabilities, and no threshold of theirs means presence.",
    ]
    if seconds is not None:
        lines.append(f"- Of clips that are longer than {seconds:g} s it hears a part.")
    lines.append(
        "- The licences of the encoders that it began from, and of the data, hold for what is made of them."
    )
    return "\n".join(lines)


def _eval_results(hub: Any, results: Mapping[str, Any]) -> list[Any]:
    """The results for the head of the card. Those of a part of a split are none."""
    if results["protocol"]["limited_to_batches"] is not None:
        return []
    protocol = results["protocol"]
    name = str(protocol["dataset"] or protocol["data"])
    return [
        hub.EvalResult(
            task_type=_TASK,
            task_name="Audio–text retrieval",
            dataset_type=name.lower(),
            dataset_name=name,
            dataset_split=protocol["split"],
            metric_type=metric.replace("/", "_"),
            metric_name=f"{COLUMNS[metric]}, {search}",
            metric_value=value,
        )
        for search, scores in _percent(results).items()
        for metric, value in scores.items()
    ]


def _percent(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Percent by search and metric."""
    interaction = results["model"]["interaction"]
    searches = {f"by {interaction}" if interaction else _RAW: results["metrics"]["raw"]}
    if results["metrics"]["calibrated"]:
        searches[_CALIBRATED] = results["metrics"]["calibrated"]
    return {
        search: percentages({name: value for name, value in metrics.items() if value is not None}, "")
        for search, metrics in searches.items()
    }


def _loss(model: pl.LightningModule, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the loss of the training."""
    if not _asks(config):
        return "NT-Xent, the model's own" if isinstance(model, Retriever) else "the model's own", {}
    section = (config.get("ask") or {}).get("loss") or {}
    return str(section.get("class_path")).rpartition(".")[2], dict(section.get("init_args") or {})


def _asks(config: Mapping[str, Any]) -> bool:
    return bool((config.get("ask") or {}).get("enabled"))


def _knowledge(data: Mapping[str, Any]) -> str | None:
    """What the knowledge was made of."""
    if (data.get("knowledge") or {}).get("wavcaps"):
        return "WavCaps"
    if (data.get("enriched") or {}).get("path"):
        return "the training set with enriched captions"
    return "the training set" if "knowledge" in data else None


def _dataset_name(class_path: str | None) -> str | None:
    """The name of a published dataset."""
    try:
        kind = load_class(class_path or "")
    except UsageError:  # the card needs no module of the data
        return None
    if isinstance(kind, type) and issubclass(kind, PublishedDataModule):
        return str(kind.dataset_name)
    return None


def _is_clap(model: pl.LightningModule) -> bool:
    return getattr(type(model), "transformers_part", None) is not None


def _code_block(entries: Mapping[str, Any]) -> str:
    """Entries as JSON; those that are None are left out."""
    kept = {name: value for name, value in entries.items() if value is not None}
    return f"```json\n{json.dumps(kept, indent=2)}\n```"

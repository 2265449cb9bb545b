"""What kinds of refresh keep of the knowledge, against what they encode.

    python benchmarks/refresh_frontier.py --data soundscapes --jobs 8
    python benchmarks/refresh_frontier.py --data captions --captions FOLDER --jobs 8

trains a small model with each kind of refresh, loss and seed, and measures at the end of each epoch, before
any refresh, how well the stored rows stand for freshly encoded ones: the share of a row's ten true nearest
neighbours that its fresh embedding finds among stored rows, and RDM (Eq. 4); and the mean recall on the
validation part. The cost is the number of rows that refreshes encode per epoch, as a share of the source.

Runs that are finished are kept in the output folder, and a command that is repeated goes on with the others.
It writes `frontier.json`, `frontier.md`, `frontier.svg` and `frontier.png`.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from ask_lightning import ASKModule, KnowledgeRefreshCallback
from ask_lightning.callbacks.auto_period import AutoPeriod
from ask_lightning.encoding.encode import encode_source
from ask_lightning.functional import representation_drift, unit_length
from ask_lightning.functional.neighbor_recall import neighbor_recall
from ask_lightning.reproduce.artifacts.plots import new_figure
from ask_lightning.reproduce.methods import LOSSES
from ask_lightning.reproduce.tasks import TASKS, Task, quick_options
from ask_lightning.reproduce.training import silence_lightning
from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.text_tables import markdown_table

NEVER = 10**6
REFRESHES: dict[str, dict[str, Any]] = {
    "T = 1": {"T": 1},
    "T = 5": {"T": 5},
    "T = 15": {"T": 15},
    "T = ∞": {"T": NEVER},
    "auto": {"T": AutoPeriod()},
    "auto, max_drift = 0.1": {"T": AutoPeriod(max_drift=0.1)},
    "auto, max_drift = 0.02": {"T": AutoPeriod(max_drift=0.02)},
    "write-back, T = ∞": {"T": NEVER, "write_back": True},
    "write-back, T = 15": {"T": 15, "write_back": True},
    "mapped, T = 1": {"T": 1, "mode": "mapped"},
    "mapped, T = 5": {"T": 5, "mode": "mapped"},
    "rolling, T = 5": {"T": 5, "mode": "rolling"},
    "rolling, T = 15": {"T": 15, "mode": "rolling"},
}
FAMILIES = {
    "T": "#1d4ed8",
    "auto": "#c2410c",
    "write-back": "#15803d",
    "mapped": "#7e22ce",
    "rolling": "#0891b2",
}
_NUM_QUERIES = 1000


class Measure(pl.Callback):
    """Compares stored rows with fresh ones at the end of each epoch, without taking the run's time."""

    def __init__(self, refresh: KnowledgeRefreshCallback) -> None:
        self.refresh = refresh
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure all rows."""
        budget = self.refresh.schedule.budget if self.refresh.schedule else None
        if budget is not None:
            budget.stop()
        base = self.refresh.target.loss.knowledge
        fresh = encode_source(trainer, pl_module, self.refresh.loader(trainer), self.refresh.target.embed)
        rows = torch.linspace(0, len(base.fine) - 1, min(_NUM_QUERIES, len(base.fine))).long()
        found: dict[str, float] = {}
        for side in ("audio", "text"):
            now, stored = unit_length(getattr(fresh, side)).cpu(), getattr(base.fine, side).cpu()
            found[f"recall_{side}"] = float(neighbor_recall(now[rows], now, stored, own_rows=rows))
            found[f"rdm_{side}"] = float(representation_drift(now[rows], now, stored))
        found["validation"] = float(trainer.callback_metrics["val/mean_recall"])
        found["encoded"] = self.refresh.num_encoded / len(base.fine)
        self.epochs.append(found)
        if budget is not None:
            budget.start()


def make_task(options: dict[str, Any]) -> Task:
    name = options["data"]
    arguments: dict[str, Any] = quick_options(name) if options["quick"] else {}
    arguments.pop("T", None)
    if name == "captions":
        arguments["folder"] = Path(options["captions"])
    elif not options["quick"]:
        arguments["pretraining_folder"] = Path(options["output"]) / "pretrained"
    if options["epochs"]:
        arguments["max_epochs"] = options["epochs"]
    elif not options["quick"]:
        arguments["max_epochs"] = 30
    return TASKS[name](**arguments)


def run_path(options: dict[str, Any], loss: str, kind: str, seed: int) -> Path:
    name = "".join(char if char.isalnum() else "-" for char in f"{loss} {kind.replace('∞', 'never')}")
    return Path(options["output"]) / "runs" / f"{name}-{seed}.json"


def settings_of(options: dict[str, Any], task: Task, loss: str, kind: str, seed: int) -> dict[str, Any]:
    """What decides a run's result, as JSON gives it back."""
    settings = {
        "task": task.name,
        **task.description,
        "max_epochs": task.max_epochs,
        "num_prototypes": task.refresh["num_prototypes"],
        "learning_rate": task.learning_rate,
        "loss": loss,
        "loss_options": dict(LOSSES[loss].grid[0]),
        "refresh": {name: str(value) for name, value in REFRESHES[kind].items()},
        "seed": seed,
    }
    return json.loads(json.dumps(settings))


def train(options: dict[str, Any], loss: str, kind: str, seed: int) -> Path:
    """One run, in a process of its own."""
    torch.set_num_threads(options["threads"])
    silence_lightning()
    warnings.simplefilter("ignore")
    task = make_task(options)
    pl.seed_everything(seed, verbose=False)
    variant = LOSSES[loss]
    module = ASKModule(
        task.make_model(task.learning_rate),
        variant.loss(**{"positives": "diagonal", **variant.options, **variant.grid[0]}),
        ids="clip_id",
        caption_ids="caption_id",
    )
    refresh = KnowledgeRefreshCallback(
        **{**task.refresh, "save_knowledge": False, **variant.refresh, **REFRESHES[kind]}
    )
    measure = Measure(refresh)
    trainer = pl.Trainer(
        accelerator=task.accelerator,
        devices=1,
        max_epochs=task.max_epochs,
        callbacks=[refresh, measure],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **task.trainer_options,
    )
    started = time.perf_counter()
    trainer.fit(module, datamodule=task.make_data(seed))
    result = {
        "settings": settings_of(options, task, loss, kind, seed),
        "seconds": time.perf_counter() - started,
        "epochs": measure.epochs,
    }
    path = run_path(options, loss, kind, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(json.dumps(result), encoding="utf-8")
    return path


def is_done(options: dict[str, Any], task: Task, loss: str, kind: str, seed: int) -> bool:
    path = run_path(options, loss, kind, seed)
    if not path.exists():
        return False
    stored = json.loads(path.read_text(encoding="utf-8"))["settings"]
    return stored == settings_of(options, task, loss, kind, seed)


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Means over epochs and seeds, and the spread over seeds of what is compared."""

    def over_epochs(run: dict[str, Any], *names: str) -> float:
        return statistics.mean(epoch[name] for epoch in run["epochs"] for name in names)

    recalls = [over_epochs(run, "recall_audio", "recall_text") for run in runs]
    best = [100 * max(epoch["validation"] for epoch in run["epochs"]) for run in runs]
    return {
        "seeds": len(runs),
        "encoded_per_epoch": statistics.mean(
            run["epochs"][-1]["encoded"] / len(run["epochs"]) for run in runs
        ),
        "recall": statistics.mean(recalls),
        "recall_std": statistics.stdev(recalls) if len(runs) > 1 else 0.0,
        "recall_last": statistics.mean(
            (run["epochs"][-1]["recall_audio"] + run["epochs"][-1]["recall_text"]) / 2 for run in runs
        ),
        "rdm": statistics.mean(over_epochs(run, "rdm_audio", "rdm_text") for run in runs),
        "validation": statistics.mean(best),
        "validation_std": statistics.stdev(best) if len(runs) > 1 else 0.0,
        "seconds": statistics.mean(run["seconds"] for run in runs),
    }


def write_results(
    options: dict[str, Any], task: Task, results: dict[str, dict[str, dict[str, float]]]
) -> None:
    output = Path(options["output"])
    (output / "frontier.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    columns = [
        "loss",
        "refresh",
        "encoded per epoch (share of the source)",
        "neighbours found",
        "in the last epoch",
        "RDM",
        "validation mean recall (%)",
        "seeds",
    ]
    lines = [
        [
            loss,
            kind,
            f"{found['encoded_per_epoch']:.3f}",
            f"{found['recall']:.3f} ± {found['recall_std']:.3f}",
            f"{found['recall_last']:.3f}",
            f"{found['rdm']:.2e}",
            f"{found['validation']:.2f} ± {found['validation_std']:.2f}",
            found["seeds"],
        ]
        for loss, kinds in results.items()
        for kind, found in kinds.items()
    ]
    table = (
        f"{task.name}: {task.sizes()} pairs, {task.max_epochs} epochs\n\n{markdown_table(columns, lines)}\n"
    )
    (output / "frontier.md").write_text(table, encoding="utf-8")
    print(f"\n{table}")
    draw(output, results)


_MARKERS = "osDv^<>PXph*"


def draw(output: Path, results: dict[str, dict[str, dict[str, float]]]) -> None:
    figure = new_figure(5.2 * len(results), 7.2)
    axes = figure.subplots(2, len(results), squeeze=False)
    panels = (
        ("recall", "recall_std", "true neighbours found among stored rows"),
        ("validation", "validation_std", "validation mean recall (%)"),
    )
    for column, (loss, kinds) in enumerate(results.items()):
        for row, (name, spread, label) in enumerate(panels):
            panel = axes[row][column]
            for number, (kind, found) in enumerate(kinds.items()):
                family = kind.split(" =")[0].split(",")[0]
                panel.errorbar(
                    max(found["encoded_per_epoch"], 1e-3),
                    found[name],
                    yerr=found[spread],
                    fmt=_MARKERS[number % len(_MARKERS)],
                    color=FAMILIES[family],
                    capsize=2,
                    markersize=7,
                    alpha=0.8,
                    label=kind,
                )
            panel.set_xscale("log")
            panel.set_xlabel("rows encoded per epoch, share of the source")
            panel.set_ylabel(label)
            panel.grid(alpha=0.25)
            if row == 0:
                panel.set_title(loss)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6, fontsize=8)
    for suffix in ("svg", "png"):
        figure.savefig(output / f"frontier.{suffix}", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", choices=["soundscapes", "captions"], default="soundscapes")
    parser.add_argument("--captions", type=Path, help="folder of the captions task")
    parser.add_argument("--output", type=Path, help="folder of runs and results")
    parser.add_argument("--losses", nargs="+", choices=["Teacher", "ASK"], default=["Teacher", "ASK"])
    parser.add_argument("--refreshes", nargs="+", choices=list(REFRESHES), default=list(REFRESHES))
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument(
        "--epochs", type=int, default=0, help="epochs of each run; default 30, or few if quick"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument("--quick", action="store_true", help="as small as the task gets, to see that it runs")
    parsed = parser.parse_args()
    if parsed.data == "captions" and parsed.captions is None:
        parser.error("--data captions needs --captions FOLDER")
    options = vars(parsed)
    suffix = "-quick" if parsed.quick else ""
    options["output"] = str(parsed.output or Path("runs/refresh_frontier") / f"{parsed.data}{suffix}")
    options["captions"] = str(parsed.captions)
    Path(options["output"]).mkdir(parents=True, exist_ok=True)
    task = make_task(options)
    task.prepare_runs(parsed.threads, print)
    todo = [
        (loss, kind, seed)
        for seed in range(parsed.seeds)
        for loss in parsed.losses
        for kind in parsed.refreshes
        if not is_done(options, task, loss, kind, seed)
    ]
    print(f"{len(todo)} runs to do")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(parsed.jobs, mp_context=context) as pool:
        futures = {pool.submit(train, options, *job): job for job in todo}
        for number, future in enumerate(as_completed(futures), start=1):
            future.result()
            loss, kind, seed = futures[future]
            print(f"{number} of {len(todo)}: {loss}, {kind}, seed {seed}", flush=True)
    results = {
        loss: {
            kind: summary(
                [
                    json.loads(run_path(options, loss, kind, seed).read_text(encoding="utf-8"))
                    for seed in range(parsed.seeds)
                ]
            )
            for kind in parsed.refreshes
        }
        for loss in parsed.losses
    }
    write_results(options, task, results)


if __name__ == "__main__":
    sys.exit(main())

"""`ask-lightning inspect`: what there is in data, before anything is trained on them."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentParser

from ask_lightning.cli.errors import UsageError, check_writable, construct, usage_errors
from ask_lightning.cli.quiet import quiet_lightning
from ask_lightning.cli.run_options import FlagParser, RunOptions, repeated_flags
from ask_lightning.data import FolderData, RetrievalDataModule, log_mel
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.clips import Clip, abbreviate
from ask_lightning.data.summary import DataSummary, spread, summarize
from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.optional_imports import import_optional
from ask_lightning.utilities.text_tables import Cell, print_table

_SPECTROGRAMS = 3
# Encoders of files add a few samples to a clip of ten seconds.
_TOLERATED_SECONDS = 0.1


def inspect_data(arguments: Sequence[str]) -> DataSummary:
    """Print what there is in the data of a config, and draw a picture of it.

    Args:
        arguments: What follows `inspect` on the command line: `--config`, `--data.X`, `--json`, `--picture`.

    Returns:
        What there is.

    Raises:
        UsageError: The command line cannot be used.
    """
    parser = FlagParser(
        prog="ask-lightning inspect",
        usage="%(prog)s --config NAME [--data.root FOLDER] [--data.X X] [--demo] [--json] [--picture FILE]",
        description="What there is in data: lengths, rates, captions, copies, leaks, and a picture.",
        epilog="`ask-lightning fit --data.help FolderData` explains `--data.X` of your own recordings.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--picture", type=Path, help="path of the picture (default: inspect.png in --run)")
    own, others = parser.parse_known_args(arguments)
    options = RunOptions.parse(others)
    options.check_flags("inspect")
    picture = own.picture or options.run_folder / "inspect.png"
    check_writable(picture, "Name a place for the picture by `--picture FILE`.")
    quiet_lightning()
    datasets = _datasets(options)
    progress = (lambda clips: clips) if own.json else _with_progress
    found = summarize(datasets, progress)
    _draw(found, datasets, picture)
    if own.json:
        print(json.dumps({**found.as_dict(), "picture": str(picture)}, indent=2))
        return found
    _print(found, datasets)
    print(f"The picture is {picture}.")
    print(f"Next: ask-lightning fit {repeated_flags(options)}")
    return found


def _datasets(options: RunOptions) -> dict[str, ClipDataset]:
    """The datasets of a config, without its model."""
    section = options.compose().config.get("data")
    flags = options.lightning_arguments
    strange = [flag for flag in flags if flag.startswith("--") and not flag.startswith("--data")]
    strange += sorted(f"--{name}" for name in options.given & {"ckpt_path", "monitor", "weights"})
    if strange:
        raise UsageError(
            f"`inspect` looks at data alone, so {', '.join(strange)} has no effect. Leave it out."
        )
    if section is None and not flags:
        raise UsageError("`inspect` needs data: pass `--config my_recordings --data.root FOLDER`.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    parser.add_instantiator(construct, object)
    with usage_errors():
        config = ["--data", json.dumps(section)] if section is not None else []
        data = parser.instantiate_classes(parser.parse_args([*config, *flags]))["data"]
        datasets = _split_or_whole(data) if isinstance(data, RetrievalDataModule) else {}
    found = {split: dataset for split, dataset in datasets.items() if isinstance(dataset, ClipDataset)}
    if not found:
        raise UsageError(f"`inspect` looks at clips in files, but {type(data).__name__} has none.")
    return found


def _split_or_whole(data: RetrievalDataModule) -> Mapping[str, Any]:
    """The datasets by split; of clips that cannot be divided, such as a handful, the whole as `"all"`."""
    try:
        return data.datasets
    except ValueError as error:
        if not isinstance(data, FolderData):
            raise
        whole = data.ordered_dataloader("all").dataset  # raises what is wrong with the files themselves
        print(f"warning: The clips have no splits, so they are one, `all`: {error}", file=sys.stderr)
        return {"all": whole}


def _with_progress(clips: Sequence[Clip]) -> Iterable[Clip]:
    """The clips, while a bar in the terminal shows the time left."""
    console = import_optional("rich.console").Console(stderr=True)
    tracked: Iterable[Clip] = import_optional("rich.progress").track(
        clips, "reading", console=console, disable=not sys.stderr.isatty()
    )
    return tracked


def _print(found: DataSummary, datasets: Mapping[str, ClipDataset]) -> None:
    """Print the tables and what may have to be mended."""
    columns = [
        "split",
        "clips",
        "captions",
        "hours",
        "seconds",
        "Hz",
        "channels",
        "captions per clip",
        "words",
    ]
    rows: list[list[Cell]] = []
    for name, split in found.splits.items():
        rows.append(
            [
                *(name, split.clips, split.captions, split.hours, _range(split.seconds)),
                *(_counts(split.sample_rates), _counts(split.channels), _counts(split.captions_per_clip)),
                _range(split.caption_words),
            ]
        )
    print_table(columns, rows, float_format=".2f")
    print("Of seconds and words: least, median, most. Behind ×: number of clips.")
    heard = {name: dataset.audio.seconds for name, dataset in datasets.items()}
    longest = {name: seconds + _TOLERATED_SECONDS for name, seconds in heard.items()}
    longer = sum(length > longest[name] for name, split in found.splits.items() for length in split.seconds)
    if longer:
        shown = " or ".join(f"{seconds:g}" for seconds in sorted(set(heard.values())))
        print(
            f"{longer} clips are longer than the {shown} s that are heard of a clip: training takes them "
            "anywhere in it, `test`, `encode` and so `search` in the middle. `--data.seconds` sets them."
        )
    for clips, text in (
        (found.same_audio, "sets of clips have the same bytes"),
        (found.audio_in_two_splits, "of them reach over two splits: results on these say nothing"),
    ):
        if clips:
            print(f"{len(clips)} {text}: {abbreviate([' = '.join(names) for names in clips])}.")
    if found.repeated_captions:
        print(
            f"{found.repeated_captions} captions have the words of a caption of another clip. A test takes "
            "their own clip alone for right: recalls are lower than by ear, A2T R@1 above all."
        )
    if found.captions_in_two_splits:
        names = found.captions_in_two_splits
        print(f"{len(names)} evaluation clips have the words of a training caption: {abbreviate(names)}.")
    if found.unreadable:
        print(f"{len(found.unreadable)} clips cannot be read: {abbreviate(list(found.unreadable.values()))}")


def _range(values: Sequence[float]) -> str:
    return " · ".join(f"{value:g}" for value in spread(values).values())


def _counts(counts: Counter[int]) -> str:
    most = counts.most_common(3)
    listed = ", ".join(f"{value}" if len(counts) == 1 else f"{value} ×{number}" for value, number in most)
    return f"{listed} …" if len(counts) > len(most) else listed


def _draw(found: DataSummary, datasets: dict[str, ClipDataset], path: Path) -> None:
    """Draw lengths, words and a few spectrograms."""
    matplotlib = import_optional("matplotlib")
    matplotlib.use("Agg")
    figure, axes = import_optional("matplotlib.pyplot").subplots(2, 3, figsize=(13, 7))
    splits = list(found.splits.values())
    for axis, values, label in (
        (axes[0, 0], [split.seconds for split in splits], "seconds of a clip"),
        (axes[0, 1], [split.caption_words for split in splits], "words of a caption"),
    ):
        axis.hist(values, bins=20, stacked=True, label=list(found.splits))
        axis.set(xlabel=label, ylabel="number")
        axis.legend()
    words = found.words[::-1]
    axes[0, 2].barh([word for word, _ in words], [count for _, count in words])
    axes[0, 2].set(xlabel="most frequent words")
    dataset = next(iter(datasets.values()))
    chosen = dataset.clips[:: max(1, len(dataset.clips) // _SPECTROGRAMS)][:_SPECTROGRAMS]
    for axis in axes[1]:
        axis.axis("off")
    sounds: ClipDataset = dataset.variant(crop="center", clips=chosen)
    first_items = _first_items(chosen)
    for axis, clip, item in zip(axes[1], chosen, first_items, strict=False):
        sound = sounds[item]
        spectrogram = sound.get("log_mel")
        if spectrogram is None:
            waveform: torch.Tensor = sound["waveform"][: max(int(sound["num_samples"]), 1024)]
            spectrogram = log_mel(waveform, sample_rate=dataset.audio.sample_rate)
        axis.imshow(spectrogram.T.numpy(), origin="lower", aspect="auto")
        axis.set_title(clip.captions[0][:50], fontsize=9)
    figure.tight_layout()
    with usage_errors(), atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100, format=path.suffix.removeprefix(".") or "png")
    import_optional("matplotlib.pyplot").close(figure)


def _first_items(clips: Sequence[Clip]) -> list[int]:
    """The numbers of the first items of clips, which have one for each caption."""
    numbers, number = [], 0
    for clip in clips:
        numbers.append(number)
        number += len(clip.captions)
    return numbers

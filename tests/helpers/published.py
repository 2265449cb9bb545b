"""The three published datasets in small: where their data modules find what the fixture `written` wrote."""

from ask_lightning.data import AudioCapsData, AudioOptions, ClothoData, WavCaps

SMALL = {"num_train": 8, "num_val": 3, "num_test": 2, "seconds": 0.8}


def audiocaps(folder, **options):
    return AudioCapsData(
        folder / "audiocaps", **{"seconds": 0.5, "batch_size": 4, "check_counts": False, **options}
    )


def clotho(folder, **options):
    return ClothoData(folder / "clotho", **{"batch_size": 4, "check_counts": False, **options})


def wavcaps(folder, **options):
    return WavCaps(folder / "wavcaps", AudioOptions(seconds=0.5), **{"check_counts": False, **options})

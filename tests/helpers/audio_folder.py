"""A folder of audio files as a dataset."""

from ask_lightning.data import AudioFolder


def folder_of(root, *names, **options) -> AudioFolder:
    """The files of a folder, each with a caption and listed in a CSV."""
    rows = ["filename,caption"]
    for place, name in enumerate(names):
        rows.append(f"{name},what {name} sounds like" + " again" * names[:place].count(name))
    (root / "clips.csv").write_text("\n".join(rows))
    return AudioFolder(root, root / "clips.csv", **options)

"""Upload of models to the Hugging Face hub."""

from pathlib import Path

from ask_lightning.models.exported import CALIBRATION_FILE
from ask_lightning.utilities.optional_imports import import_optional

# Files that only some models have; those of an earlier model would be taken for those of the later one.
_OF_A_MODEL = [CALIBRATION_FILE, "results.json", "results-*.json", "tokenizer.json", "tokenizer_config.json"]


def upload_folder(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder to a repository of the Hugging Face hub, which is made if it does not exist.

    Results, calibration and tokenizer of an earlier model are removed from it where the folder has none.

    Args:
        folder: Folder of a model, as `save_pretrained` writes it.
        repository: Name of the repository, such as `"me/sounds"`.
        private: Whether a new repository is private. Of one that exists nothing changes.

    Returns:
        Address of the repository.

    Raises:
        OSError: The hub cannot be reached or refuses the folder, or the name is none of a repository; the
            message says how to log in and go on.
    """
    hub = import_optional("huggingface_hub")
    api = hub.HfApi()
    try:
        created = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=Path(folder),
            commit_message="Upload a model of ask-lightning",
            delete_patterns=_OF_A_MODEL,
        )
    except Exception as error:  # an HTTP client that cannot connect raises classes of its own
        reason = str(error).strip().partition("\n")[0]
        raise OSError(
            f"The model was not uploaded to {repository!r} ({reason}). Log in by `hf auth login`, or set "
            "HF_TOKEN."
        ) from error
    return str(created)

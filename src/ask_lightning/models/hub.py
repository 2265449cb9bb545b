"""Upload of models to the Hugging Face hub."""

from pathlib import Path

from ask_lightning.utilities.optional_imports import import_optional


def upload_folder(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder to a repository of the Hugging Face hub, which is made if it does not exist.

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
            repo_id=repository, folder_path=Path(folder), commit_message="Upload a model of ask-lightning"
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(
            f"The model was not uploaded to {repository!r} ({reason}). Log in by `hf auth login`, or set "
            "HF_TOKEN."
        ) from error
    return str(created)

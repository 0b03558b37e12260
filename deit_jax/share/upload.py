"""A folder to the Hugging Face hub, by its own client."""

import re
from pathlib import Path
from typing import Any

from deit_jax.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
MISSING = "the hub needs pip install 'deit_jax[hub]'"


def check_name(repository: str) -> None:
    """Raise UserError for what is no name of a repository."""
    if not NAME.fullmatch(repository) or len(repository) > 96 or re.search(r"--|\.\.", repository):
        raise UserError(f"{repository}: a repository is ORG/NAME, of letters, digits, - _ and .")


def open_hub() -> Any:
    """Return the hub's client, of who is logged in; raise UserError where nobody is."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise UserError(MISSING) from error
    api = huggingface_hub.HfApi()
    try:
        api.whoami()
    except Exception as error:  # the client's own, and its HTTP library's
        raise UserError(
            f"the hub does not know you ({_line(error)}); `hf auth login`, or set HF_TOKEN to a "
            "token that may write; --dry-run writes the folder without it"
        ) from error
    return api


def upload(api: Any, folder: Path, repository: str, private: bool, message: str) -> str:
    """Make the repository if it is not there, add a commit with the folder; return its address."""
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        said = api.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message=message
        )
    except Exception as error:
        raise UserError(f"{repository}: was not written to the hub ({_line(error)})") from error
    return str(getattr(said, "repo_url", "") or f"{api.endpoint}/{repository}")


def _line(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.200}"

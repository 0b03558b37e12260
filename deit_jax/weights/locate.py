"""Where weights lie: a path, perhaps with the place in a file, or the Hugging Face hub."""

from pathlib import Path, PurePath

from deit_jax.errors import UserError
from deit_jax.storage import backend, check_scheme, exists, local, to_path
from deit_jax.weights import readers

HUB = "hf-hub:"
_BESIDE = ("config.json", "preprocessor_config.json")  # what a folder says of its weights


class WeightsError(UserError, ValueError):
    """Weights that cannot be used as asked."""


def split_key(source: str) -> tuple[str, str]:
    """Return the file or folder in FILE::KEY and which weights in it are meant, "" for any."""
    if "::" not in source or exists(to_path(source)):
        return source, ""
    place, _, key = source.rpartition("::")
    return place, key


def is_run(path: PurePath) -> bool:
    """Return whether a path is the workdir of a `deit train`."""
    place = backend(path)
    names = set(place.names(path))
    return "classes.json" in names and not names & set(readers.IN_FOLDER)


def locate(source: str) -> PurePath:
    """Return where the weights lie, downloaded if they are on the Hugging Face hub."""
    if not source.startswith(HUB):
        check_scheme("weights", source)
        path = to_path(source)
        if backend(path).why_no_runs:  # nor can Orbax read there
            path = local(path)
        if exists(path):
            return path
        raise WeightsError(f"{source}: no such file or folder")
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise WeightsError(f"{source}: needs pip install 'deit_jax[hub]'") from error
    repository, _, revision = source.removeprefix(HUB).partition("@")
    try:
        for name in readers.IN_FOLDER:  # older repositories hold the same weights twice
            folder = Path(
                huggingface_hub.snapshot_download(
                    repository, revision=revision or None, allow_patterns=[name, *_BESIDE]
                )
            )
            if (folder / name).exists():
                break
    except Exception as error:  # the client's own, its HTTP library's and the operating system's
        reason = " ".join(str(error).split())
        raise WeightsError(
            f"{source}: cannot be downloaded ({reason:.300}); `hf download {repository}`, where "
            "there is a network, puts it into the cache at HF_HOME, or name a file that is here"
        ) from error
    return folder

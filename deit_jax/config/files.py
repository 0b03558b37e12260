"""Config files by name: as given, or among those that come with the package."""

from pathlib import Path

from deit_jax import configs

FOLDER = "configs"  # what README calls the folder, also where it is not: configs/deit.py


def shipped() -> dict[str, Path]:
    """Return the config files that come with deit_jax, by name."""
    folder = Path(configs.__path__[0])
    return {p.name: p for p in sorted(folder.glob("*.py")) if not p.name.startswith("_")}


def locate(name: str) -> str:
    """Return the path of a config file.

    What is there is meant as it is given; else `deit.py` and `configs/deit.py` mean the file that
    comes with deit_jax. A name that is neither is returned as it is.
    """
    path = Path(name)
    ours = shipped().get(path.name)
    if ours is None or path.exists() or path.parts not in ((path.name,), (FOLDER, path.name)):
        return name
    return str(ours)

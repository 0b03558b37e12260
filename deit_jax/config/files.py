"""Config files by name: as given, or among those that come with the package."""

import importlib.util
import sys
from pathlib import Path

from ml_collections import ConfigDict

from deit_jax import configs
from deit_jax.errors import UserError

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


def located(text: str) -> str:
    """Return FILE[:ARGS] with the path of the file; see locate."""
    name, colon, arguments = text.partition(":")
    return f"{locate(name)}{colon}{arguments}"


def look_beside() -> None:
    """Let a config file import what lies beside it where the command runs."""
    if str(Path.cwd()) not in sys.path:  # last, so that no folder there hides a package
        sys.path.append(str(Path.cwd()))


def is_there(text: str) -> bool:
    """Return whether there is the file of FILE[:ARGS]."""
    return Path(located(text).partition(":")[0]).is_file()


def none_such(name: str) -> str:
    """Return what to say of a config file that is not there."""
    return (
        f"{name}: no such file below {Path.cwd()}, nor among those of deit_jax "
        f"({', '.join(shipped())})"
    )


def config_of(given: ConfigDict | str | Path) -> ConfigDict:
    """Return a config as it is, or that of FILE[:ARGS] as --config reads it; raise UserError."""
    if isinstance(given, ConfigDict):
        return given
    name, colon, arguments = located(str(given)).partition(":")
    if not Path(name).is_file():
        raise UserError(none_such(name))
    look_beside()
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    if spec is None or spec.loader is None:
        raise UserError(f"{name}: not a Python file; a config file ends with .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*([arguments] if colon else []))
    except Exception as error:  # the config file is a program, and may raise anything
        first = next(iter(str(error).splitlines()), "")
        raise UserError(f"{given}: {type(error).__name__}: {first}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{given}: its get_config() returns no ConfigDict")
    return config.lock()

"""Functions by their name, `module:function`, of an installed module or one that lies here."""

import importlib
from pathlib import Path
from typing import Any

from deit_jax.config.files import look_beside
from deit_jax.errors import UserError
from deit_jax.teachers.programs import first_line


def call_function(asked: str) -> Any:
    """Return what the function in KIND:module:function returns; raise UserError where it cannot."""
    module_name, _, name = asked.partition(":")[2].partition(":")
    if not module_name or not name:
        kind = asked.partition(":")[0]
        raise UserError(f"{asked}: write {kind}:MODULE:FUNCTION, as in {kind}:my_teachers:make")
    look_beside()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise UserError(
                f"{asked}: there is no module {missing}, neither installed nor in {Path.cwd()}"
            ) from error
        raise UserError(f"{asked}: {module_name} needs {missing}, which is missing") from error
    except Exception as error:  # the module is a program, and may raise anything
        kind = type(error).__name__
        raise UserError(
            f"{asked}: importing {module_name} fails: {kind}: {first_line(error)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        what = "has no" if function is None else "has, but not as a function,"
        raise UserError(f"{asked}: {module_name} {what} {name}; name one of its functions")
    try:
        return function()
    except UserError:
        raise
    except Exception as error:  # as above
        kind = type(error).__name__
        raise UserError(f"{asked}: {name}() fails: {kind}: {first_line(error)}") from error

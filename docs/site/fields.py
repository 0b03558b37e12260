"""The fields of configs/base.py, read from the file: names, defaults, comments, choices."""

import ast
import io
import tokenize
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from deit_jax.config import schema
from deit_jax.configs import base

# The functions of the file that make fields, and what stands before the names in each.
_MODEL, _WHOLE = "get_model_config", "get_config"
_ENDLESS = 1e6  # where a bound is that of int32, of float32 or of memory
TEACHER = "teacher.model"  # has the fields of `model` once more, and is described with them


@dataclass(frozen=True)
class Field:
    """One field: its name with dots, default, comment, and the choices or range that is checked."""

    name: str
    default: str
    comment: str
    values: str

    @property
    def group(self) -> str:
        """Return what stands before the last dot; "" of a field at the top."""
        return self.name.rpartition(".")[0]


def read(path: Path | None = None) -> tuple[list[Field], dict[str, str]]:
    """Return the fields in the order of the file, and the comments of groups.

    A comment is of the line that it ends, or of the line below it.
    """
    text = (path or Path(base.__file__)).read_text()
    comments = _comments(text)
    config, lines = base.get_config(), text.splitlines()
    found: dict[str, str] = {}
    groups: dict[str, str] = {}
    for function in ast.parse(text).body:
        if not isinstance(function, ast.FunctionDef) or function.name not in (_MODEL, _WHOLE):
            continue
        for line in function.body:
            if not isinstance(line, ast.Assign):
                continue
            name = ast.unparse(line.targets[0]).partition(".")[2]
            if not name:
                continue
            name = f"model.{name}" if function.name == _MODEL else name
            said = _said(line, comments, lines)
            if isinstance(_at(config, name), ConfigDict):
                groups[name] = said
            elif said or name not in found:
                found[name] = said
    return [_field(name, config, said) for name, said in found.items()], groups


def _comments(text: str) -> dict[int, tuple[str, bool]]:
    """Return the comment of each line that has one, and whether it has the line for itself."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {
        token.start[0]: (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _said(line: ast.Assign, comments: dict[int, tuple[str, bool]], lines: list[str]) -> str:
    said, number = [], line.lineno - 1
    while number in comments and comments[number][1] and lines[number - 1].strip():
        said.insert(0, comments[number][0])
        number -= 1
    if said and said[-1].endswith(":"):  # the heading of what follows: "Vision transformers:"
        said = []
    ends = [comments[n][0] for n in range(line.lineno, (line.end_lineno or 0) + 1) if n in comments]
    return " ".join([*said, *ends])


def _at(config: ConfigDict, name: str):
    for key in name.split("."):
        config = config[key]
    return config


def _field(name: str, config: ConfigDict, comment: str) -> Field:
    value = _at(config, name)
    return Field(name, "None" if value is None else _short(value), comment, _values(name))


def _short(value) -> str:
    if isinstance(value, tuple):
        inner = ", ".join(map(_short, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return f"{value:g}" if isinstance(value, float) and value % 1 else repr(value)


def _values(name: str) -> str:
    if name in schema.CHOICES:
        return ", ".join(schema.CHOICES[name])
    if name not in schema.RANGES:
        return ""
    return _range(schema.RANGES[name]) + (", or None" if name in schema.OPTIONAL else "")


def _range(held: schema.Range) -> str:
    if isinstance(held, schema.Sides):
        return f"{held.low} … {held.high}, or (height, width)"
    low, high = (f"{x:g}" if abs(x) < _ENDLESS else "" for x in (held.low, held.high))
    said = f"above {low}" if held.above else low
    said += (
        f" … {'below ' if held.below else ''}{high}" if high else "" if held.above else " or more"
    )
    many = {None: "", schema.ANY: "numbers, each "}.get(
        held.length, f"{held.length} numbers, each "
    )
    return many + said

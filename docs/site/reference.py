"""The pages that are made of the code: every field, every command, the Python API."""

import ast
import contextlib
import html
import importlib
import io
import re
from pathlib import Path

import fields
import links

import deit_jax
from deit_jax import analysis
from deit_jax.cli import COMMANDS
from deit_jax.config import schema

_TEACHER = (
    "The same fields as [model](#model), of a teacher that is trained first or is asked by name."
)


def _head(page: str) -> str:
    """Return what stands above a page that is made of the code."""
    return (Path(__file__).parent / f"{page}.md").read_text()


def config_page() -> str:
    """Return the page of all fields of configs/base.py."""
    found, groups = fields.read()
    parts = [_head("config")]
    for group in dict.fromkeys(["", *groups]):
        members = [field for field in found if field.group == group]
        name = group or "The run"
        said = groups.get(group, "")
        if group == fields.TEACHER:
            said = _TEACHER
        parts.append(f"## {name}\n\n{said and said[0].upper() + said[1:]}\n")
        if members:
            parts.append(_table(members))
    return "\n".join(parts)


def _table(members: list[fields.Field]) -> str:
    rows = ["| field | default | may be | |", "|---|---|---|---|"]
    for field in members:
        again = ' <span title="may change when a run goes on">↻</span>'
        sign = again if field.name in schema.MAY_CHANGE else ""
        name = f'<a id="{field.name}"></a>`{field.name}`{sign}'
        rows.append(
            f"| {name} | `{field.default}` | {_cell(field.values)} | {_cell(field.comment)} |"
        )
    return '<div class="fields" markdown>\n\n' + "\n".join(rows) + "\n\n</div>\n"


# What is written as one writes it: names of fields and files, values with signs in them.
_LITERAL = re.compile(
    r"`[^`]+`|\bdocs/\w+\.md\b|--[\w.]+|\b[a-z_]+(?:\.[a-z_]+)+\b(?:/\w+)*|\b\w+/[\w/]+\.py\b"
    r"|\b[A-Za-z_-]+:[A-Z]+(?:[:/\[@]+[A-Z]+\]?)*|\w+(?:_\w+)+|\b[\w.*\[\]-]+[=*][\w:.,=*]+"
)


def _cell(text: str) -> str:
    """Return a comment as Markdown, what is to be typed as code and pages as links."""

    def mark(match: re.Match) -> str:
        word = match[0]
        if page := re.fullmatch(r"docs/(\w+\.md)", word):
            return f"[{page[1].removesuffix('.md')}]({page[1]})"
        return word if word.startswith("`") else f"`{word}`"

    parts, end = [], 0
    for match in _LITERAL.finditer(text):
        parts += [html.escape(text[end : match.start()], quote=False), mark(match)]
        end = match.end()
    parts.append(html.escape(text[end:], quote=False))
    return re.sub(r"\|", "&#124;", "".join(parts))


def help_of(command: str) -> str:
    """Return what `deit COMMAND --help` prints."""
    said = io.StringIO()
    main = importlib.import_module(f"deit_jax.cli.{command}").main
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main(["--help"])
    return said.getvalue()


def commands_page(pages: dict[str, str]) -> str:
    """Return the page of all commands; `pages` are the others, to say where each is used."""
    rows = [f"| [`deit {name}`](#deit-{name}) | {entry.help} |" for name, entry in COMMANDS.items()]
    parts = [_head("commands"), "| command | |\n|---|---|\n" + "\n".join(rows) + "\n"]
    for name in COMMANDS:
        used = [
            f"[{_title(text)}]({place})"
            for place, text in pages.items()
            if re.search(rf"\bdeit {name} ", text)
        ]
        parts.append(f"## deit {name}\n")
        parts.append(f"```text\n{_trimmed(help_of(name))}\n```\n")
        if used:
            parts.append(f"Used in {', '.join(used)}.\n")
    return "\n".join(parts)


def _trimmed(text: str) -> str:
    """Return a help without the library's own flags and without spaces at the ends of lines."""
    ours = text.partition("\nabsl.flags:")[0]
    return "\n".join(line.rstrip() for line in ours.strip().splitlines())


def _title(text: str) -> str:
    first = next(line for line in text.splitlines() if line.startswith("# "))
    return first.removeprefix("# ").replace("`", "")


def api_page() -> str:
    """Return the page of the public names, which mkdocstrings fills."""
    parts = [_head("api"), "## deit_jax\n"]
    for name in deit_jax.__all__:
        if not name.startswith("__"):
            parts.append(_entry(f"{deit_jax._API[name]}.{name}", f"deit_jax.{name}"))
    parts.append(
        "## deit_jax.analysis\n\nViews into a trained DeiT; see [reports](report.md#in-python).\n"
    )
    where = "deit_jax.analysis.attention"
    parts += [_entry(f"{where}.{name}", f"analysis.{name}") for name in analysis.__all__]
    parts.append(
        "## deit_jax.tape\n\nLabel tapes for other programs; see [label tapes](tape.md).\n"
    )
    names = _all_of("deit_jax/tape.py")  # which would import JAX
    parts += [_entry(f"deit_jax.tape.{name}", f"tape.{name}") for name in names]
    return "\n".join(parts)


def _all_of(file: str) -> list[str]:
    for line in ast.parse((links.ROOT / file).read_text()).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "__all__":
            return ast.literal_eval(line.value)
    raise ValueError(f"{file} has no __all__")


def _entry(path: str, shown: str) -> str:
    return f"::: {path}\n    options:\n      heading: {shown}\n      toc_label: {shown}\n"


def file_page(file: str) -> str:
    """Return the page that shows a file of the repository."""
    text = (links.ROOT / file).read_text()
    head = "---\nsearch:\n  exclude: true\n---\n\n"
    if file.endswith(".md"):
        return head + text
    kind = {"py": "python", "sh": "bash", "sbatch": "bash", "yaml": "yaml"}
    language = kind.get(file.rpartition(".")[2], "docker" if "Dockerfile" in file else "text")
    return f"{head}# {file}\n\n````{language}\n{text.rstrip()}\n````\n"

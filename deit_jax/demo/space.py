"""A Hugging Face Space: a folder that holds the page with its weights, and runs by itself."""

import dataclasses
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from deit_jax import __version__
from deit_jax.data.decode import Reading
from deit_jax.demo.examples import Example, write_examples
from deit_jax.demo.models import Model
from deit_jax.demo.page import build
from deit_jax.demo.session import Session, made
from deit_jax.demo.teachers import Found, find_teacher, is_foreign
from deit_jax.errors import UserError
from deit_jax.storage import backend, exists, on_disk, read_json, to_path, write_json, write_text
from deit_jax.teachers.folder import is_folder, write_teacher
from deit_jax.train.load_teacher import foreign_teacher
from deit_jax.train.teacher_spec import sources_of
from deit_jax.weights.exporters import EXPORTERS
from deit_jax.weights.fit import LoadedWeights
from deit_jax.weights.load import load_variables, open_model

DESCRIPTION = "demo.json"
FORMAT = 1
APP = '''"""The page of this Space; `python app.py` serves it on any machine."""

from pathlib import Path

from deit_jax.demo.page import serve
from deit_jax.demo.space import open_space

page = open_space(Path(__file__).parent)
if __name__ == "__main__":
    serve(page)
'''
CARD = """---
title: {quoted}
emoji: 👁️
colorFrom: blue
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
pinned: false
---

# {title}

Drop an image on the page: it shows the answers of {models}, and where the tokens look.
Made by `deit demo --space` of [deit_jax](https://pypi.org/project/deit_jax/) {version}.
On any machine:

    pip install -r requirements.txt
    python app.py

| file | what it is |
|---|---|
{files}

The examples are images of the data that the model was evaluated on: may they be published?
"""
# The hub takes no bytes by git but through LFS.
LARGE_FILES = "".join(
    f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n"
    for ending in ("safetensors", "bin", "png", "jpg", "jpeg", "npy", "webp", "tif", "tiff")
)


def write_space(
    folder: str, models: Sequence[Model], teachers: Sequence[Found | None], topk: int, count: int
) -> Path:
    """Write a Space with the models, their teachers and `count` examples; return its folder.

    Raise UserError where something is in the way, or a teacher cannot be written.
    """
    root = on_disk("--space", folder)
    if exists(root) and backend(root).names(root):
        raise UserError(f"--space={folder}: is not empty; choose another folder")
    backend(root).make_folder(root)
    entries = []
    for number, (model, found) in enumerate(zip(models, teachers, strict=True), 1):
        end = f"_{number}" if len(models) > 1 else ""
        entry = _write_model(root, f"model{end}.safetensors", model)
        if found is not None:
            entry |= _write_teacher(root, f"teacher{end}", found, model.teacher_name)
        entries.append(entry)
    examples = write_examples([model.opened for model in models], count, root)
    described = {
        "format": FORMAT,
        "topk": topk,
        "models": entries,
        "examples": [dataclasses.asdict(example) for example in examples],
    }
    write_json(root / DESCRIPTION, described)
    write_text(root / "app.py", APP)
    write_text(root / "requirements.txt", f"deit_jax[demo]=={__version__}\n")
    write_text(root / ".gitattributes", LARGE_FILES)
    write_text(root / "README.md", _card(entries, bool(examples)))
    return root


def _write_model(root: Path, name: str, model: Model) -> dict[str, Any]:
    EXPORTERS["timm"].write(model.opened, root / name)
    # What the file of weights has no words for: how its images are read.
    reading = dataclasses.asdict(model.opened.reading)
    return {"title": model.title, "weights": name, "several": model.several, "reading": reading}


def _write_teacher(root: Path, name: str, found: Found, called: str) -> dict[str, Any]:
    """Write a teacher, ours as weights and any other as a teacher folder; return its entry."""
    spec, parts = found.spec, sources_of(found.weights)
    if len(parts) > 1:
        raise UserError(
            f"--space: the teacher is {len(parts)} together, {found.weights}, and a Space holds "
            "one; name it with --teacher=…"
        )
    size = spec.image_size if spec.given_size is None else spec.given_size
    if not is_foreign(found.weights):
        name = f"{name}.safetensors"
        known: dict[str, Any] = {"checkpoint": spec.checkpoint, "ema": spec.ema, "dtype": "float32"}
        opened = load_variables(found.weights, default=spec.model_config, **known)
        EXPORTERS["timm"].write(opened, root / name)
        return {"teacher": name, "teacher_size": size, "teacher_name": called}
    if is_folder(found.weights):
        _copy(to_path(found.weights), root / name)
    else:
        given = foreign_teacher(spec, found.weights)
        assert given is not None  # is_foreign says so
        write_teacher(given, root / name, source=found.weights, checked=True)
    return {"teacher": name, "teacher_size": None, "teacher_name": called}


def _copy(source: PurePath, folder: Path) -> None:
    place = backend(source)
    backend(folder).make_folder(folder)
    for name, _ in place.files(source):
        backend(folder).write(folder / name, place.read(source / name))


def _card(entries: Sequence[dict[str, Any]], examples: bool) -> str:
    files = [("app.py", "the page"), (DESCRIPTION, "its models and examples")]
    for entry in entries:
        files.append((entry["weights"], f"weights of {entry['title']}, with timm's names"))
        if "teacher" in entry:
            files.append((entry["teacher"], f"its teacher, {entry['teacher_name']}"))
    files += [("examples/", "images to click on")] if examples else []
    names = " and ".join(entry["title"] for entry in entries)
    rows = "\n".join(f"| {file} | {what} |" for file, what in files)
    title = f"What {names} see{'s' if len(entries) == 1 else ''}"
    known = {"title": title, "quoted": json.dumps(title, ensure_ascii=False), "models": names}
    return CARD.format(**known, gradio=metadata.version("gradio"), version=__version__, files=rows)


def open_space(folder: Path):
    """Return the page in a Space's folder, a gradio.Blocks for `serve`.

    Raise UserError for a folder that `deit demo --space` did not write.
    """
    return build(open_session(folder))


def open_session(folder: Path) -> Session:
    """Return what the page in a Space's folder answers with."""
    if not exists(folder / DESCRIPTION):
        raise UserError(
            f"{folder}: no {DESCRIPTION}; `deit demo --weights=… --space=DIR` writes it"
        )
    described = read_json(folder / DESCRIPTION)
    if described["format"] != FORMAT:
        raise UserError(
            f"{folder}/{DESCRIPTION}: of format {described['format']}, this deit_jax reads "
            f"{FORMAT}; install the version in requirements.txt"
        )
    models = [_open(folder, entry) for entry in described["models"]]
    examples = [Example(**example) for example in described["examples"]]
    return Session(models, described["topk"], folder, examples)


def _open(folder: Path, entry: dict[str, Any]) -> Model:
    told = entry["reading"]
    reading = Reading(**{**told, "fill": tuple(told["fill"])})
    opened: LoadedWeights = dataclasses.replace(
        open_model(folder / entry["weights"]), reading=reading
    )
    found, name = None, entry.get("teacher", "")
    if name:
        size = entry["teacher_size"]
        size = tuple(size) if isinstance(size, list) else size
        found, _ = find_teacher(opened, str(folder / name), size)
    model = made(opened, entry["title"], found, entry["several"])
    model.teacher_name = entry.get("teacher_name", "")
    return model

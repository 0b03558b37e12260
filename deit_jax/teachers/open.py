"""Teachers by what people call them: a folder, a model of timm, a function of their own."""

import dataclasses
import logging

from deit_jax.errors import UserError
from deit_jax.shapes import Size
from deit_jax.storage import exists, read_json, to_path
from deit_jax.teachers.folder import is_folder, open_folder
from deit_jax.teachers.functions import call_function
from deit_jax.teachers.programs import check_answer, check_fields, check_says
from deit_jax.teachers.teacher import Teacher

log = logging.getLogger("deit_jax")

TIMM, TORCH, PYTHON = "timm:", "torch:", "python:"
KINDS = (TIMM, TORCH, PYTHON)


def open_teacher(
    text: str, dtype: str, abstract: bool = False, ema: bool = False
) -> Teacher | None:
    """Return the teacher in a folder or of one of KINDS, computing in `dtype`.

    None for anything else, as weights of deit_jax's own models. `abstract` is for who needs no
    numbers: a folder's are then not read. `ema` takes the moving average in timm:NAME@FILE.
    """
    if text.startswith((TIMM, TORCH)):
        return convert_torch(text, ema=ema).teacher(dtype)
    if text.startswith(PYTHON):
        return in_dtype(open_python(text), dtype)
    return open_folder(text, dtype, abstract) if is_folder(text) else None


def open_python(text: str) -> Teacher:
    """Return what `python:module:function` returns, a Teacher that keeps its contract."""
    made = call_function(text)
    if not isinstance(made, Teacher):
        raise UserError(f"{text}: returns a {type(made).__name__}, not a deit_jax.Teacher")
    check_fields(made)
    answers = check_answer(made)
    for note in check_says(made):
        log.warning("%s: %s", text, note)
    if not made.classes and "logits" in answers:
        count = answers["logits"].shape[1]
        made = dataclasses.replace(made, classes=tuple(f"class {i}" for i in range(count)))
    return made


def in_dtype(teacher: Teacher, dtype: str) -> Teacher:
    """Return a teacher that is given its floats and images in a dtype, as a folder of it is."""
    import jax
    import jax.numpy as jnp

    def cast(x):
        is_float = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jnp.asarray(x, dtype) if is_float else x

    def apply(params, images):
        return teacher.apply(params, images.astype(dtype))

    return dataclasses.replace(teacher, apply=apply, params=jax.tree.map(cast, teacher.params))


def convert_torch(
    text: str,
    num_classes: int | None = None,
    image_size: Size | None = None,
    ema: bool = False,
):
    """Return the network of `timm:`, `torch:` or a Hugging Face folder as a Converted.

    It needs the extra `torch`. `num_classes`, `image_size` and `ema` are timm's alone.
    """
    try:
        import torch  # noqa: F401

        from deit_jax.teachers import torch_convert, torch_sources
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "torchax"):
            raise
        raise UserError(
            f"{text}: needs {error.name}, pip install 'deit_jax[torch]'; a teacher folder that "
            "`deit convert` writes elsewhere needs neither"
        ) from error
    if text.startswith(TIMM):
        source = torch_sources.open_timm(text, num_classes, image_size, ema)
        return torch_convert.convert_module(source)
    if num_classes is not None or image_size is not None or ema:
        raise UserError(f"{text}: --num_classes, --image_size and --ema are for timm:NAME alone")
    if text.startswith(TORCH):
        return torch_convert.convert_module(torch_sources.open_function(text))
    file = to_path(text) / "config.json"
    described = read_json(file) if exists(file) else {}
    if "architecture" in described and "model_type" not in described:
        name = described["architecture"]
        raise UserError(f"{text}: a folder of timm's; write timm:{name}@{text}/model.safetensors")
    if "model_type" not in described:
        raise UserError(f"{text}: no folder of transformers, no config.json says its model_type")
    return torch_convert.convert_module(torch_sources.open_hugging_face(text))

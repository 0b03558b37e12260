"""Any teacher as programs that jax.export keeps: one for each dtype, of any batch, everywhere."""

import dataclasses
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from deit_jax.errors import UserError
from deit_jax.models.liveness import peak_bytes
from deit_jax.models.locations import short_locations
from deit_jax.models.operations import multiply_accumulates
from deit_jax.shapes import sides
from deit_jax.teachers.teacher import FEATURES, LOGITS, Teacher

DTYPES = ("float32", "bfloat16")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PLAIN_SIDE = 224
APART = 1e-3  # of the largest answer: what the other images of a batch may change by rounding
# What a function that JAX traces, or a program that it reads, can raise: anything.
Anything = Exception


@dataclasses.dataclass(frozen=True)
class Written:
    """Programs by dtype, the weights that they take, and what they answer."""

    blobs: dict[str, bytes]
    weights: dict[str, np.ndarray]
    num_classes: int
    feature_width: int | None
    macs: int
    image_bytes: int


def programs_of(teacher: Teacher) -> Written:
    """Return a teacher's programs; raise UserError where its `apply` does not keep the contract."""
    check_fields(teacher)
    flat, rebuild = _flattened(teacher)
    answers = check_answer(teacher)
    blobs = {}
    for dtype in DTYPES:
        inside = jnp.dtype(dtype)

        def call(weights, images, inside=inside):
            return answer(teacher.apply(rebuild(weights), images.astype(inside)))

        shapes = {
            name: jax.ShapeDtypeStruct(x.shape, inside if x.dtype.kind == "f" else x.dtype)
            for name, x in flat.items()
        }
        blobs[dtype] = _exported(teacher, call, shapes)
    logits, features = answers.get(LOGITS), answers.get(FEATURES)
    width = None if features is None else features.shape[1]
    count = 0 if logits is None else logits.shape[1]
    return Written(blobs, flat, count, width, *cost_of(teacher))


def cost_of(teacher: Teacher) -> tuple[int, int]:
    """Return an image's multiply-accumulates, and the bytes of a GPU's memory that it takes.

    They are traced, of images of 224 pixels where the teacher takes any size: a program that was
    exported does not show them any more.
    """
    height, width = sides(teacher.image_size or PLAIN_SIDE)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), _narrow(x)), teacher.params)
    traced = []
    for batch in (1, 4, 8):
        images = jax.ShapeDtypeStruct((batch, height, width, teacher.channels), jnp.float32)
        traced.append(jax.make_jaxpr(teacher.apply)(params, images).jaxpr)
    few, more = (peak_bytes(program, "cuda") for program in traced[1:])
    return multiply_accumulates(traced[0]), max(0, (more - few) // 4)


def _exported(teacher: Teacher, call, shapes) -> bytes:
    """Return a function's serialised program, for any batch."""
    size = teacher.image_size
    height_width = "h, w" if size is None else ", ".join(map(str, sides(size)))
    try:
        shape = export.symbolic_shape(f"b, {height_width}, {teacher.channels}")
        images = jax.ShapeDtypeStruct(shape, jnp.float32)
        with short_locations():
            exported = export.export(jax.jit(call), platforms=PLATFORMS)(shapes, images)
        if any(x.shape[0] != shape[0] for x in exported.out_avals):
            raise ValueError("its answers are not one an image")
        return bytes(exported.serialize())
    except UserError:
        raise
    except Anything as error:
        what = "any number of images" + (" of any size" if size is None else "")
        remedy = "; or say its image_size" if size is None else ""
        raise UserError(
            f"{teacher.name}: apply cannot be traced for {what} ({first_line(error)}); write it "
            f"without numbers that follow from these{remedy}"
        ) from error


def first_line(error: BaseException) -> str:
    """Return what an error says, in a line that is not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0] if lines else type(error).__name__:.240}"


def _flattened(teacher: Teacher):
    """Return the parameters under flat names, floats in float32, and what builds their tree."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(teacher.params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    names = [name or "params" for name in names]
    if len({*names}) != len(names):
        raise UserError(f"{teacher.name}: two of its params have the same path; rename one")
    flat = {}
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise UserError(f"{teacher.name}: its params are shapes alone; give the arrays")
        value = np.asarray(leaf)
        if jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(np.float32)
        value = value.astype({"i8": "i4", "u8": "u4"}.get(value.dtype.str[1:], value.dtype))
        if value.dtype.kind not in "fiub":
            raise UserError(f"{teacher.name}: params {name} is {value.dtype}; give real numbers")
        flat[name] = np.ascontiguousarray(value).reshape(value.shape)

    def rebuild(weights: dict[str, Any]) -> Any:
        return jax.tree_util.tree_unflatten(tree, [weights[name] for name in names])

    return flat, rebuild


def answer(said: Any) -> dict[str, jax.Array]:
    """Return what a teacher's `apply` returned as a dict, in float32."""
    said = said if isinstance(said, dict) else {LOGITS: said}
    return {key: value.astype(jnp.float32) for key, value in said.items()}


def check_fields(teacher: Teacher) -> None:
    """Raise UserError for names and sizes that are none."""
    for key in ("classes", "also_called"):
        names = getattr(teacher, key)
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise UserError(
                f"{teacher.name}: {key}={names!r:.60}: give a list of names, () for none"
            )
    if teacher.image_size is not None and min(sides(teacher.image_size)) < 1:
        raise UserError(
            f"{teacher.name}: image_size={teacher.image_size}: give pixels, None for any size"
        )


def check_answer(teacher: Teacher, batch: int = 2) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of what `apply` answers; raise UserError unless they keep the contract."""
    height, width = sides(teacher.image_size or PLAIN_SIDE)
    images = jax.ShapeDtypeStruct((batch, height, width, teacher.channels), jnp.float32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.float32), teacher.params)
    shapes = jax.tree.map(
        lambda x, leaf: x if _is_float(leaf) else jax.ShapeDtypeStruct(x.shape, _narrow(leaf)),
        shapes,
        teacher.params,
    )
    try:
        said = jax.eval_shape(teacher.apply, shapes, images)
    except UserError:
        raise
    except Anything as error:
        raise UserError(
            f"{teacher.name}: apply(params, images) fails for images "
            f"[{batch} {height} {width} {teacher.channels}] ({first_line(error)}); it must be a "
            "function that JAX can trace"
        ) from error
    answers = said if isinstance(said, dict) else {LOGITS: said}
    known = bool(answers) and {LOGITS, FEATURES} >= answers.keys()
    if not known or not all(map(_fits, answers.values())):
        raise UserError(
            f"{teacher.name}: apply returns {_in_words(said)}, not logits [B K] or a dict of "
            "logits [B K] and features [B D]"
        )
    _check_names(teacher, answers)
    return answers


def check_says(teacher: Teacher) -> tuple[str, ...]:
    """Return notes on what a teacher says of noise; raise UserError for what nobody can learn from.

    That is what is not finite, and an answer to an image that depends on the others of its batch.
    """
    height, width = sides(teacher.image_size or PLAIN_SIDE)
    shape = (3, height, width, teacher.channels)
    first, second, third = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    apply = jax.jit(lambda params, images: answer(teacher.apply(params, images)))
    said = [
        jax.device_get(apply(teacher.params, np.stack([first, other])))
        for other in (second, 3 * third + 2)
    ]
    for key, rows in said[0].items():
        if not np.isfinite(rows).all():
            raise UserError(
                f"{teacher.name}: its {key} of an image of noise are not finite; see its weights"
            )
        if np.abs(rows[0] - said[1][key][0]).max() > APART * max(np.abs(rows).max(), 1e-6):
            raise UserError(
                f"{teacher.name}: its {key} of an image depend on the other images of the batch; a "
                "teacher must answer each by itself"
            )
    return tuple(note for note in (probabilities(said[0].get(LOGITS)),) if note)


def probabilities(logits: np.ndarray | None) -> str:
    """Return a note where what shall be logits are probabilities, "" where they are not."""
    if logits is None or logits.shape[1] < 2 or (logits < 0).any():
        return ""
    if np.abs(logits.sum(1) - 1).max() > 1e-3:
        return ""
    return (
        "its answers are positive and sum to 1: these are probabilities, and soft distillation "
        "takes logits; leave the softmax out"
    )


def _fits(x: Any, batch: int = 2) -> bool:
    kind = getattr(x, "dtype", None)
    is_float = kind is not None and jnp.issubdtype(kind, jnp.floating)
    return is_float and len(x.shape) == 2 and x.shape[0] == batch and x.shape[1] > 0


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _narrow(x: Any) -> Any:
    """Return the dtype that JAX computes in, of whole numbers."""
    return jax.dtypes.canonicalize_dtype(jnp.result_type(x))


def _check_names(teacher: Teacher, answers: dict[str, Any]) -> None:
    logits, named = answers.get(LOGITS), len(teacher.classes)
    if logits is None and named:
        raise UserError(f"{teacher.name}: apply returns no logits for its {named} classes")
    if logits is not None and named not in (0, logits.shape[1]):
        raise UserError(
            f"{teacher.name}: apply returns {logits.shape[1]} logits, and `classes` has {named} "
            "names; they must be as many"
        )
    if len(teacher.also_called) not in (0, named):
        raise UserError(f"{teacher.name}: also_called must have a name for each class, or none")
    for key in ("mean", "std"):
        if len(getattr(teacher, key)) != teacher.channels:
            raise UserError(f"{teacher.name}: {key} must have {teacher.channels} numbers")
        if max(getattr(teacher, key)) > 1:
            raise UserError(
                f"{teacher.name}: {key}={tuple(getattr(teacher, key))}: pixels go from 0 to 1; "
                "divide by 255"
            )


def _in_words(said: Any) -> str:
    """Return what a function returned, by types and shapes."""
    if isinstance(said, dict):
        return "{" + ", ".join(f"{k!r}: {_in_words(v)}" for k, v in said.items()) + "}"
    if isinstance(said, tuple | list):
        return f"a {type(said).__name__} of {len(said)}"
    if hasattr(said, "shape"):
        return f"{said.dtype}[{' '.join(map(str, said.shape))}]"
    return f"a {type(said).__name__}"


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """A program that was read: `apply` of a Teacher."""

    exported: export.Exported

    @classmethod
    def read(cls, blob: bytes, file: PurePath, version: str) -> "Programs":
        """Return the program in a file's content; raise UserError if this JAX cannot read it."""
        try:
            exported = export.deserialize(bytearray(blob))
            assert {"cpu", "tpu"} <= set(exported.platforms)
            exported.mlir_module()  # raises here, in one place, what the first call would
        except Anything as error:
            raise UserError(
                f"{file}: JAX {jax.__version__} cannot read this program, which JAX {version} "
                f"wrote ({first_line(error)}); install that version or a newer one, or convert the "
                "teacher again with this one"
            ) from error
        return cls(exported)

    def apply(self, params: dict[str, Any], images: Any) -> dict[str, jax.Array]:
        """Return the answer to normalised images [B H W C], in float32."""
        # Whoever computes in bfloat16 casts them, and XLA takes both casts for none.
        return self.exported.call(params, images.astype(jnp.float32))

    def check_takes(self, params: dict[str, Any], path: PurePath) -> None:
        """Raise UserError unless the weights are those that the program was made with."""
        (wanted, _), _ = jax.tree_util.tree_unflatten(self.exported.in_tree, self.exported.in_avals)
        have, want = ({k: (x.shape, x.dtype) for k, x in t.items()} for t in (params, wanted))
        if have != want:
            names = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
            raise UserError(
                f"{path}: its weights are not those of its program ({', '.join(names[:3])}); "
                "restore the folder from a copy, or convert the teacher again"
            )

"""A teacher as its maker hands it over."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from deit_jax.shapes import Size

LOGITS, FEATURES = "logits", "features"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A frozen network of any origin: a pure function, its parameters and its conventions.

    `apply(params, images)` takes images [B H W C], float, normalised by `mean` and `std`, and
    returns logits [B K], or {"logits": [B K], "features": [B D]} of which either may be missing. It
    is traced by JAX, for any B, inside the student's step. `params` are a tree of arrays, or of
    their shapes where nobody asks for the numbers.

    `image_size` is the size that it takes, None for any. `classes` are the names of its K classes
    in their order, () for one that gives features alone; `also_called` are other names of the same
    classes, () for none. `multi_label` says whether it answers each class by itself; None: not
    known.

    Where tracing `apply` does not show what it takes, `macs` are the multiply-accumulates of one
    image, of 224 pixels if it takes any size, and `image_bytes` what that image takes of a
    device's memory; `program` is a checksum of
    what it does, besides `params`, for label tapes.
    """

    apply: Callable[[Any, Any], Any]
    params: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: Sequence[str] = ()
    also_called: Sequence[str] = ()
    image_size: Size | None = None
    channels: int = 3
    multi_label: bool | None = None
    name: str = "teacher"
    macs: int | None = None
    image_bytes: int | None = None
    program: str = ""

"""Which parameters a training moves, and how fast: frozen ones, layer decay, multipliers.

A frozen parameter has no gradient, no moments and no average of its own: the step differentiates
with respect to the others alone, so that XLA leaves out what only its gradient would need.
"""

import dataclasses
import fnmatch
import functools
import re
from typing import Any

import jax
import optax

from deit_jax.parallel.sharding import path_name
from deit_jax.step.state import EXTRAS, Everything


def matches(pattern: str, path: str) -> bool:
    """Return whether a shell pattern fits a parameter's path or a leading part of it.

    `*` stands for any characters, `/` too. `blocks_[0-5]` and `blocks_[0-5]/*` fit all of these six
    blocks, `*/norm1` fits every block's, `head*` both heads.
    """
    parts = path.split("/")
    leading = ("/".join(parts[:n]) for n in range(1, len(parts) + 1))
    return any(fnmatch.fnmatchcase(part, pattern) for part in leading)


@dataclasses.dataclass(frozen=True)
class Tuning(Everything):
    """What is trained of a model's parameters, by their paths; by default all, equally fast.

    A parameter moves if it fits one of `trained` and none of `frozen`, patterns of `matches`. Its
    rate is multiplied by the number of the first of `multipliers` that fits and, as in timm, by
    `layer_decay` for every layer between it and the heads; `depth` is the number of blocks.
    """

    trained: tuple[str, ...] = ("*",)
    frozen: tuple[str, ...] = ()
    multipliers: tuple[tuple[str, float], ...] = ()
    layer_decay: float = 1.0
    depth: int = 0

    @property
    def partial(self) -> bool:  # type: ignore[override]
        """Whether anything may be frozen."""
        return bool(self.frozen) or self.trained != ("*",)

    def moves(self, path: str) -> bool:
        """Return whether the parameter at a path is trained, as a distillation's own always are."""
        if path.startswith(f"{EXTRAS}/"):
            return True
        fits = functools.partial(matches, path=path)
        return any(map(fits, self.trained)) and not any(map(fits, self.frozen))

    def rate(self, path: str) -> float:
        """Return what multiplies the learning rate of the parameter at a path."""
        of_pattern = next((n for pattern, n in self.multipliers if matches(pattern, path)), 1.0)
        return of_pattern * self.layer_decay ** (self.depth + 1 - self.layer(path))

    def layer(self, path: str) -> int:
        """Return timm's number of a parameter's layer (`group_matcher`).

        0 for the patches, tokens and positions, then the blocks, the last one with the norm behind
        it; `depth` + 1 for the heads and whatever else there is.
        """
        if block := re.match(r"blocks_(\d+)/", path):
            return int(block[1]) + 1
        if path.startswith("norm/"):
            return self.depth
        stem = ("cls_token", "dist_token", "pos_embed", "patch_embed")
        return 0 if path.startswith(stem) else self.depth + 1

    def moving(self, params) -> Any:
        """Return the tree without what is frozen."""
        return self._those(params, True) if self.partial else params

    def whole(self, moving, params) -> Any:
        """Return all of `params`, those that are trained taken from `moving`."""
        return _joined(moving, self._those(params, False)) if self.partial else moving

    def _those(self, params, moves: bool, above: str = "") -> dict[str, Any]:
        tree = {}
        for key, value in params.items():
            path = f"{above}{key}"
            if not isinstance(value, dict):
                if self.moves(path) == moves:
                    tree[key] = value
            elif inner := self._those(value, moves, f"{path}/"):
                tree[key] = inner
        return tree

    def scaling(self) -> tuple[optax.GradientTransformation, ...]:
        """Return the link that gives every update its parameter's rate; none where all are 1."""
        if not self.multipliers and self.layer_decay == 1.0:
            return ()

        def scale(updates, params=None):
            return jax.tree_util.tree_map_with_path(
                lambda path, update: update * self.rate(path_name(path)), updates
            )

        return (optax.stateless(scale),)


def _joined(some, others) -> dict[str, Any]:
    """Return the union of two trees whose leaves have paths of their own, in the usual order."""
    tree = {}
    for key in sorted(some.keys() | others.keys()):
        if key in some and key in others:
            tree[key] = _joined(some[key], others[key])
        else:
            tree[key] = some[key] if key in some else others[key]
    return tree

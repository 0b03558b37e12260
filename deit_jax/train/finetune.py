"""What of a model a config trains: `optim.tune`, `freeze`, `layer_decay` and `lr_multipliers`."""

import difflib
from collections.abc import Iterable, Sequence

import jax

from deit_jax.errors import UserError
from deit_jax.models.registry import family_of
from deit_jax.parallel.sharding import path_name
from deit_jax.step.state import EVERYTHING, Everything
from deit_jax.step.tuning import Tuning, matches
from deit_jax.train.memory import abstract_variables

# By config.optim.tune: patterns of what is trained besides the heads.
TUNES: dict[str, tuple[str, ...]] = {
    "all": ("*",),
    "linear_probe": (),
    # The reference's --attn-only (arXiv 2203.09795, "Three things everyone should know").
    "attention_only": ("blocks_*/attn", "pos_embed"),
}
LARGEST = 1e6  # multiplier


def tuning_of(optim, init, name: str, model, size) -> Everything:
    """Return what a config's `optim` trains of a model for images of `size`.

    `init` is the config of that name, `name` the model's. Raise UserError for patterns that fit
    nothing, for a training of nothing and for heads that would stay as they were drawn.
    """
    frozen, multipliers = _words(optim.freeze), _multipliers(optim.lr_multipliers)
    if optim.tune == "all" and not frozen and not multipliers and optim.layer_decay == 1.0:
        return EVERYTHING
    if optim.layer_decay != 1.0 and not hasattr(model, "depth"):
        raise UserError(
            f"config.optim.layer_decay={optim.layer_decay}: {name} has no blocks of a transformer; "
            "leave it at 1.0, or give rates with config.optim.lr_multipliers"
        )
    leaves = jax.tree_util.tree_leaves_with_path(abstract_variables(model, size)["params"])
    paths, heads = [path_name(path) for path, _ in leaves], family_of(model).heads
    tuning = Tuning(
        trained=TUNES[optim.tune] + (() if optim.tune == "all" else heads),
        frozen=frozen,
        multipliers=multipliers,
        layer_decay=optim.layer_decay,
        depth=getattr(model, "depth", 0),
    )
    _check_presets(optim.tune, paths, name)
    _check_patterns("freeze", frozen, paths, name)
    moving = [path for path in paths if tuning.moves(path)]
    if not moving:
        raise UserError(
            f"config.optim.freeze={optim.freeze!r}: with optim.tune={optim.tune} nothing of {name} "
            f"is left to train; leave something out of it, as {heads[0]}"
        )
    _check_patterns("lr_multipliers", [p for p, _ in multipliers], paths, name)
    for pattern, _ in multipliers:
        if not any(matches(pattern, path) for path in moving):
            raise UserError(
                f"config.optim.lr_multipliers: {pattern!r} fits only what is frozen; leave it out"
            )
    _check_heads(optim.freeze, init.head, [p for p in paths if not tuning.moves(p)], heads)
    return tuning


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (word.strip() for word in text.split(","))))


def _multipliers(text: str) -> tuple[tuple[str, float], ...]:
    """Return the pairs of `head*=10,patch_embed=0.1`."""
    pairs = []
    for word in _words(text):
        pattern, _, number = word.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not pattern or not 0 < value <= LARGEST:
            raise UserError(
                f"config.optim.lr_multipliers={text!r}: {word!r} is no PATTERN=NUMBER, the number "
                f"above 0 and at most {LARGEST:g}, as head*=10 is; to freeze there is optim.freeze"
            )
        pairs.append((pattern.strip(), value))
    return tuple(pairs)


def _check_presets(tune: str, paths: Sequence[str], name: str) -> None:
    for pattern in TUNES[tune]:
        if not any(matches(pattern, path) for path in paths):
            part = pattern.removeprefix("blocks_*/")
            raise UserError(
                f"config.optim.tune={tune}: {name} has no {part}; take linear_probe or optim.freeze"
            )


def _check_patterns(field: str, patterns: Iterable[str], paths: Sequence[str], name: str) -> None:
    """Raise UserError, with the nearest paths, for a pattern that fits none."""
    for pattern in patterns:
        if any(matches(pattern, path) for path in paths):
            continue
        whole = [path.split("/") for path in paths]
        known = dict.fromkeys("/".join(p[:n]) for p in whole for n in range(1, len(p) + 1))
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4)
        near = near or list(dict.fromkeys(p[0] for p in whole))
        raise UserError(
            f"config.optim.{field}: {pattern!r} fits no parameter of {name}; the nearest are "
            f"{', '.join(near)}"
        )


def _check_heads(freeze: str, policy: str, frozen: Sequence[str], heads: Sequence[str]) -> None:
    """Raise UserError where a head that `init.head` draws anew would never be trained."""
    anew = {"drop": heads, "cls": heads[1:]}.get(policy, ())
    for head in anew:
        if any(matches(head, path) for path in frozen):
            raise UserError(
                f"config.optim.freeze={freeze!r}: freezes {head}, which init.head={policy} draws "
                "anew; leave it out, or keep it with --config.init.head=error"
            )

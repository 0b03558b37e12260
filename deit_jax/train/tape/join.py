"""One label tape of several, which were recorded in parts."""

from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np

from deit_jax.errors import UserError
from deit_jax.storage import exists, to_path
from deit_jax.train.tape.fingerprint import aged, differences, listed
from deit_jax.train.tape.labeller import progress
from deit_jax.train.tape.session import alone, writable
from deit_jax.train.tape.tape import CHUNK_STEPS, ELSEWHERE, NAME, Tape, first_line


def join(destination: str | PurePath, sources: Sequence[str | PurePath]) -> PurePath:
    """Write all that some tapes hold to one, new or begun; return where it is.

    Steps that it has are left alone, so that a join that was cut off can be run again. Raise
    UserError, with nothing written, unless the tapes are of one run and of one teacher, keep as
    much of each answer, and agree on the steps that several have.
    """
    path, *paths = (to_path(place) for place in (destination, *sources))
    _check_places(path, paths)
    tapes = [Tape.open(source) for source in paths]
    there = [Tape.open(path)] if exists(path / NAME) else []
    for other in (*tapes[1:], *there):
        _check_same(tapes[0], other)
    _check_agreement([*there, *tapes])
    with alone(path):
        steps = max(len(tape) for tape in tapes)
        own = there[0].fingerprint if there else tapes[0].fingerprint  # as old as it is
        made = writable(path, tapes[0].layout, own, steps)
        made.must_be_writable()
        made.make_room(steps)
        with progress(sum(int(np.sum(tape.recorded >= 0)) for tape in tapes)) as bar:
            for first in range(0, steps, CHUNK_STEPS):
                _copy_chunk(made, tapes, first, bar)
    return path


def _check_places(path: PurePath, sources: list[PurePath]) -> None:
    if not sources:
        raise UserError(f"{path}: give the tapes that are joined there")
    seen = {_place(path)}
    for source in sources:
        if _place(source) in seen:
            raise UserError(f"{source}: this label tape is named twice; name each one once")
        seen.add(_place(source))


def _place(path: PurePath) -> PurePath:
    return path.resolve() if isinstance(path, Path) else path


def _check_same(one: Tape, other: Tape) -> None:
    """Raise UserError with all in which two tapes differ."""
    fields = aged(other.fingerprint, one.fingerprint)
    different = differences(one.fingerprint, fields)
    if one.layout.top_k != other.layout.top_k:
        different["top_k"] = f"{one.layout.top_k} there, {other.layout.top_k} here"
    if different:
        raise UserError(
            f"{other.path}: not of the same views and teacher as {one.path} ({listed(different)}); "
            "only parts of one tape can be joined"
        )


def _check_agreement(tapes: list[Tape]) -> None:
    """Raise UserError with the first step on which two tapes have other answers."""
    steps = max(len(tape) for tape in tapes)
    recorded, crc, owner = (np.full(steps, -1, np.int64) for _ in range(3))
    for number, tape in enumerate(tapes):
        mine = np.flatnonzero(tape.recorded >= 0)
        both = mine[recorded[mine] >= 0]
        same = (recorded[both] == tape.recorded[both]) & (crc[both] == tape.crc[both])
        if len(apart := both[~same]):
            step = int(apart[0])
            raise UserError(
                f"{tape.path}: step {step} has other answers than in {tapes[owner[step]].path} "
                f"({len(apart)} of {len(both)} steps that both have differ); join tapes of one "
                "kind of device, or such as have no step in common"
            )
        recorded[mine], crc[mine], owner[mine] = tape.recorded[mine], tape.crc[mine], number


def _copy_chunk(made: Tape, tapes: list[Tape], first: int, bar) -> None:
    """Add what the tapes have of one chunk, written whole, so that it may be cut off anywhere."""
    stop, rows = min(first + CHUNK_STEPS, len(made)), {}
    for tape in tapes:
        part = slice(first, min(stop, len(tape)))
        steps = first + np.flatnonzero(tape.recorded[part] >= 0)
        bar.update(len(steps))
        rows |= {int(step): tape for step in steps if made.recorded[step] < 0}
    if not rows:
        return
    chunk = {name: array.copy() for name, array in made.block(first).items()}
    for step, tape in rows.items():
        for name, part in tape.parts(step).items():
            chunk[name][step - first] = part
    steps = np.array(sorted(rows))
    try:
        for future in made.write(first, chunk):
            future.result()
        made.claim(
            steps,
            np.array([rows[step].recorded[step] for step in steps]),
            np.array([rows[step].crc[step] for step in steps]),
        )
    except (ValueError, OSError) as error:
        raise UserError(
            f"{made.path}: cannot be written ({first_line(error)}); make room and run the same "
            f"command again, or {ELSEWHERE}"
        ) from error

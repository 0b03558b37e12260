"""Peak memory of a traced program, without compiling it.

A model of what XLA does: element by element operations are fused into what reads them and take no
memory; products, convolutions and reductions write their results, and are handed operands that lie
in memory; an array lies there until its last reader is done.
"""

import collections
import dataclasses

from jax.extend.core import Literal, jaxprs_in_params

# Fused into their readers. Everything else reads and writes memory.
FUSED = """
abs add add_any and atan2 bitcast_convert_type broadcast_in_dim cbrt ceil clamp concatenate
convert_element_type copy cos cosh div dynamic_slice eq erf erf_inv erfc exp exp2 expm1 floor ge
gt integer_pow iota is_finite le log log1p logistic lt max min mul ne neg nextafter not or pad
pow random_bits random_fold_in random_seed random_split random_unwrap random_wrap
reduce_precision rem rev round rsqrt select_n shift_left shift_right_arithmetic
shift_right_logical sign sin sinh slice split sqrt square stop_gradient sub tan tanh transpose
xor
"""
# These read what is fused into them, and write.
REDUCTIONS = (
    "argmax argmin cumsum reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum"
)
VIEWS = "expand_dims optimization_barrier reshape squeeze"
INLINED = "checkpoint closed_call core_call custom_jvp_call custom_vjp_call jit pjit remat2"
_FUSED, _REDUCTIONS, _VIEWS, _INLINED = (
    frozenset(names.split()) for names in (FUSED, REDUCTIONS, VIEWS, INLINED)
)


class _Array:
    """An array of the program: the same variable of a function is another one in every call."""

    def __init__(self, variable):
        aval = variable.aval
        self.size = aval.size * getattr(aval.dtype, "itemsize", 0)


@dataclasses.dataclass(frozen=True)
class _Step:
    name: str
    reads: list[_Array]
    writes: list[_Array]
    inside: int  # bytes that what it calls takes beside them


def peak_bytes(jaxpr, platform: str = "tpu") -> int:
    """Return the most bytes that a jaxpr's intermediate and final arrays take at once.

    Its arguments are not counted. Where it differs by platform, "cuda", "tpu" or "cpu", that of
    `platform` counts; of other branches the largest. A loop counts what its body takes besides the
    carried arrays.
    """
    steps, given = [], {v: _Array(v) for v in (*jaxpr.invars, *jaxpr.constvars)}
    kept = set(_flatten(jaxpr, dict(given), steps, platform)) - set(given.values())
    written = _written(steps, kept) - set(given.values())
    last = _last_readers(steps, written) | dict.fromkeys(kept, len(steps))
    ends = {}
    for array, index in last.items():
        ends.setdefault(index, []).append(array)
    live = most = 0
    for index, step in enumerate(steps):
        live += sum(array.size for array in step.writes if array in written)
        most = max(most, live + step.inside)
        live -= sum(array.size for array in ends.get(index, ()))
    return most


def _flatten(jaxpr, names: dict, steps: list[_Step], platform: str) -> list[_Array]:
    """Add a jaxpr's steps, calls written out in place; return its results.

    `names` holds the arrays of its arguments, and takes up those of all its variables. What only
    hands on its operands, or views them in another shape, makes no arrays.
    """
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        reads = [_array(v, names) for v in eqn.invars]
        callee = next(jaxprs_in_params(eqn.params), None) if name in _INLINED else None
        if name == "cond" and eqn.params.get("branches_platforms") is not None:
            places = [p is None or platform in p for p in eqn.params["branches_platforms"]]
            callee, reads = eqn.params["branches"][places.index(True)].jaxpr, reads[1:]
        if name in _VIEWS:
            results = reads
        elif callee is not None:
            names_inside = dict(zip(callee.invars, reads, strict=True))
            results = _flatten(callee, names_inside, steps, platform)
        else:
            results = [_Array(v) for v in eqn.outvars]
            inside = max((peak_bytes(j, platform) for j in jaxprs_in_params(eqn.params)), default=0)
            steps.append(_Step(name, reads, results, inside))
        names.update(zip(eqn.outvars, results, strict=True))
    return [_array(v, names) for v in jaxpr.outvars]


def _array(variable, names: dict) -> _Array:
    """Return the array that a variable of this call stands for; constants are small."""
    if not isinstance(variable, Literal) and variable in names:
        return names[variable]
    return _Array(variable)


def _written(steps: list[_Step], kept: set[_Array]) -> set[_Array]:
    """Return the arrays that lie in memory."""
    found, readers, sources = set(kept), collections.Counter(), {}
    for step in steps:
        readers.update(set(step.reads))
        if step.name not in _FUSED:
            found.update(step.writes)
            if step.name not in _REDUCTIONS:
                found.update(step.reads)
    for step in steps:
        read = _sources(step, found, sources)
        for array in step.writes:
            # A sum of several arrays with several readers, as after each branch of a block.
            if readers[array] > 1 and sum(x.size >= array.size for x in read) > 1:
                found.add(array)
            sources[array] = read
    return found


def _sources(step: _Step, written: set[_Array], sources: dict) -> set[_Array]:
    """Return the written arrays that a step reads, directly or through what is fused into it."""
    read = set()
    for array in step.reads:
        read |= {array} if array in written else sources.get(array, set())
    return read


def _last_readers(steps: list[_Step], written: set[_Array]) -> dict[_Array, int]:
    """Return the index of the last step that reads each written array."""
    sources, last = {}, {}
    for index, step in enumerate(steps):
        read = _sources(step, written, sources)
        sources.update(dict.fromkeys(step.writes, read))
        last.update(dict.fromkeys(written.intersection(step.writes), index))
        if step.name not in _FUSED or written.intersection(step.writes):
            last.update(dict.fromkeys(read, index))
    return last

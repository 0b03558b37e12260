"""A traced function without what only JAX understands: for programs of other runtimes."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from deit_jax.models.portable import OPERATIONS

SMALL = 4096  # numbers
PRODUCT = (((1,), (0,)), ((), ()))  # of two matrices


def flattened(
    function: Callable, *shapes: Any, operations: dict[str, Callable] = OPERATIONS
) -> Callable:
    """Return a function that computes what another does, of plain operations alone.

    Own gradients are left away, and with them the operations that have one become those of
    models/portable.py, or other `operations` by their names. Of what depends on the platform that
    computes it, what is for all is taken. Barriers, which only say in which order XLA computes, are
    gone. With `shapes` it is traced at once, before a converter puts something in the place of
    JAX's functions; else by the arguments' own.
    """
    trace = jax.make_jaxpr(function, return_shape=True)
    early = trace(*shapes) if shapes else None

    def flat(*arguments):
        of = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        traced, shape = early or trace(*of)
        with jax.ensure_compile_time_eval():
            consts = [jnp.asarray(x) for x in traced.consts]
        said = _run(traced.jaxpr, consts, jax.tree.leaves(arguments), operations)
        return jax.tree.unflatten(jax.tree.structure(shape), said)

    return flat


def _run(jaxpr: Jaxpr, consts, arguments, operations: dict[str, Callable]) -> list[Any]:
    """Return the outputs of a traced program."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)

    def read(x):
        return x.val if isinstance(x, Literal) else values[x]

    for equation in jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        with _at_once(equation, inputs):
            said = _operation(equation, inputs, operations)
        values |= zip(equation.outvars, said, strict=True)
    return [read(x) for x in jaxpr.outvars]


def _at_once(equation, inputs: list[Any]):
    """Return a context in which what follows from constants alone is computed, not traced.

    A kernel that the model takes apart is stored in its parts. What would be larger than what it is
    made of is left to the program.
    """
    shapes = [x.aval.shape for x in equation.outvars]
    constant = bool(inputs) and not any(isinstance(x, jax.core.Tracer) for x in inputs)
    if not constant or not all(_known(n) for shape in shapes for n in shape):
        return contextlib.nullcontext()
    room = max(SMALL, *(np.size(x) for x in inputs))
    small = sum(map(math.prod, shapes)) <= room
    return jax.ensure_compile_time_eval() if small else contextlib.nullcontext()


def _known(size: Any) -> bool:
    return isinstance(size, int | np.integer)


def _operation(equation, inputs: list[Any], operations: dict[str, Callable]) -> list[Any]:
    """Return the outputs of one operation, of what stands inside it where there is something."""
    name, params = equation.primitive.name, equation.params
    if name == "platform_index":
        return [params["platforms"].index(None)]
    if name == "optimization_barrier":
        return inputs
    if name in operations:
        return [operations[name](*inputs)]
    if name == "dot_general" and params["dimension_numbers"] == PRODUCT and inputs[0].ndim == 2:
        # jax2onnx makes a Gemm of it, whose bias is of float32 whatever the rest is.
        return [jnp.matmul(*inputs).astype(equation.outvars[0].aval.dtype)]
    if inside := _inside(name, params, inputs):
        called, inputs = inside
        if called.jaxpr.debug_info.func_name in operations:
            return [operations[called.jaxpr.debug_info.func_name](*inputs)]
        return _run(called.jaxpr, called.consts, inputs, operations)
    said = equation.primitive.bind(*inputs, **params)
    return list(said) if equation.primitive.multiple_results else [said]


def _inside(name: str, params, inputs: list[Any]) -> tuple[ClosedJaxpr, list[Any]] | None:
    """Return the program that an operation stands for, and its inputs; None where it is one."""
    match name:
        case "custom_vjp_call" | "custom_jvp_call":
            return params["call_jaxpr"], inputs
        case "pjit" | "jit" | "closed_call":
            return params["jaxpr"], inputs
        case "cond" if isinstance(inputs[0], int):  # of a platform_index
            return params["branches"][inputs[0]], inputs[1:]
    return None

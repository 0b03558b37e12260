"""The training step as a run, a plan and a benchmark compile it."""

import functools
from collections.abc import Callable

import jax

from deit_jax.models import outputs
from deit_jax.parallel import sharding
from deit_jax.step.teacher import foreign_weights
from deit_jax.step.train_step import StepConfig, train_step


def compiler_options(mesh, deterministic: bool) -> dict[str, bool]:
    """Return what the compiler is told besides the program: `train.deterministic`, on a GPU."""
    # Not xla_gpu_deterministic_ops, which would also choose kernels without timing them.
    on = deterministic and sharding.platform(mesh) == "gpu"
    return {"xla_gpu_exclude_nondeterministic_ops": True} if on else {}


def placing(function: Callable, mesh) -> Callable:
    """Return a function, to be compiled, in which activations stay where their images are.

    So weights alone move: to each layer of a model, and whole to a program of which no layer is
    seen. On a mesh that splits nothing but the batch it is `function` itself, as no weight moves.
    """
    if mesh.size == mesh.shape["data"]:
        return function

    @functools.wraps(function)
    def placed(*arguments, **options):
        with (
            outputs.through(functools.partial(sharding.place_output, mesh)),
            foreign_weights(functools.partial(sharding.gathered, mesh)),
        ):
            return function(*arguments, **options)

    return placed


def jit_train_step(
    model, teacher, tx, settings: StepConfig, mesh, state_shardings, tape=None, deterministic=False
):
    """Return the step as a run compiles it, which `deit plan` does too, for other devices."""
    step = functools.partial(train_step, model=model, teacher=teacher, tx=tx)
    step = (
        tape.compiled_with(step, settings) if tape else functools.partial(step, settings=settings)
    )
    return jax.jit(
        placing(step, mesh),
        donate_argnums=0,
        out_shardings=(state_shardings, sharding.replicated(mesh)),
        compiler_options=compiler_options(mesh, deterministic),
    )

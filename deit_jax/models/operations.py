"""Operations of a traced program."""

import math

from jax.extend.core import jaxprs_in_params


def multiply_accumulates(jaxpr) -> int:
    """Return those of all products and convolutions in a jaxpr, loops taken as often as they run.

    Of the branches of a condition the dearest counts; a loop of unknown length counts once.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += eqn.outvars[0].aval.size * kernel.size // outputs
        else:
            inner = [multiply_accumulates(j) for j in jaxprs_in_params(eqn.params)]
            if name == "cond":
                inner = [max(inner)]
            total += sum(inner) * (eqn.params["length"] if name == "scan" else 1)
    return total

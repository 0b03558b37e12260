"""TensorFlow SavedModels: for TF Serving, TensorFlow.js and the converter to LiteRT."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deit_jax.export.flatten import flattened
from deit_jax.export.program import INPUT, Program

SERVING = "serving_default"
METADATA = "metadata.json"
# JAX writes erf as an operation that TensorFlow 2.21 does not know yet.
ERF_LIMIT = 3.832506856900711
ERF_ABOVE = (
    *(0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861, 0.18520832239976145),
    1.128379143519084,
)
ERF_BELOW = (
    *(-1.1791602954361697e-7, 0.000023547966471313185, 0.0010179625278914885),
    *(0.014070470171167667, 0.11098505178285362, 0.49746925110067538, 1.0),
)


def erf(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the error function by the rational function that XLA and Eigen have of float32."""
    x = jnp.clip(x, -ERF_LIMIT, ERF_LIMIT)
    square = x * x
    above, below = (
        jnp.polyval(jnp.array(c, x.dtype), square, unroll=16) for c in (ERF_ABOVE, ERF_BELOW)
    )
    return x * above / below


PLAIN = {"erf": erf}


def write(program: Program, folder: Path) -> dict[str, str]:
    """Write a SavedModel, its weights variables, into a folder; return what is known of it."""
    # TensorFlow tells of its own settings otherwise, and of oneDNN whatever the level.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf
    from jax.experimental import jax2tf

    native = [p for p in program.options.platforms if p != "rocm"]  # which TensorFlow does not name
    fixed = all(isinstance(n, int) for n in program.shape)
    text = None if fixed else "(" + ", ".join(map(str, program.shape)) + ")"
    function = flattened(program.function, operations=PLAIN)
    convert = jax2tf.convert(
        function,
        polymorphic_shapes=[None, text],
        with_gradient=False,
        native_serialization_platforms=native,
    )
    module = tf.Module()
    module.weights = tf.nest.map_structure(tf.Variable, program.params)
    shape = [n if isinstance(n, int) else None for n in program.shape]

    @tf.function(autograph=False, input_signature=[tf.TensorSpec(shape, program.dtype.name, INPUT)])
    def serve(images):
        return convert(module.weights, images)

    module.serve = serve
    described = folder.with_name(METADATA)  # which a SavedModel copies into assets/
    described.write_text(json.dumps(program.described, indent=2) + "\n")
    module.metadata = tf.saved_model.Asset(str(described))
    tf.saved_model.save(module, str(folder), signatures={SERVING: serve})
    return {"tensorflow": tf.__version__, "jax": jax.__version__, "platforms": ", ".join(native)}


def open_program(folder: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Return what runs a SavedModel that was written: TensorFlow, by its signature."""
    import tensorflow as tf

    module = tf.saved_model.load(str(folder))
    serve = module.signatures[SERVING]

    def run(images):
        with tf.device("/CPU:0"):  # a GPU would multiply float32 in fewer bits
            said = serve(**{INPUT: tf.constant(images)})
        return {name: value.numpy() for name, value in said.items()}

    run.module = module  # type: ignore[attr-defined]  # which a signature does not keep alive
    return run

"""ONNX files, which onnxruntime and many others run: by jax2onnx."""

import contextlib
import importlib.metadata
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deit_jax.errors import UserError
from deit_jax.export.flatten import flattened
from deit_jax.export.program import INPUT, Program

OPSET = 20  # the first with Gelu; onnxruntime 1.17 and newer read it
LARGEST = 2**31 - 2**20  # bytes of a protobuf; weights of more lie in a file beside it


def write(program: Program, file: Path) -> dict[str, str]:
    """Write the file, larger weights beside it; return what is known of it."""
    if program.options.dtype == "bfloat16":
        raise UserError("onnxruntime computes no bfloat16 on a CPU; take --dtype=float16")
    opset = program.options.opset or OPSET
    model = _converted(program, opset)
    for key, value in program.described.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    model.producer_name, _, model.producer_version = program.described["written_by"].partition(" ")
    _save(model, file)
    versions = {p: importlib.metadata.version(p) for p in ("onnx", "onnxruntime", "jax2onnx")}
    return {"opset": str(opset), "jax": jax.__version__, **versions}


def _converted(program: Program, opset: int) -> Any:
    """Return the ONNX model of a program."""
    import jax2onnx

    images, names = program.symbolic(), list(program.described["outputs"])

    def outputs(images):
        said = program.of_images(images)
        return [said[name] for name in names]

    try:
        with _quiet():
            return jax2onnx.to_onnx(
                flattened(outputs, images),
                inputs=[images],
                model_name=program.opened.name,
                opset=opset,
                input_names=[INPUT],
                output_names=names,
                normalization_mode="prefer_native",
            )
    except Exception as error:  # of a library that a new JAX may break
        reason = " ".join(str(error).split())
        raise UserError(
            f"jax2onnx {importlib.metadata.version('jax2onnx')} cannot convert this model with JAX "
            f"{jax.__version__} ({type(error).__name__}: {reason:.200})"
        ) from error


def _save(model: Any, file: Path) -> None:
    import onnx

    if model.ByteSize() <= LARGEST:
        file.write_bytes(model.SerializeToString())
        return
    onnx.save(
        model,
        file,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=f"{file.name}.data",
    )


@contextlib.contextmanager
def _quiet():
    """Keep what libraries note of shapes and of examples of their own out of the log."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def open_program(file: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Return what runs a file that was written: onnxruntime, on the CPU."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"onnxruntime {onnxruntime.__version__} does not take the model ({reason:.300}); "
            "nothing was written"
        ) from error
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {INPUT: images}), strict=True))

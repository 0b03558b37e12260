"""Programs of jax.export: StableHLO for all platforms in one file, with the weights in it.

A folder: program.bin, which jax.export.deserialize reads, metadata.json, and, of one platform and a
fixed batch, module.mlirbc, StableHLO's portable bytecode for compilers other than JAX's.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax import export

from deit_jax.errors import UserError
from deit_jax.export.program import Program
from deit_jax.models.locations import short_locations

PROGRAM, MODULE = "program.bin", "module.mlirbc"
# What keeps the weights in a file has offsets of 32 bits.
LARGEST = 2**31 - 2**20


def write(program: Program, folder: Path) -> dict[str, str]:
    """Write the program into a folder and return what is known of it."""
    folder.mkdir()
    options = program.options
    size = sum(x.nbytes for x in jax.tree.leaves(program.params))
    if size > LARGEST:
        raise UserError(
            f"{size / 2**30:.1f} GiB of weights do not fit into one program of jax.export (2 GiB); "
            "--dtype=bfloat16 halves them"
        )
    try:
        with short_locations():
            exported = export.export(jax.jit(program.of_images), platforms=options.platforms)(
                program.symbolic()
            )
    except ValueError as error:
        raise UserError(f"jax.export: {str(error).splitlines()[0]}") from error
    (folder / PROGRAM).write_bytes(exported.serialize())
    if len(options.platforms) == 1 and all(isinstance(n, int) for n in program.shape):
        (folder / MODULE).write_bytes(exported.mlir_module_serialized)
    return {
        "jax": jax.__version__,
        "platforms": ", ".join(options.platforms),
        "calling_convention": str(exported.calling_convention_version),
    }


def open_program(folder: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Return what runs a program that was written, on this machine."""
    exported = export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    here = "cpu" if "cpu" in exported.platforms else jax.default_backend()
    if {here, *({"cuda", "rocm"} if here == "gpu" else ())}.isdisjoint(exported.platforms):
        raise UserError(
            f"--platforms={','.join(exported.platforms)}: this machine's is {here}, which cannot "
            "run the program to verify it; add it, or --noverify"
        )
    call = jax.jit(exported.call)
    return lambda images: jax.device_get(call(images))

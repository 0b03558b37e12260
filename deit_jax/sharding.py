"""The mesh of devices, and where each array lives on it. Models know nothing of this."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deit_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")  # both split the batch; "fsdp" splits the weights besides
MIN_SHARDED_SIZE = 2**14  # elements; below, gathering costs more than the memory it saves


def make_mesh(fsdp: int, devices=None) -> Mesh:
    """Return all devices as a (data, fsdp, tensor) mesh; `fsdp` of them share one copy of weights.

    Raise UserError if `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise UserError(f"mesh.fsdp={fsdp} does not divide the {len(devices)} devices")
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp, 1),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=devices,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split the first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Keep a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, tree):
    """Return for each array its sharding: the largest axis that `fsdp` divides, or replicated."""

    def rule(leaf):
        size = mesh.shape["fsdp"]
        axes = [a for a, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not axes or np.prod(leaf.shape) < MIN_SHARDED_SIZE:
            return replicated(mesh)
        largest = max(axes, key=lambda a: leaf.shape[a])
        spec = [None] * largest + ["fsdp"]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(rule, tree)


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make global arrays of this process's rows of the batch."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

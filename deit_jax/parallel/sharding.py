"""The mesh of devices, and where each array lives on it. Models know nothing of this.

Three axes: "data" and "fsdp" split the batch, "fsdp" (ZeRO-3) splits the weights besides, and
"tensor" splits attention heads, hidden units and classes (Megatron's layout). The slices of a
multi-slice TPU job are joined by "data" alone, whose traffic a data-center network can carry.
"""

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deit_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
MIN_SHARDED_SIZE = 2**14  # elements; below, gathering costs more than the memory it saves
# Which axis "tensor" splits, by the end of the path; every other parameter stays whole on it.
# qkv's axis holds [all q | all k | all v], so that a share of it is not a share of the heads: the
# model takes it apart, and XLA moves the kernel, not the activations, to where they belong
# (models/vit.py). A step of two blocks of DeiT-B, 64 images a chip, tensor=2, moves 12 MB for it;
# with one product for q, k and v two blocks alone gathered 234 MB and took 4 M cycles more.
TENSOR_RULES = (
    (r"mlp/fc1/(kernel|bias)", -1),
    (r"mlp/fc2/kernel", 0),
    (r"head(_dist)?(/fc)?/(kernel|bias)", -1),
    (r"attn/proj/kernel", 0),
    (r"attn/qkv/kernel", -1),
)

# The layers whose output "tensor" splits, and along which axis; a block's own output is whole. So a
# branch is summed over "tensor" where it ends, in attn/proj and mlp/fc2, and its gradient where it
# begins: Megatron's two sums a block and direction.
TENSOR_OUTPUTS = (
    (r"mlp/fc1", -1),
    (r"head(_dist)?(/fc)?", -1),
    (r"attn/qkv", -2),  # [B N heads d]
)


def mesh_sizes(mesh, num_devices: int) -> tuple[int, int, int]:
    """Return the sizes of AXES that a config's `mesh` means, -1 being what the others leave.

    Raise UserError unless they multiply to the number of devices, evenly over the slices.
    """
    sizes = {name: mesh[name] for name in AXES}
    for name in (*AXES, "slices"):
        if mesh[name] < 1 and (mesh[name] != -1 or name == "slices"):
            remedy = "must be at least 1" if name == "slices" else "must be at least 1, or -1"
            raise UserError(f"config.mesh.{name}={mesh[name]}: {remedy}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(
            f"config.mesh.{free[1]}=-1: only one of {', '.join(AXES)} can be -1, and "
            f"mesh.{free[0]} is"
        )
    rest = prod(size for size in sizes.values() if size != -1)
    if free and num_devices % rest == 0:
        sizes[free[0]] = num_devices // rest
    if prod(sizes.values()) != num_devices:
        text = " x ".join(f"mesh.{n}={s}" for n, s in sizes.items() if s not in (1, -1))
        verb = "must divide" if free else "must be"
        raise UserError(
            f"config.{text or 'mesh.data=1'}: {verb} the number of devices, {num_devices}"
        )
    if sizes["data"] % mesh.slices:
        raise UserError(
            f"config.mesh.slices={mesh.slices}: must divide mesh.data={sizes['data']}, which "
            "joins the slices"
        )
    return tuple(sizes.values())


def make_mesh(mesh, devices: Iterable | None = None) -> Mesh:
    """Return the (data, fsdp, tensor) mesh of all or given devices for a config's `mesh`.

    Neighbours on the inner axes are neighbours in the hardware. Raise UserError if the sizes do not
    fit the devices, or `mesh.slices` is not the number of slices that they are in.
    """
    grid = device_grid(mesh, jax.devices() if devices is None else list(devices))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_grid(mesh, devices: list) -> np.ndarray:
    """Return the devices as an array with one axis for each of AXES; see make_mesh."""
    data, fsdp, tensor = mesh_sizes(mesh, len(devices))
    found = len({getattr(d, "slice_index", None) or 0 for d in devices})
    # On a GPU each host is a slice to JAX; there it is the user's choice to group by them.
    if mesh.slices != found and (mesh.slices > 1 or devices[0].platform == "tpu"):
        raise UserError(
            f"config.mesh.slices={mesh.slices}: the devices are in {found} slice(s); set "
            f"--config.mesh.slices={found}"
        )
    if mesh.slices > 1:
        inner, outer = (data // mesh.slices, fsdp, tensor), (mesh.slices, 1, 1)
        return mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(
        (data, fsdp, tensor), devices, allow_split_physical_axes=True
    )


def platform(mesh) -> str:
    """Return what a mesh's devices are: cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split the first axis over data and fsdp; devices along tensor share their examples."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Keep a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place_output(mesh: Mesh, path: str, x: jax.Array) -> jax.Array:
    """Keep what leaves a layer, and its gradient, where its examples are: weights move instead.

    Left alone, the compiler may as well split an activation as the weights beside it are split.
    """
    spec = output_spec(path, x.shape, mesh.shape)
    if spec is None:
        return x
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    # That the heads' tokens stay has a TPU lay out all tokens for cutting these off, images before
    # channels: 26.4 M cycles for two blocks of DeiT III-H, 32 images a v5e chip, instead of 25.1.
    if platform(mesh) == "tpu" and x.ndim == 3 and x.shape[1] > 2 and "/" not in path:
        x = with_layout_constraint(x, Layout((0, 1, 2)))
    return x


def gathered(mesh: Mesh, tree):
    """Let every device have all of a tree's arrays, where a program reads them."""
    place = replicated(mesh)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place), tree)


def output_spec(path: str, shape: tuple[int, ...], sizes) -> PartitionSpec | None:
    """Return where what leaves a layer lives; None where that follows from the layers around it.

    Also None where the mesh does not divide the examples. `path` is a layer's, "" a whole model's;
    `sizes` maps the mesh's axes to their lengths.
    """
    if not shape or shape[0] % prod(sizes[name] for name in BATCH_AXES):
        return None
    spec: list[Any] = [BATCH_AXES, *[None] * (len(shape) - 1)]
    for pattern, axis in TENSOR_OUTPUTS if sizes["tensor"] > 1 else ():
        if len(shape) > -axis and re.search(rf"(^|/){pattern}$", path):
            spec[axis] = "tensor" if shape[axis] % sizes["tensor"] == 0 else None
            return PartitionSpec(*spec)
    return None if "/" in path else PartitionSpec(*spec)


def local_rows(mesh: Mesh, batch_size: int, process: int | None = None) -> list[int]:
    """Return, ascending, the rows of a global batch that a process's devices hold; None = this.

    Not simply the process's share in order: on a torus neighbours in the mesh may belong to any
    process, and processes along tensor hold the same rows.
    """
    process = jax.process_index() if process is None else process
    sharding = batch_sharding(mesh)
    # Any: jaxlib says nothing of the types of devices.
    places: Mapping[Any, tuple[slice, ...]] = sharding.devices_indices_map((batch_size,))
    ranges = {
        index[0].indices(batch_size)[:2]
        for device, index in places.items()
        if device.process_index == process
    }
    return [row for start, stop in sorted(ranges) for row in range(start, stop)]


def to_devices(batch: dict[str, Any], mesh: Mesh, size: int) -> dict[str, Any]:
    """Make global arrays of `size` examples out of this process's `local_rows`."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, (size, *x.shape[1:])), batch
    )


def state_shardings(mesh: Mesh, tree, model):
    """Return the sharding of each array: of `model`'s parameters, and of what mirrors them.

    These are moments, averages and gradients, whose paths end like a parameter's.
    """
    heads = getattr(model, "num_heads", None)

    def place(path, leaf):
        return NamedSharding(mesh, leaf_spec(path_name(path), leaf.shape, mesh.shape, heads)[0])

    return jax.tree_util.tree_map_with_path(place, tree)


def unsplit(mesh: Mesh, params, model) -> list[str]:
    """Return one line for each kind of parameter that an axis of the mesh does not divide.

    Blocks are counted as one: `blocks_*/attn/qkv/kernel`.
    """
    lines, heads = {}, getattr(model, "num_heads", None)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        for reason in leaf_spec(name, leaf.shape, mesh.shape, heads)[1]:
            lines[f"{re.sub(r'_?[0-9]+(?=/)', '_*', name)} is not split: {reason}"] = None
    return list(lines)


def leaf_spec(
    name: str, shape: tuple[int, ...], sizes, heads: int | None = None
) -> tuple[PartitionSpec, list[str]]:
    """Return where an array of this path and shape lives, and why it is split less than asked.

    First "tensor" by TENSOR_RULES, then "fsdp" over the largest other axis that it divides, the
    first of equals. `sizes` maps the mesh's axes to their lengths.
    """
    spec: list[str | None] = [None] * len(shape)
    reasons = []
    axis, count, what = _tensor_axis(name, shape, heads)
    if sizes["tensor"] > 1 and axis is not None:
        if count % sizes["tensor"] == 0:
            spec[axis] = "tensor"
        else:
            reasons.append(f"mesh.tensor={sizes['tensor']} does not divide {count} {what}")
    if sizes["fsdp"] > 1 and prod(shape) >= MIN_SHARDED_SIZE:
        axes = [a for a, n in enumerate(shape) if n % sizes["fsdp"] == 0 and spec[a] is None]
        if axes:
            spec[max(axes, key=lambda a: shape[a])] = "fsdp"
        else:
            reasons.append(f"mesh.fsdp={sizes['fsdp']} divides no free axis of {list(shape)}")
    while spec and spec[-1] is None:  # P("fsdp", None) and P("fsdp") mean the same, but differ
        spec.pop()
    return PartitionSpec(*spec), reasons


def _tensor_axis(name: str, shape, heads: int | None) -> tuple[int | None, int, str]:
    """Return the axis of a leaf that "tensor" splits, into how many pieces at most, and of what."""
    for pattern, axis in TENSOR_RULES:
        if re.search(rf"(^|/){pattern}$", name):
            axis %= len(shape)
            if "attn/" in name:
                return axis, heads or 1, "attention heads"
            return axis, shape[axis], "classes" if "head" in name else "hidden units"
    return None, 0, ""


def path_name(path) -> str:
    """Return a pytree path as `blocks_0/attn/qkv/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")

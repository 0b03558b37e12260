"""A torch module as a graph of ATen operations, with all that can be computed once computed."""

import contextlib
import dataclasses
import io
import logging
import math
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from deit_jax.errors import UserError
from deit_jax.shapes import Size, sides
from deit_jax.teachers.programs import first_line
from deit_jax.teachers.torch_import import import_torchax

aten = torch.ops.aten
# In PyTorch's own parts, linear layers and attention merge and part axes, which costs a program
# of XLA twice the time; roll and layer norm become gathers and several passes.
WHOLE = (
    aten.linear.default,
    aten.matmul.default,
    aten.scaled_dot_product_attention.default,
    aten.layer_norm.default,
    aten.roll.default,
    aten.unbind.int,
)
# What only repeats numbers is not written down: the file would hold every copy.
_REPEATS = {aten.expand.default, aten.repeat.default}
_BATCH_NORM = aten._native_batch_norm_legit_no_training.default


@dataclasses.dataclass(eq=False)
class Network:
    """A graph of operations on images [B C H W], and the constants that it takes, by name."""

    graph: fx.Graph
    images: fx.Node
    outputs: tuple[fx.Node, ...]
    constants: dict[fx.Node, torch.Tensor]


def capture(module: torch.nn.Module, size: Size, channels: int, asked: str) -> Network:
    """Return what a module in evaluation computes; raise UserError for what has no such graph."""
    table = _decompositions(asked)
    images = torch.zeros(2, channels, *sides(size))
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(
                module, (images,), dynamic_shapes=({0: batch},), strict=False
            )
            program = program.run_decompositions(table)
    except Exception as error:  # of many kinds, none of them documented
        raise UserError(
            f"{asked}: cannot be traced for any number of images ({first_line(error)}); its "
            "forward must not branch on what is in images, nor depend on their number"
        ) from error
    _check(program, asked)
    network = _with_constants(program)
    _merge_same(network)
    _compute_constants(network)
    return network


def _decompositions(asked: str) -> Any:
    """Return how operations become smaller ones, but for those that XLA does better whole."""
    table = torch.export.default_decompositions()
    table.update(import_torchax(asked).decompositions.DECOMPOSITIONS)
    for operation in WHOLE:
        table.pop(operation, None)
    return table


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep to itself what torch and those who build on it print while they work."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    lost = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(lost),
            contextlib.redirect_stderr(lost),
        ):
            warnings.simplefilter("ignore")  # of torch's own deprecations
            yield
    finally:
        logging.disable(before)


def _check(program: torch.export.ExportedProgram, asked: str) -> None:
    """Raise UserError for what would differ from call to call."""
    signature = program.graph_signature
    if changed := sorted(signature.buffers_to_mutate.values()):
        raise UserError(
            f"{asked}: forward changes the buffer {changed[0]}; a teacher must answer the same "
            "whatever it was shown before"
        )
    for node in program.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags and not _drops_nothing(node):
            raise UserError(
                f"{asked}: forward draws random numbers ({node.target}) in evaluation too; leave "
                "them out where self.training is False"
            )


def _drops_nothing(node: fx.Node) -> bool:
    """Return whether a node is attention without dropout, which draws no numbers."""
    rate: Any = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    return bool(node.target is aten.scaled_dot_product_attention.default and not rate)


def _with_constants(program: torch.export.ExportedProgram) -> Network:
    graph, constants, images = program.graph, {}, None
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        spec = specs[node.name]
        if spec.kind == InputKind.USER_INPUT:
            images = node
            continue
        state = program.state_dict if spec.target in program.state_dict else program.constants
        constants[node] = state[spec.target].detach()
        node.meta["name"] = spec.target
    (output,) = (node for node in graph.nodes if node.op == "output")
    assert images is not None
    return Network(graph, images, tuple(output.args[0]), constants)


def _replace(network: Network, old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    network.outputs = tuple(new if node is old else node for node in network.outputs)
    network.graph.erase_node(old)
    network.constants.pop(old, None)


def _merge_same(network: Network) -> None:
    """Leave one of several nodes that compute the same, as of a head that is asked twice."""
    seen: dict[str, fx.Node] = {}
    for node in list(network.graph.nodes):
        if node.op != "call_function":
            continue
        key = f"{node.target}{node.args}{sorted(node.kwargs.items())}"
        if key in seen:
            _replace(network, node, seen[key])
        else:
            seen[key] = node


def _compute_constants(network: Network) -> None:
    """Compute all that does not follow from the images, in float32 and with PyTorch."""
    values: dict[fx.Node, Any] = dict(network.constants)
    for node in network.graph.nodes:
        if node.op != "call_function" or node.target in _REPEATS:
            continue
        if isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool):
            continue
        if all(source in values for source in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        kept = isinstance(value, torch.Tensor) and any(user not in values for user in node.users)
        if kept or node in network.outputs:
            network.constants[node] = value.float() if value.is_floating_point() else value
        else:
            network.constants.pop(node, None)
    for node in reversed(list(network.graph.nodes)):
        if node in values and node not in network.constants and not node.users:
            network.graph.erase_node(node)
    for node in network.constants:
        node.args, node.kwargs = (), {}  # it is looked up, and nothing is computed for it
    drop_unused(network)


def drop_unused(network: Network) -> None:
    """Take out whatever nobody uses."""
    for node in reversed(list(network.graph.nodes)):
        if (
            not node.users
            and node not in (network.images, *network.outputs)
            and node.op != "output"
        ):
            network.constants.pop(node, None)
            network.graph.erase_node(node)


def add_constant(network: Network, before: fx.Node, name: str, value: torch.Tensor) -> fx.Node:
    """Return a new constant."""
    with network.graph.inserting_before(before):
        node = network.graph.create_node("get_attr", name)
    node.meta["name"] = name
    network.constants[node] = value
    return node


def name_of(node: fx.Node) -> str:
    """Return a constant's name: the module's own, or that of what computes it."""
    return node.meta.get("name", node.name)


def scale_shift(x, scale, shift):
    """Stand for batch norm, which nothing could take over: x scale + shift, channels second."""
    raise NotImplementedError  # replaced where it is lowered


def fold_batch_norm(network: Network) -> int:
    """Fold batch norm into the convolution or product before it; return how many were."""
    folded = 0
    for node in list(network.graph.nodes):
        if node.target is not _BATCH_NORM:
            continue
        x, weight, bias, mean, var, _, epsilon = node.args
        known = network.constants
        scale = torch.rsqrt(known[var].double() + epsilon)
        scale = scale if weight is None else scale * known[weight].double()
        shift = -known[mean].double() * scale
        shift = shift if bias is None else shift + known[bias].double()
        taken = _into(network, x, scale, shift) if len(x.users) == 1 else None
        folded += taken is not None
        for user in list(node.users):
            assert (user.target, user.args[1]) == (operator.getitem, 0)
            _replace(network, user, taken or _as_product(network, node, x, scale, shift))
    drop_unused(network)
    return folded


def _as_product(network, node, x, scale, shift) -> fx.Node:
    shape = [-1] + [1] * (x.meta["val"].ndim - 2)
    both = [
        add_constant(network, node, f"{node.name}.{key}", value.float().reshape(shape))
        for key, value in (("scale", scale), ("shift", shift))
    ]
    with network.graph.inserting_before(node):
        new = network.graph.call_function(scale_shift, (x, *both))
    new.meta = {"val": x.meta["val"]}
    return new


def _into(network, x: fx.Node, scale, shift) -> fx.Node | None:
    """Return a convolution or product that scales and shifts by itself; None for other nodes."""
    known: dict[Any, torch.Tensor] = network.constants
    kernel: Any
    if x.target is aten.convolution.default and not x.args[6]:
        kernel, bias = x.args[1:3]
        places, axes = (1, 2), [-1] + [1] * (x.meta["val"].ndim - 1)
    elif x.target is aten.linear.default and x.meta["val"].ndim == 2:
        kernel, bias = (*x.args[1:], None)[:2]
        places, axes = (1, 2), [-1, 1]
    else:
        return None
    if kernel not in known or (bias is not None and bias not in known):
        return None
    name = name_of(kernel)
    shift = shift if bias is None else known[bias].double() * scale + shift
    values = ((known[kernel].double() * scale.reshape(axes)).float(), shift.float())
    new = [
        add_constant(network, x, f"{name}.{end}", value)
        for end, value in zip(("folded", "shift"), values, strict=True)
    ]
    args = [*x.args, None][: max(len(x.args), 3)]
    args[places[0]], args[places[1]] = new
    x.args = tuple(args)
    return x


def split_products(network: Network) -> int:
    """Make one product each of queries, keys and values, where one makes all; return how many.

    Their parts [B N 3 heads d] of one product's output are copied apart by XLA: a tenth of a ViT.
    """
    count = 0
    for unbind in list(network.graph.nodes):
        if unbind.target is not aten.unbind.int or (*unbind.args, 0)[1] != 0:
            continue
        turned: Any = unbind.args[0]
        view: Any = turned.args[0] if turned.target is aten.permute.default else None
        linear: Any = (
            view.args[0] if view is not None and view.target is aten.view.default else None
        )
        if linear is None or linear.target is not aten.linear.default:
            continue
        alone = all(len(node.users) == 1 for node in (turned, view, linear))
        order, shape, weights = turned.args[1], view.args[1], linear.args[1:]
        plain = len(shape) == 5 and order[0] == 2 and isinstance(shape[2], int)
        known = all(node is None or node in network.constants for node in weights)
        if not (alone and plain and known):
            continue
        for user in list(unbind.users):
            part = _part_of(network, unbind, linear, (view, turned), user.args[1])
            _replace(network, user, part)
        count += 1
    drop_unused(network)
    return count


def _part_of(network, before, linear, after, number: int) -> fx.Node:
    """Return the nodes that make one part of what is then taken apart, by rows of its weights."""
    (view, turned), parts = after, after[0].args[1][2]
    weights = []
    for node in linear.args[1:]:
        value = None if node is None else network.constants[node].chunk(parts)[number]
        name = "" if node is None else f"{name_of(node)}.{number}"
        weights.append(value if value is None else add_constant(network, linear, name, value))
    shape = [size for axis, size in enumerate(view.args[1]) if axis != 2]
    order = [axis - (axis > 2) for axis in turned.args[1] if axis != 2]
    with network.graph.inserting_before(before):
        x = network.graph.call_function(linear.target, (linear.args[0], *weights))
        x = network.graph.call_function(view.target, (x, shape))
        return network.graph.call_function(turned.target, (x, order))


def last_linear(network: Network) -> fx.Node | None:
    """Return what enters the linear layer that makes the first output, None if none does."""
    node: Any = network.outputs[0]
    through = {aten.view.default, aten.clone.default, aten.squeeze.dim, aten._to_copy.default}
    while node.target in through:
        node = node.args[0]
    is_linear = node.target is aten.linear.default and node.args[1] in network.constants
    return node.args[0] if is_linear else None


def not_finite(network: Network) -> list[str]:
    """Return the names of constants that are not finite, but for masks of minus infinity."""
    names = []
    for node, value in network.constants.items():
        if value.is_floating_point() and not bool((value.isfinite() | (value == -math.inf)).all()):
            names.append(name_of(node))
    return names

"""A graph of ATen operations as a JAX function: torchax's lowerings, and ours where those lose."""

import operator
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import fx

from deit_jax.errors import UserError
from deit_jax.models.attention import attention
from deit_jax.teachers.programs import first_line
from deit_jax.teachers.torch_graph import Network, name_of, scale_shift
from deit_jax.teachers.torch_import import import_torchax
from deit_jax.teachers.torch_layout import Last, all_first, comes_last, first, in_last, last

aten = torch.ops.aten
# Operations that lose nothing in bfloat16: they move numbers or, as products do, sum in float32.
# All others are computed in float32, and only what they hand on is rounded.
_NAMES = """linear layer_norm scaled_dot_product_attention convolution mm addmm bmm baddbmm matmul
    einsum relu max_pool2d max_pool2d_with_indices view _unsafe_view reshape permute transpose t
    expand repeat cat stack slice select split split_with_sizes chunk squeeze unsqueeze clone copy
    roll flip index constant_pad_nd add sub mul neg index_select gather where unbind alias detach
    pixel_shuffle pixel_unshuffle scale_shift clamp clamp_min hardtanh"""
_NARROW = frozenset(_NAMES.split())


def _convolution(x, kernel, bias, stride, padding, dilation, transposed, output_padding, groups):
    """Convolve, the kernel [H W I O]: channels last, as XLA has it everywhere."""
    x = last(x).value
    assert not transposed
    dims = kernel.ndim - 2
    pairs = [(p, p) for p in (padding * dims if len(padding) == 1 else padding)]
    out = jax.lax.conv_general_dilated(
        x,
        kernel,
        stride * dims if len(stride) == 1 else stride,
        pairs,
        rhs_dilation=dilation * dims if len(dilation) == 1 else dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC") if dims == 2 else ("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )
    return Last(out if bias is None else out + bias)


def _linear(x, kernel, bias=None):
    """Multiply by a kernel [I O] and add."""
    out = jnp.matmul(x, kernel)
    return out if bias is None else out + bias


def _addmm(bias, x, kernel, *, beta=1, alpha=1):
    out = jnp.matmul(x, kernel)
    return (out if alpha == 1 else alpha * out) + (bias if beta == 1 else beta * bias)


def _layer_norm(x, shape, weight=None, bias=None, epsilon=1e-5, cudnn=True):
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    wide = x.astype(jnp.float32)
    mean = wide.mean(axes, keepdims=True)
    out = wide - mean
    if x.dtype == jnp.float32:
        variance = jnp.square(out).mean(axes, keepdims=True)
    else:  # in one pass with the mean; what that loses is less than was rounded before
        variance = jnp.maximum(0.0, jnp.square(wide).mean(axes, keepdims=True) - jnp.square(mean))
    out = out * jax.lax.rsqrt(variance + epsilon)
    out = out if weight is None else out * weight.astype(jnp.float32)
    return out if bias is None else out + bias.astype(jnp.float32)


def _gelu(x, *, approximate="none"):
    if approximate == "tanh":
        return jax.nn.gelu(x, approximate=True)
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))  # erfc, which JAX takes, is twice as long


def _attention(q, k, v, mask=None, dropout=0.0, causal=False, *, scale=None, enable_gqa=False):
    """Attend [B heads N d], the softmax in float32 whatever the dtype."""
    if enable_gqa or dropout:
        raise ValueError("attention with grouped queries or dropout")
    root = q.shape[-1] ** -0.5
    alike = q.ndim == 4 and q.shape == k.shape == v.shape
    if alike and mask is None and not causal and scale in (None, root):
        heads_second = (x.swapaxes(1, 2) for x in (q, k, v))
        return attention(*heads_second, choice="xla").swapaxes(1, 2)
    logits = jnp.einsum("...nd,...md->...nm", q, k, preferred_element_type=jnp.float32)
    logits = logits * (root if scale is None else scale)
    if causal:
        mask = jnp.tri(q.shape[-2], k.shape[-2], dtype=bool)
    if mask is not None and mask.dtype == bool:
        logits = jnp.where(mask, logits, -jnp.inf)
    elif mask is not None:
        logits = logits + mask.astype(jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("...nm,...md->...nd", weights, v)


LOWERINGS: dict[Any, Callable] = {
    aten.linear.default: lambda x, kernel, bias=None: _linear(x, kernel.T, bias),
    aten.addmm.default: _addmm,
    aten.matmul.default: jnp.matmul,
    aten.scaled_dot_product_attention.default: _attention,
    aten.layer_norm.default: _layer_norm,
    aten.gelu.default: _gelu,
    aten.unbind.int: lambda x, axis=0: [
        jax.lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])
    ],
    aten.roll.default: lambda x, shifts, axes=(): jnp.roll(x, tuple(shifts), tuple(axes) or None),
    aten.sym_size.int: lambda x, axis: x.shape[axis],
    scale_shift: lambda x, scale, shift: x * scale + shift,
}


def _lowering(node: fx.Node) -> Callable | None:
    """Return what computes a node in JAX, None if nothing does."""
    from torchax.ops.ops_registry import all_aten_ops

    target: Any = node.target
    if target in LOWERINGS:
        return LOWERINGS[target]
    if not isinstance(target, torch._ops.OpOverload):
        return target  # of Python, on sizes
    import torchax.ops.jaten  # noqa: F401  fills the table

    known = all_aten_ops.get(target) or all_aten_ops.get(target.overloadpacket)
    return known.func if known is not None and known.is_jax_function else None


def _lay_out(network: Network) -> dict[fx.Node, Callable]:
    """Lay kernels out as XLA likes them, inputs before outputs; return what computes with these."""
    ours: dict[fx.Node, Callable] = {}
    kernels = set()
    lowerings: dict[Any, Callable] = {
        aten.convolution.default: _convolution,
        aten.linear.default: _linear,
    }
    for node in network.graph.nodes:
        if node.target not in lowerings or (
            node.target is aten.convolution.default and node.args[6]
        ):
            continue
        kernel = node.args[1]
        alone = all(user.target is node.target and user.args[1] is kernel for user in kernel.users)
        if kernel in network.constants and alone and network.constants[kernel].ndim <= 4:
            ours[node] = lowerings[node.target]
            kernels.add(kernel)
    for kernel in kernels:
        value = network.constants[kernel]
        network.constants[kernel] = value.permute(*range(2, value.ndim), 1, 0)
    return ours


def _as_numpy(value: torch.Tensor) -> np.ndarray:
    """Return a constant as JAX takes it: without strides, whole numbers in 32 bits."""
    array = value.contiguous().numpy()
    return array.astype(np.int32) if array.dtype == np.int64 else array


class Lowered:
    """A network as a function of weights and images [B H W C]: `apply` of a Teacher."""

    def __init__(self, network: Network, keys: tuple[str, ...], asked: str):
        import_torchax(asked)
        self._asked, self._keys, self._network = asked, keys, network
        self._lowerings: dict[fx.Node, Callable] = {}
        ours = _lay_out(network)
        for node in network.graph.nodes:
            if node.op != "call_function" or node in network.constants:
                continue
            lowering = ours.get(node) or _lowering(node)
            if lowering is None:
                raise UserError(
                    f"{asked}: the operation {node.target} has no counterpart in JAX (torchax); a "
                    "model without it can be converted"
                )
            self._lowerings[node] = lowering
        self._names = {node: name_of(node) for node in network.constants}
        self.weights = {
            self._names[node]: _as_numpy(value) for node, value in network.constants.items()
        }
        assert len(self.weights) == len(network.constants)  # each has a name of its own
        network.constants.clear()  # the weights have the numbers from here on

    def __call__(self, params: dict[str, Any], images: Any) -> dict[str, jax.Array]:
        """Return the answer to normalised images, computed in the dtype of the weights."""
        kinds = [x.dtype for x in params.values() if jnp.issubdtype(x.dtype, jnp.floating)]
        dtype = kinds[0] if kinds else images.dtype
        values: dict[fx.Node, Any] = {
            node: jnp.asarray(params[name]) for node, name in self._names.items()
        }
        values[self._network.images] = Last(jnp.asarray(images, dtype))
        for node, lowering in self._lowerings.items():
            args, kwargs = _bound((node.args, node.kwargs), values)
            try:
                values[node] = _computed(node, lowering, args, kwargs, dtype)
            except Exception as error:
                raise UserError(
                    f"{self._asked}: the operation {node.target} cannot be computed in JAX "
                    f"({first_line(error)}); a model without it can be converted"
                ) from error
        outputs = (first(values[node]).astype(jnp.float32) for node in self._network.outputs)
        return dict(zip(self._keys, outputs, strict=True))


def _computed(node: fx.Node, lowering: Callable, args, kwargs, dtype) -> Any:
    """Return a node's value, whose floats are of the dtype of computing."""
    target: Any = node.target
    if target is operator.getitem:
        return args[0][args[1]]
    if isinstance(target, torch._ops.OpOverload):
        name = target.overloadpacket.__name__
    elif target is scale_shift:
        name = "scale_shift"
    else:  # of Python, on sizes
        return lowering(*args, **kwargs)
    narrow = name in _NARROW

    def compute(*args, **kwargs):
        wide = (args, kwargs) if narrow else _cast((args, kwargs), jnp.dtype(jnp.float32))
        return _cast(lowering(*wide[0], **wide[1]), dtype)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Explicitly requested dtype")  # of 64 bits
        if lowering is _convolution:
            return compute(*args, **kwargs)
        if _any_last((args, kwargs)):
            if (out := in_last(name, compute, args, kwargs)) is not None:
                return out
        elif name == "permute" and comes_last(args[1]):
            return Last(args[0])
        return compute(*all_first(args), **all_first(kwargs))


def _bound(arguments: Any, values: dict[fx.Node, Any]) -> Any:
    """Return a node's arguments with values for nodes, in containers that JAX knows too."""
    if isinstance(arguments, fx.Node):
        return values[arguments]
    if isinstance(arguments, dict):
        return {key: _bound(value, values) for key, value in arguments.items()}
    if isinstance(arguments, list | tuple):
        bound = (_bound(value, values) for value in arguments)
        return list(bound) if isinstance(arguments, list) else tuple(bound)
    return arguments


def _any_last(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Last))
    return any(isinstance(x, Last) for x in leaves)


def _cast(tree: Any, dtype) -> Any:
    def cast(x):
        is_float = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if is_float else x

    return jax.tree.map(cast, tree)

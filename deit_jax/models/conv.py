"""Convolution with batch norm, for the teachers; batch norm can be folded into the convolution.

Shapes: B batch, H W pixels, C channels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# For each kind of module its convolutions in the order they run: the i-th is followed by the i-th
# batch norm (in name order).
FoldOrders = tuple[tuple[str, ...], ...]


def conv_init(groups: int = 1) -> Callable:
    """Return timm's convolution initialiser, N(0, 2 / fan_out) with the fan-out of one group."""

    def init(key, shape, dtype=jnp.float32):
        fan_out = shape[0] * shape[1] * shape[3] // groups
        return jax.random.normal(key, shape, dtype) * (2.0 / fan_out) ** 0.5

    return init


class BatchNorm(nn.Module):
    """Normalise every channel by the batch's statistics (train) or their running averages.

    Not nn.BatchNorm because that averages the biased variance: PyTorch and TensorFlow average the
    unbiased one. Statistics are float32 even for bfloat16, and those of the global batch: the mean
    over a sharded axis is a collective that XLA inserts.
    """

    epsilon: float
    momentum: float
    zero_init: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        shape, count = (x.shape[-1],), x.size // x.shape[-1]
        scale_init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        scale = self.param("scale", scale_init, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        mean, var = running_mean.value, running_var.value
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if train:
            mean = x.mean((0, 1, 2))
            var = jnp.square(x - mean).mean((0, 1, 2))
        if train and not self.is_initializing():
            keep = self.momentum
            unbiased = var * (count / max(count - 1, 1))
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * unbiased
        x = (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return x.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class ConvNorm:
    """A network's manner of convolving: one call adds a convolution and its batch norm.

    Call it in a compact method, whose module then owns both. `folded` leaves the batch norm out and
    gives the convolution a bias instead; see fold_batch_norm. `momentum` is flax's (1 - PyTorch's).
    """

    epsilon: float
    momentum: float
    folded: bool
    dtype: DTypeLike

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        features: int,
        *,
        train: bool,
        names: tuple[str, str] = ("conv", "bn"),
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        padding: str | int = "SAME",
        zero_init: bool = False,
    ) -> Float[Array, "B h w c"]:
        """Return the normalised convolution; an int pads that much on every side."""
        x = nn.Conv(
            features,
            (kernel, kernel),
            strides=(stride, stride),
            padding=padding,
            feature_group_count=groups,
            use_bias=self.folded,
            dtype=self.dtype,
            kernel_init=conv_init(groups),
            name=names[0],
        )(x)
        if self.folded:
            return x
        return BatchNorm(self.epsilon, self.momentum, zero_init, self.dtype, name=names[1])(
            x, train
        )


def drop_path(
    module: nn.Module, x: Float[Array, "B H W C"], rate: float, train: bool
) -> Float[Array, "B H W C"]:
    """Zero a random subset of examples and scale the rest by 1/keep (rng stream "dropout")."""
    if not train or rate == 0.0:
        return x
    keep = 1.0 - rate
    mask = jax.random.bernoulli(module.make_rng("dropout"), keep, (x.shape[0], 1, 1, 1))
    return jnp.where(mask, x / keep, jnp.zeros_like(x))


def fold_batch_norm(variables: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the float32 params of the `folded=True` twin of a model with these variables.

    The model says how by `bn_epsilon` and `fold_orders`.
    """
    return _fold(variables["params"], variables["batch_stats"], model)


def _fold(params: Mapping[str, Any], stats: Mapping[str, Any], model) -> dict[str, Any]:
    norms = sorted(name for name in stats if "mean" in stats[name])
    convs = _convs_before(params, norms, model.fold_orders)
    folded: dict[str, Any] = {}
    for name, value in params.items():
        if name in convs:
            norm = convs[name]
            folded[name] = _fold_pair(value, params[norm], stats[norm], model.bn_epsilon)
        elif isinstance(value, Mapping) and name not in norms:
            folded[name] = _fold(value, stats.get(name, {}), model)
        elif name not in norms:
            folded[name] = jnp.asarray(value, jnp.float32)
    return folded


def _convs_before(
    params: Mapping[str, Any], norms: list[str], orders: FoldOrders
) -> dict[str, str]:
    """Map each convolution of one module to the batch norm that follows it."""
    if not norms:
        return {}
    present = {name for name, value in params.items() if _is_conv(value)}
    (order,) = (order for order in orders if set(order) == present)
    return dict(zip(order, norms, strict=True))


def _is_conv(value) -> bool:
    return isinstance(value, Mapping) and getattr(value.get("kernel"), "ndim", 0) == 4


def _fold_pair(conv, norm, stats, epsilon: float) -> dict[str, Array]:
    scale, bias, mean, var = (
        jnp.asarray(v, jnp.float32)
        for v in (norm["scale"], norm["bias"], stats["mean"], stats["var"])
    )
    factor = scale / jnp.sqrt(var + epsilon)
    return {
        "kernel": jnp.asarray(conv["kernel"], jnp.float32) * factor,
        "bias": bias - mean * factor,
    }

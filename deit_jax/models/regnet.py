"""RegNetY, DeiT's teacher family (Radosavovic et al. 2020), with timm's layer names.

Shapes: B batch, H W pixels, C channels, K classes.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deit_jax.models import limits
from deit_jax.models.conv import ConvNorm, FoldOrders, conv_init, drop_path
from deit_jax.models.family import Family, ModelSpec
from deit_jax.models.heads import Heads

_NARROWEST = 3  # channels whose quarter, which squeeze-excite goes through, is not rounded to none


@dataclasses.dataclass(frozen=True)
class RegNetVariant:
    """The five numbers from which every stage's width, depth and group count follow."""

    depth: int
    w0: int  # initial width
    wa: float  # slope of the linear width rule
    wm: float  # ratio between the widths of neighbouring stages
    group_width: int

    def stages(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the stages' widths and depths (RegNet eqs. 2-4, then fitted to the groups)."""
        linear = self.w0 + self.wa * np.arange(self.depth)
        exponents = np.round(np.log(linear / self.w0) / np.log(self.wm))
        per_block = np.round(self.w0 * self.wm**exponents / 8) * 8
        widths, depths = np.unique(per_block, return_counts=True)
        fitted = (self._fit(int(width)) for width in widths)
        return tuple(fitted), tuple(int(depth) for depth in depths)

    def _fit(self, width: int) -> int:
        group = min(self.group_width, width)
        return round(width / group) * group


class ConvNormAct(nn.Module):
    """Convolution (`conv`), batch norm (`bn`) and, optionally, ReLU."""

    conv_norm: ConvNorm
    features: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    act: bool = True
    zero_init: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w c"]:
        x = self.conv_norm(
            x,
            self.features,
            train=train,
            kernel=self.kernel,
            stride=self.stride,
            groups=self.groups,
            # PyTorch pads both sides alike; XLA's SAME would pad (0, 1) at stride 2.
            padding=self.kernel // 2,
            zero_init=self.zero_init,
        )
        return jax.nn.relu(x) if self.act else x


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate computed from the image's mean of all channels."""

    hidden: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        def fc(features, name):
            return nn.Conv(features, (1, 1), dtype=self.dtype, kernel_init=conv_init(), name=name)

        gate = x.mean((1, 2), keepdims=True)
        gate = jax.nn.relu(fc(self.hidden, "fc1")(gate))
        return x * jax.nn.sigmoid(fc(x.shape[-1], "fc2")(gate))


class Bottleneck(nn.Module):
    """Residual block: 1x1, grouped 3x3, squeeze-excite, 1x1; a strided 1x1 shortcut if needed."""

    conv_norm: ConvNorm
    width: int
    stride: int
    group_width: int
    drop_path: float

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w c"]:
        def conv(name, **kwargs):
            return ConvNormAct(self.conv_norm, self.width, name=name, **kwargs)

        # The squeeze is a quarter of the block's input, not of the width that it gates.
        squeeze = round(x.shape[-1] * 0.25)
        groups = self.width // self.group_width
        y = conv("conv1")(x, train)
        y = conv("conv2", kernel=3, stride=self.stride, groups=groups)(y, train)
        y = SqueezeExcite(squeeze, self.conv_norm.dtype, name="se")(y)
        y = conv("conv3", act=False, zero_init=True)(y, train)
        if x.shape[-1] != self.width or self.stride != 1:
            x = conv("downsample", stride=self.stride, act=False)(x, train)
        return jax.nn.relu(x + drop_path(self, y, self.drop_path, train))


class Stage(nn.Module):
    """Blocks `b1`, `b2`, ... of one width; the first halves the resolution."""

    conv_norm: ConvNorm
    width: int
    group_width: int
    drop_paths: tuple[float, ...]
    remat: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w c"]:
        block_cls = nn.remat(Bottleneck, static_argnums=(2,)) if self.remat else Bottleneck
        for i, rate in enumerate(self.drop_paths):
            stride = 1 if i else 2
            x = block_cls(
                self.conv_norm, self.width, stride, self.group_width, rate, name=f"b{i + 1}"
            )(x, train)
        return x


class ClassifierHead(nn.Module):
    """Mean over the pixels, then a linear layer (`fc`) where there are classes."""

    num_classes: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        x = x.mean((1, 2))
        if not self.num_classes:
            return x
        init = nn.initializers.normal(0.01)
        fc = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=init, name="fc")
        return fc(x)


class RegNetY(nn.Module):
    """A RegNetY: convolutional stem, stages of bottlenecks with squeeze-excite, linear head.

    `widths`, `depths` and `group_width` replace the variant's own where given, one entry per stage.
    `drop_path` grows linearly from 0 over the blocks. `folded` expects params without batch norm.
    """

    num_classes: int
    variant: str
    widths: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    group_width: int | None = None
    stem_width: int = 32
    stem_stride: int = 2
    drop_path: float = 0.0
    remat: bool = False
    folded: bool = False
    dtype: DTypeLike = jnp.float32
    in_channels: int = 3

    bn_epsilon: ClassVar[float] = 1e-5
    fold_orders: ClassVar[FoldOrders] = (("conv",),)
    VARIANTS: ClassVar[dict[str, RegNetVariant]] = {
        "regnety_002": RegNetVariant(depth=13, w0=24, wa=36.44, wm=2.49, group_width=8),
        "regnety_004": RegNetVariant(depth=16, w0=48, wa=27.89, wm=2.09, group_width=8),
        "regnety_040": RegNetVariant(depth=22, w0=96, wa=31.41, wm=2.24, group_width=64),
        "regnety_080": RegNetVariant(depth=17, w0=192, wa=76.82, wm=2.19, group_width=56),
        "regnety_120": RegNetVariant(depth=19, w0=168, wa=73.36, wm=2.37, group_width=112),
        "regnety_160": RegNetVariant(depth=18, w0=200, wa=106.23, wm=2.48, group_width=112),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.variant not in self.VARIANTS:
            raise ValueError(f"model.variant={self.variant!r} is none of {list(self.VARIANTS)}")
        self._check_fields()
        widths, depths, group_widths = self.stages()
        if len(widths) != len(depths):
            raise ValueError(f"model.widths={widths} and model.depths={depths} differ in length")
        for width, group in zip(widths, group_widths, strict=True):
            if width % group:
                raise ValueError(
                    f"model.widths: {width} is not a multiple of model.group_width={group}"
                )

    def _check_fields(self) -> None:
        limits.check_whole("num_classes", self.num_classes, limits.CLASSES, 0)
        limits.check_whole("in_channels", self.in_channels, limits.CHANNELS)
        limits.check_whole("stem_width", self.stem_width, limits.WIDTH, _NARROWEST)
        limits.check_whole("stem_stride", self.stem_stride, 16)
        limits.check_number("drop_path", self.drop_path, 0, 1)
        if self.group_width is not None:
            limits.check_whole("group_width", self.group_width, limits.WIDTH)
        for key, most in (("widths", limits.WIDTH), ("depths", limits.COUNT // 10)):
            values = getattr(self, key)
            if values is not None and not (isinstance(values, tuple) and 0 < len(values) < 10):
                raise ValueError(f"model.{key}={values!r:.60}: must be a number for each stage")
            for value in values or ():
                limits.check_whole(key, value, most, _NARROWEST if key == "widths" else 1)

    def stages(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the widths, depths and group widths of all stages."""
        variant = self.VARIANTS[self.variant]
        widths, depths = variant.stages()
        widths = widths if self.widths is None else tuple(self.widths)
        depths = depths if self.depths is None else tuple(self.depths)
        group_width = variant.group_width if self.group_width is None else self.group_width
        return widths, depths, tuple(min(group_width, width) for width in widths)

    @property
    def feature_layer(self) -> str:
        """The module whose output are the features: the last stage."""
        return f"s{len(self.stages()[0])}"

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], train: bool = False) -> Heads:
        """Return the float32 logits [B K] for normalised images of any size."""
        conv_norm = ConvNorm(self.bn_epsilon, 0.9, self.folded, self.dtype)
        widths, depths, group_widths = self.stages()
        rates = tuple(float(r) for r in np.linspace(0.0, self.drop_path, sum(depths)))
        x = ConvNormAct(conv_norm, self.stem_width, kernel=3, stride=self.stem_stride, name="stem")(
            images, train
        )
        for i, (width, depth, group_width) in enumerate(
            zip(widths, depths, group_widths, strict=True)
        ):
            mine, rates = rates[:depth], rates[depth:]
            x = Stage(conv_norm, width, group_width, mine, self.remat, name=f"s{i + 1}")(x, train)
        logits = ClassifierHead(self.num_classes, self.dtype, name="head")(x)
        return Heads(logits.astype(jnp.float32), None)


FAMILY = Family(
    cls=RegNetY,
    specs={name: ModelSpec(RegNetY, {"variant": name}) for name in RegNetY.VARIANTS},
    heads=("head/fc",),
    stem="stem/conv",
    # DeiT's teachers (timm 0.3.2) already have today's names.
    block=r"(s\d+\.b\d+)\.",
    count_blocks=lambda model: sum(model.stages()[1]),
)

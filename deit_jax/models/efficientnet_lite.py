"""EfficientNet-Lite: EfficientNet without squeeze-excite, with ReLU6, in timm's layer names.

Shapes: B batch, H W pixels, C channels, K classes.
"""

import dataclasses
import math
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deit_jax.models import limits
from deit_jax.models.conv import ConvNorm, FoldOrders, drop_path
from deit_jax.models.family import Family, ModelSpec
from deit_jax.models.heads import Heads

# Stages of lite0: kernel, stride, expansion, width, blocks.
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_STEM_WIDTH, _HEAD_WIDTH = 32, 1280  # the Lite networks do not scale these


@dataclasses.dataclass(frozen=True)
class LiteVariant:
    """Compound scaling of one network and the resolution it was trained at."""

    width: float
    depth: float
    dropout: float
    image_size: int

    def scale_width(self, width: int) -> int:
        """Return the scaled width, a multiple of 8 that loses at most a tenth."""
        scaled = width * self.width
        rounded = max(8, int(scaled + 4) // 8 * 8)
        return rounded if rounded >= 0.9 * scaled else rounded + 8

    def scale_depth(self, stage: int) -> int:
        """Return the number of blocks of a stage; the first and the last stage never grow."""
        blocks = _STAGES[stage][-1]
        return blocks if stage in (0, len(_STAGES) - 1) else math.ceil(blocks * self.depth)


class InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (depthwise), project (1x1, linear); residual if it fits."""

    conv_norm: ConvNorm
    width: int
    kernel: int
    stride: int
    expansion: int
    drop_path: float

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w c"]:
        def conv(x, features, names, **kwargs):
            return self.conv_norm(x, features, train=train, names=names, **kwargs)

        hidden = x.shape[-1] * self.expansion
        depthwise = {"kernel": self.kernel, "stride": self.stride, "groups": hidden}
        if self.expansion == 1:
            y = jax.nn.relu6(conv(x, hidden, ("conv_dw", "bn1"), **depthwise))
            y = conv(y, self.width, ("conv_pw", "bn2"))
        else:
            y = jax.nn.relu6(conv(x, hidden, ("conv_pw", "bn1")))
            y = jax.nn.relu6(conv(y, hidden, ("conv_dw", "bn2"), **depthwise))
            y = conv(y, self.width, ("conv_pwl", "bn3"))
        if self.stride == 1 and x.shape[-1] == self.width:
            y = x + drop_path(self, y, self.drop_path, train)
        return y


class EfficientNetLite(nn.Module):
    """An EfficientNet-Lite; `folded` expects params without batch norm.

    `drop_path` (TensorFlow's drop-connect) grows linearly over the blocks; `dropout` acts before
    the classifier and is the variant's own if None.
    """

    num_classes: int
    variant: str
    drop_path: float = 0.2
    dropout: float | None = None
    remat: bool = False
    folded: bool = False
    dtype: DTypeLike = jnp.float32
    in_channels: int = 3

    bn_epsilon: ClassVar[float] = 1e-3
    # Names are timm's, which do not pair them up: bn1 follows conv_pw or conv_dw.
    fold_orders: ClassVar[FoldOrders] = (
        ("conv_stem", "conv_head"),
        ("conv_dw", "conv_pw"),
        ("conv_pw", "conv_dw", "conv_pwl"),
    )
    VARIANTS: ClassVar[dict[str, LiteVariant]] = {
        "efficientnet_lite0": LiteVariant(width=1.0, depth=1.0, dropout=0.2, image_size=224),
        "efficientnet_lite1": LiteVariant(width=1.0, depth=1.1, dropout=0.2, image_size=240),
        "efficientnet_lite2": LiteVariant(width=1.1, depth=1.2, dropout=0.3, image_size=260),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.variant not in self.VARIANTS:
            raise ValueError(f"model.variant={self.variant!r} is none of {list(self.VARIANTS)}")
        limits.check_whole("num_classes", self.num_classes, limits.CLASSES, 0)
        limits.check_whole("in_channels", self.in_channels, limits.CHANNELS)
        limits.check_number("drop_path", self.drop_path, 0, 1)
        if self.dropout is not None:
            limits.check_number("dropout", self.dropout, 0, 1)

    def block_indices(self) -> list[tuple[int, int]]:
        """Return (stage, index within the stage) of every block in the order they run."""
        scaling = self.VARIANTS[self.variant]
        stages = range(len(_STAGES))
        return [(stage, i) for stage in stages for i in range(scaling.scale_depth(stage))]

    @property
    def feature_layer(self) -> str:
        """The module whose output are the features: the last block."""
        return "blocks_{}_{}".format(*self.block_indices()[-1])

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], train: bool = False) -> Heads:
        """Return the float32 logits [B K] for normalised images of any size."""
        # The default padding, SAME, is TensorFlow's, which these networks were trained with.
        conv_norm = ConvNorm(self.bn_epsilon, 0.99, self.folded, self.dtype)
        x = conv_norm(
            images, _STEM_WIDTH, train=train, names=("conv_stem", "bn1"), kernel=3, stride=2
        )
        x = self._blocks(conv_norm, jax.nn.relu6(x), train)
        x = conv_norm(x, _HEAD_WIDTH, train=train, names=("conv_head", "bn2"))
        return Heads(self._classify(jax.nn.relu6(x).mean((1, 2)), train), None)

    def _blocks(
        self, conv_norm: ConvNorm, x: Float[Array, "B H W C"], train: bool
    ) -> Float[Array, "B h w c"]:
        scaling = self.VARIANTS[self.variant]
        block_cls = (
            nn.remat(InvertedResidual, static_argnums=(2,)) if self.remat else InvertedResidual
        )
        blocks = self.block_indices()
        for index, (stage, i) in enumerate(blocks):
            kernel, stride, expansion, width, _ = _STAGES[stage]
            x = block_cls(
                conv_norm,
                scaling.scale_width(width),
                kernel,
                1 if i else stride,
                expansion,
                self.drop_path * index / len(blocks),
                name=f"blocks_{stage}_{i}",
            )(x, train)
        return x

    def _classify(self, x: Float[Array, "B C"], train: bool) -> Float[Array, "B K"]:
        rate = self.VARIANTS[self.variant].dropout if self.dropout is None else self.dropout
        x = nn.Dropout(rate, deterministic=not train)(x)
        if not self.num_classes:
            return x.astype(jnp.float32)
        # timm: U(+-1/sqrt(fan_in + fan_out)), with fan_in left at 0 for the classifier.
        bound = self.num_classes**-0.5
        classifier = nn.Dense(
            self.num_classes,
            dtype=self.dtype,
            kernel_init=lambda key, shape, dtype: jax.random.uniform(
                key, shape, dtype, -bound, bound
            ),
            name="classifier",
        )
        return classifier(x).astype(jnp.float32)


# PyPI's efficientnet_lite_pytorch, once its flat block index is split into stage and index. The
# first block has no expansion, so its batch norms count from one later.
_PYPI_NAMES = (
    ("conv_stem", "_conv_stem"),
    ("bn1", "_bn0"),
    ("blocks.0.0.conv_dw", "_blocks.0.0._depthwise_conv"),
    ("blocks.0.0.bn1", "_blocks.0.0._bn1"),
    ("blocks.0.0.conv_pw", "_blocks.0.0._project_conv"),
    ("blocks.0.0.bn2", "_blocks.0.0._bn2"),
    ("blocks.#.#.conv_pw", "_blocks.#.#._expand_conv"),
    ("blocks.#.#.bn1", "_blocks.#.#._bn0"),
    ("blocks.#.#.conv_dw", "_blocks.#.#._depthwise_conv"),
    ("blocks.#.#.bn2", "_blocks.#.#._bn1"),
    ("blocks.#.#.conv_pwl", "_blocks.#.#._project_conv"),
    ("blocks.#.#.bn3", "_blocks.#.#._bn2"),
    ("conv_head", "_conv_head"),
    ("bn2", "_bn1"),
    ("classifier", "_fc"),
)


def _split_index(name: str, model: EfficientNetLite) -> str:
    """Return `_blocks.stage.index.…` for `_blocks.number.…`; other names as they are."""
    blocks = model.block_indices()

    def stage_and_index(match: re.Match[str]) -> str:
        number = int(match[0])
        return "{}.{}".format(*blocks[number]) if number < len(blocks) else match[0]

    return re.sub(r"(?<=^_blocks\.)\d+", stage_and_index, name)


def _spec(name: str) -> ModelSpec:
    half = (0.5, 0.5, 0.5)
    size = EfficientNetLite.VARIANTS[name].image_size
    return ModelSpec(EfficientNetLite, {"variant": name}, size, mean=half, std=half)


FAMILY = Family(
    cls=EfficientNetLite,
    specs={name: _spec(name) for name in EfficientNetLite.VARIANTS},
    heads=("classifier",),
    stem="conv_stem",
    aliases=_PYPI_NAMES,
    rewrite=_split_index,
    block=r"(_blocks\.\d+|blocks\.\d+\.\d+)\.",
    count_blocks=lambda model: len(model.block_indices()),
)

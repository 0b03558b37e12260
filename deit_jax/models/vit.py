"""DeiT's vision transformer: patches, self-attention, class and distillation tokens.

Layer names are timm's, so that a parameter path reads `blocks_0/attn/qkv/kernel`.
Shapes: B batch, H W pixels, C channels, N tokens, D width, K classes.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from deit_jax.models import attention, kernels, limits
from deit_jax.models.heads import Heads
from deit_jax.shapes import Size, input_shape, sides

# timm's trunc_normal_(std=.02) cuts at an absolute +-2, which is 100 sigma: a plain normal. JAX's
# truncated_normal(.02) would cut at +-2 sigma and lose 12% of the standard deviation.
INIT = nn.initializers.normal(0.02)
Dense = functools.partial(nn.Dense, kernel_init=INIT, dot_general=kernels.dense_product)


def _conv_init(fan_in: int) -> Callable:
    """Return PyTorch's default convolution initialiser, U(+-1/sqrt(fan_in)), which DeiT keeps."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each to a token, row by row."""

    patch_size: int
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B N D"]:
        size = self.patch_size
        x = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=size, q=size)
        shape = (size, size, images.shape[-1], self.width)
        return PatchProjection(shape, self.dtype, name="proj")(x)


class PatchProjection(nn.Module):
    """Multiply flattened patches with the kernel [P P C D] of a convolution.

    A convolution with such a kernel and stride is this one product. GPUs tune it for long, and a
    CPU turns all images for its gradient; on a TPU they differ by a thousandth of a step.
    """

    shape: tuple[int, int, int, int]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B N K"]) -> Float[Array, "B N D"]:
        init = _conv_init(x.shape[-1])
        kernel = self.param("kernel", init, self.shape)
        bias = self.param("bias", init, self.shape[-1:])
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return kernels.product(x, kernel.reshape(x.shape[-1], -1)) + bias


class LayerNorm(nn.Module):
    """Normalise every token, by kernels.layer_norm."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return kernels.layer_norm(x.astype(self.dtype), scale, bias)


class QKV(nn.Module):
    """Project tokens to queries, keys and values with timm's packed kernel [D 3D] and bias [3D].

    It packs [all q | all k | all v], head-major inside each.
    """

    num_heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> tuple[Float[Array, "B N heads d"], ...]:
        width = x.shape[-1]
        kernel = self.param("kernel", INIT, (width, 3 * width))
        bias = self.param("bias", nn.initializers.zeros, (3 * width,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        # The kernel is taken apart, not its product: no activation is rearranged, on one device nor
        # between several. By slices: a reshape would have it, and all that the update reads and
        # writes for it, in another layout than the state's.
        parts = zip(jnp.split(kernel, 3, axis=1), jnp.split(bias, 3), strict=True)
        return tuple(
            rearrange(
                kernels.product(x, part) + offset,
                "b n (heads d) -> b n heads d",
                heads=self.num_heads,
            )
            for part, offset in parts
        )


class Attention(nn.Module):
    """Multi-head self-attention, `kernel` being one of attention.CHOICES."""

    num_heads: int
    dtype: DTypeLike
    kernel: str

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        width = x.shape[-1]
        q, k, v = QKV(self.num_heads, self.dtype, name="qkv")(x)
        out = attention.attention(q, k, v, self.kernel)
        out = rearrange(out, "b n heads d -> b n (heads d)")
        return Dense(width, dtype=self.dtype, name="proj")(out)


class Mlp(nn.Module):
    """Two dense layers with an exact (erf) GELU between them."""

    hidden: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], train: bool) -> Float[Array, "B N D"]:
        width = x.shape[-1]
        x = Dense(self.hidden, dtype=self.dtype, name="fc1")(x)
        x = kernels.gelu(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Dense(width, dtype=self.dtype, name="fc2")(x)


def drop_path_scales(
    key: Key[Array, ""], rates: Sequence[float], batch: int
) -> Float[Array, "B branches"]:
    """Draw stochastic depth: 0 for a residual branch that an example does without, else 1 / keep.

    `rates` has one entry per block, each of which has two branches.
    """
    keep = 1.0 - jnp.repeat(jnp.array(rates, jnp.float32), 2)
    # One draw for all branches: as many random numbers as needed, and one small program.
    return jax.random.bernoulli(key, keep, (batch, len(keep))) / keep


class LayerScale(nn.Module):
    """Multiply every channel by a learned factor (DeiT III)."""

    init: float  # type: ignore[assignment]  # takes the place of Module.init, which nobody calls

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        gamma = self.param("gamma", nn.initializers.constant(self.init), (x.shape[-1],))
        return x * gamma.astype(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: x += DropPath(MSA(LN(x))), x += DropPath(MLP(LN(x)))."""

    num_heads: int
    mlp_ratio: float
    dropout: float
    layer_scale: float | None
    attention: str
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], train: bool, scales: Float[Array, "B 2"] | None
    ) -> Float[Array, "B N D"]:
        def norm(name):
            return LayerNorm(self.dtype, name=name)

        def residual(x, branch, index):
            branch = nn.Dropout(self.dropout, deterministic=not train)(branch)
            if self.layer_scale is not None:
                branch = LayerScale(self.layer_scale, name=f"ls{index}")(branch)
            if scales is not None:  # of DropPath, in float32: 1 / keep would lose in bfloat16
                branch = (branch * scales[:, index - 1, None, None]).astype(branch.dtype)
            return x + branch

        attend = Attention(self.num_heads, self.dtype, self.attention, name="attn")
        x = residual(x, attend(norm("norm1")(x)), 1)
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.dropout, self.dtype, name="mlp")
        return residual(x, mlp(norm("norm2")(x), train), 2)


class VisionTransformer(nn.Module):
    """A DeiT: patches and learned tokens through `depth` blocks, then one linear head per token.

    `distilled` adds the distillation token and its head (`dist_head=False`: the token alone, as in
    Hugging Face's DeiTForImageClassification). `class_position=False` gives the position
    embedding to the patches alone (DeiT III). `drop_path` grows linearly from 0 over the depth
    (DeiT) or, with `constant_drop_path`, is the same everywhere (DeiT III). `attention` is which
    kernel computes it, one of attention.CHOICES; no weight depends on it. `image_size` is the side
    of square images, or (height, width).
    """

    num_classes: int
    image_size: Size
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    distilled: bool = False
    dist_head: bool = True
    class_position: bool = True
    layer_scale: float | None = None
    drop_path: float = 0.0
    constant_drop_path: bool = False
    dropout: float = 0.0
    remat: bool = False
    attention: str = "auto"
    dtype: DTypeLike = jnp.float32
    in_channels: int = 3

    def __post_init__(self):
        super().__post_init__()
        self._check_fields()
        if self.width % self.num_heads:
            raise ValueError(
                f"model.width={self.width} is not a multiple of model.num_heads={self.num_heads}"
            )
        if min(sides(self.image_size)) < self.patch_size:
            raise ValueError(
                f"model.image_size={self.image_size} is smaller than one patch "
                f"(model.patch_size={self.patch_size})"
            )
        if any(side % self.patch_size for side in sides(self.image_size)):
            raise ValueError(
                f"model.image_size={self.image_size} is not a multiple of "
                f"model.patch_size={self.patch_size}"
            )

    def _check_fields(self) -> None:
        if self.attention not in attention.CHOICES:
            choices = ", ".join(attention.CHOICES)
            raise ValueError(f"model.attention={self.attention!r:.60}: choose one of {choices}")
        limits.check_sides(self.image_size)
        limits.check_whole("num_classes", self.num_classes, limits.CLASSES, 0)
        for key, most in (
            ("in_channels", limits.CHANNELS),
            ("patch_size", limits.SIDE),
            ("width", limits.WIDTH),
            ("depth", limits.COUNT),
            ("num_heads", limits.WIDTH),
        ):
            limits.check_whole(key, getattr(self, key), most)
        limits.check_number("mlp_ratio", self.mlp_ratio, 1 / self.width, 64)
        for key in ("drop_path", "dropout"):
            limits.check_number(key, getattr(self, key), 0, 1)
        if self.layer_scale is not None:
            limits.check_number("layer_scale", self.layer_scale, 0, 1000)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches along the height and along the width."""
        height, width = sides(self.image_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return math.prod(self.grid_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Learned tokens in front of the patches: class, then distillation."""
        return 1 + self.distilled

    @property
    def feature_layer(self) -> str:
        """The module whose output are the features: the last block."""
        return f"blocks_{self.depth - 1}"

    def attention_shape(self, batch: int) -> tuple[int, int, int, int]:
        """Return the shape [B N heads d] of the queries for so many images."""
        tokens = self.num_patches + self.num_prefix_tokens
        return batch, tokens, self.num_heads, self.width // self.num_heads

    def drop_path_rates(self) -> list[float]:
        """Return the stochastic-depth rate of every block."""
        if self.constant_drop_path or self.depth == 1:
            return [self.drop_path] * self.depth
        return [self.drop_path * i / (self.depth - 1) for i in range(self.depth)]

    def pool(self, params, tokens: Float[Array, "B N D"], which: str) -> Float[Array, "B D"]:
        """Return float32 features of the tokens that left the last block, after the last norm.

        `which` is "token", the distillation token or, without one, the class token, "cls" or
        "patches", the mean of all patches.
        """
        prefix = self.num_prefix_tokens
        first, stop = {"token": (prefix - 1, prefix), "cls": (0, 1), "patches": (prefix, None)}[
            which
        ]
        tokens = tokens[:, first:stop].astype(self.dtype)
        normed = kernels.layer_norm(tokens, params["norm"]["scale"], params["norm"]["bias"])
        return normed.astype(jnp.float32).mean(axis=1)

    def draw_scales(self, key: Key[Array, ""], batch: int) -> Float[Array, "B branches"] | None:
        """Return the stochastic depth of a batch, None without any."""
        return drop_path_scales(key, self.drop_path_rates(), batch) if self.drop_path else None

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B H W C"],
        train: bool = False,
        scales: Float[Array, "B branches"] | None = None,
    ) -> Heads:
        """Return the float32 logits [B K] of each head for normalised images.

        With `num_classes=0` there is no head: each token [B D] after the norm, as in timm.

        In training `scales` is what `draw_scales` returns; drawn here where it is not given.
        """
        expected = input_shape(self, self.image_size, images.shape[0])
        if images.shape != expected:
            raise ValueError(f"expected images of shape {expected}, got {images.shape}")
        x = PatchEmbed(self.patch_size, self.width, self.dtype, name="patch_embed")(images)
        x = self._add_tokens_and_positions(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        block_cls = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        if train and scales is None and self.drop_path:
            scales = self.draw_scales(self.make_rng("dropout"), len(x))
        for i in range(self.depth):
            x = block_cls(
                num_heads=self.num_heads,
                mlp_ratio=self.mlp_ratio,
                dropout=self.dropout,
                layer_scale=self.layer_scale,
                attention=self.attention,
                dtype=self.dtype,
                name=f"blocks_{i}",
            )(x, train, None if scales is None else scales[:, 2 * i : 2 * i + 2])
        x = x[:, : self.num_prefix_tokens]  # the norm acts per token: patches are no longer needed
        x = LayerNorm(self.dtype, name="norm")(x)
        two_heads = self.distilled and self.dist_head
        dist = self._head("head_dist", x[:, 1]) if two_heads else None
        return Heads(self._head("head", x[:, 0]), dist)

    def _head(self, name: str, token: Float[Array, "B D"]) -> Float[Array, "B K"]:
        if not self.num_classes:
            return token.astype(jnp.float32)
        # Logits leave in float32: a bfloat16 cross-entropy loses the tail of the softmax.
        return Dense(self.num_classes, dtype=self.dtype, name=name)(token).astype(jnp.float32)

    def _add_tokens_and_positions(self, x: Float[Array, "B N D"]) -> Float[Array, "B M D"]:
        patches = x.shape[1]
        tokens = [self.param("cls_token", INIT, (1, 1, self.width))]
        if self.distilled:
            tokens.append(self.param("dist_token", INIT, (1, 1, self.width)))
        prefix = jnp.concatenate(tokens, axis=1).astype(self.dtype)
        prefix = jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape[1:]))
        positions = patches + (self.num_prefix_tokens if self.class_position else 0)
        pos_embed = self.param("pos_embed", INIT, (1, positions, self.width)).astype(self.dtype)
        if self.class_position:
            return jnp.concatenate([prefix, x], axis=1) + pos_embed
        return jnp.concatenate([prefix, x + pos_embed], axis=1)

"""Features of a model: the tokens that leave its blocks, and what its heads would be given.

model, params, spec = deit_jax.load("runs/mine", return_spec=True)
images = deit_jax.preprocess(["a.jpg", "b.jpg"], spec)
tokens = deit_jax.features(model, params, images, layers=-1)     # [2 N D], class token first
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deit_jax.analysis.attention import block_outputs
from deit_jax.errors import UserError
from deit_jax.models import vit
from deit_jax.models.vit import VisionTransformer


def features(
    model,
    params,
    images: Float[Array, "B H W C"] | Float[np.ndarray, "B H W C"],
    layers: int | Sequence[int] | None = None,
    norm: bool = True,
) -> Float[Array, "B N D"] | list[Float[Array, "B N D"]]:
    """Return all tokens, float32, as they leave one block, several in a list, or with None all.

    Blocks count from 0, from the end -1, as in timm's forward_intermediates. `norm` applies the
    model's last norm, also to those of earlier blocks. Tokens are in the model's order: class,
    distillation (of a distilled model), patches row by row. Raise UserError for a model without
    blocks, and for a block that it does not have.
    """
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"features: a {type(model).__name__} has no tokens; what its head is given is what a "
            "model of num_classes=0 returns"
        )
    images = jnp.asarray(images)
    if isinstance(layers, int):
        return _tokens(model, params, images, [layers], norm)[0]
    return _tokens(model, params, images, range(model.depth) if layers is None else layers, norm)


def _tokens(
    model: VisionTransformer, params, images, layers: Sequence[int], norm: bool
) -> list[Float[Array, "B N D"]]:
    wanted = [_block(model, i) for i in layers]
    every = block_outputs(model, params, images)
    outputs: list[Any] = [every[i] for i in wanted]
    if norm:
        layer = vit.LayerNorm(model.dtype)
        outputs = [layer.apply({"params": params["norm"]}, x) for x in outputs]
    return [x.astype(jnp.float32) for x in outputs]


def _block(model: VisionTransformer, index: int) -> int:
    if not -model.depth <= index < model.depth:
        raise UserError(
            f"layer {index}: the model has {model.depth} blocks; choose 0 … {model.depth - 1}, or "
            f"-1 … -{model.depth} from the end"
        )
    return index % model.depth


def embedder(model, kind: str, layer: int = -1, norm: bool = True) -> Callable[..., jax.Array]:
    """Return the function (variables, images) -> one of choices.FEATURES of every image, float32.

    [B D], of patches and tokens [B N D]. A convnet has `pooled` alone, of its last layer. Raise
    UserError for what the model does not have.
    """
    if not isinstance(model, VisionTransformer):
        if kind != "pooled" or layer != -1 or not norm:
            raise UserError(
                f"a {type(model).__name__} has no tokens and no blocks to choose; take "
                "--features=pooled of its last layer"
            )
        headless = model.clone(num_classes=0)
        return lambda variables, images: headless.apply(variables, images, train=False).fused()
    if kind == "dist" and not model.distilled:
        raise UserError(f"{kind}: the model has no distillation token; take --features=cls")
    block, prefix = _block(model, layer), model.num_prefix_tokens
    pooled = prefix if model.distilled and model.dist_head else 1
    parts: dict[str, Callable[[jax.Array], jax.Array]] = {
        "pooled": lambda x: x[:, :pooled].mean(axis=1),
        "cls": lambda x: x[:, 0],
        "dist": lambda x: x[:, 1],
        "mean": lambda x: x[:, prefix:].mean(axis=1),
        "patches": lambda x: x[:, prefix:],
        "tokens": lambda x: x,
    }
    return lambda v, images: parts[kind](_tokens(model, v["params"], images, [block], norm)[0])

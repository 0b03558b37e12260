"""Attention maps, token features and their cosines, disagreement: views into a trained DeiT.

    model, params = deit_jax.load("runs/quickstart")
    maps = analysis.attention_maps(model, params, images)      # what each token reads, every head
    seen = analysis.rollout(maps)[:, 1, 2:]                    # the distillation token, all layers

Images are those that the model takes: float, normalised, [B H W C]. Tokens are in its own order:
class, distillation (of a distilled model), patches row by row.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deit_jax.models import vit
from deit_jax.models.attention_maps import log_attention
from deit_jax.models.vit import VisionTransformer
from deit_jax.shapes import Size, sides


def attention_maps(
    model: VisionTransformer, params, images: Float[Array, "B H W C"]
) -> Float[Array, "B depth heads N N"]:
    """Return how much of each token [last axis] every token reads; rows sum to 1."""
    blocks = log_attention(model, {"params": params}, images)
    return jnp.exp(jnp.stack(blocks, axis=1))


def rollout(maps: Float[Array, "B depth heads N N"]) -> Float[Array, "B N N"]:
    """Return how much of each token of the input every token of the output consists of.

    Attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928): heads averaged, half of each layer
    is the residual connection, layers multiplied.
    """
    layers = 0.5 * maps.mean(axis=2) + 0.5 * jnp.eye(maps.shape[-1])
    mixed = layers[:, 0]
    for i in range(1, layers.shape[1]):
        mixed = layers[:, i] @ mixed
    return mixed


def token_features(
    model: VisionTransformer, params, images: Float[Array, "B H W C"]
) -> Float[Array, "B layers T D"]:
    """Return the learned tokens, float32, as they enter the first block and leave every one.

    T is 2 of a distilled model and else 1; layers is 1 + depth.
    """
    caught = block_outputs(model, params, images)
    prefix = [params[name][0, 0] for name in ("cls_token", "dist_token")[: model.num_prefix_tokens]]
    start = jnp.stack(prefix)
    if model.class_position:
        start = start + params["pos_embed"][0, : len(prefix)]
    first = jnp.broadcast_to(start, (len(images), *start.shape))
    return jnp.stack([first, *(x[:, : len(prefix)] for x in caught)], axis=1).astype(jnp.float32)


def block_outputs(model, params, images) -> list[Float[Array, "B N D"]]:
    """Return all tokens as they leave every block."""
    _, caught = model.apply(
        {"params": params},
        images,
        train=False,
        capture_intermediates=lambda module, _: isinstance(module, vit.Block),
        mutable=["intermediates"],
    )
    return [caught["intermediates"][f"blocks_{i}"]["__call__"][0] for i in range(model.depth)]


def token_cosines(features: Float[Array, "B layers 2 D"]) -> Float[Array, "layers"]:
    """Return the cosine of class and distillation token at every layer, averaged over images.

    DeiT, section 5.2: 0.06 between the learned tokens, growing to 0.93 after the last block.
    """
    unit = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
    return jnp.sum(unit[:, :, 0] * unit[:, :, 1], axis=-1).mean(axis=0)


def learned_cosine(params) -> float:
    """Return the cosine of the learned class and distillation tokens, before any position."""
    a, b = (np.ravel(np.asarray(params[k], np.float64)) for k in ("cls_token", "dist_token"))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def disagreement(predictions: Mapping[str, Int[np.ndarray, "n"]]) -> Float[np.ndarray, "k k"]:
    """Return the share of images on which each two classifiers differ (DeiT, table 4)."""
    labels = np.stack([np.asarray(p) for p in predictions.values()])
    return (labels[:, None] != labels[None]).mean(axis=-1)


def position_similarity(model: VisionTransformer, params) -> Float[np.ndarray, "P P"]:
    """Return the cosine of every two patches' position embeddings."""
    embedding = np.asarray(params["pos_embed"][0], np.float64)[-model.num_patches :]
    unit = embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)
    return unit @ unit.T


def patch_filters(params, count: int = 28) -> Float[np.ndarray, "n p p C"]:
    """Return the principal components of the patch embedding's filters, each scaled to [0, 1].

    The first explain most, as in figure 7 of the ViT paper (arXiv 2010.11929).
    """
    kernel = np.asarray(params["patch_embed"]["proj"]["kernel"], np.float64)
    flat = kernel.reshape(-1, kernel.shape[-1]).T
    _, _, components = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    found = components[:count].reshape(-1, *kernel.shape[:-1])
    low, high = (f(found, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    return (found - low) / np.maximum(high - low, 1e-12)


def attention_on_image(
    weights: Float[Array, "*batch P"], image_size: Size
) -> Float[Array, "*batch H W"]:
    """Spread one row of attention over patches to pixels, nearest patch, its largest weight 1."""
    height, width = sides(image_size)
    rows = round((weights.shape[-1] * height / width) ** 0.5)
    grid = weights.reshape(*weights.shape[:-1], rows, -1)
    grid = grid / jnp.maximum(grid.max(axis=(-2, -1), keepdims=True), 1e-12)
    shape = (*grid.shape[:-2], height, width)
    return jax.image.resize(grid, shape, "nearest")

"""DeiT, DeiT III and ViT: the variants of the vision transformer, its tensors' names elsewhere."""

import dataclasses
import re
from typing import Any

from deit_jax.models.family import HALF, Family, ModelSpec
from deit_jax.models.vit import VisionTransformer

DEIT_NAMES = (
    ("blocks.#.ls1.gamma", "blocks.#.gamma_1"),
    ("blocks.#.ls2.gamma", "blocks.#.gamma_2"),
)
# Hugging Face, without the leading "deit.", "vit." or "beit.": as in files, then as modules of
# transformers 5, whose state_dict() differs from what it saves.
HUGGING_FACE_NAMES = (
    ("cls_token", "embeddings.cls_token"),
    ("dist_token", "embeddings.distillation_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("blocks.#.norm1", "encoder.layer.#.layernorm_before", "layers.#.layernorm_before"),
    ("blocks.#.attn.q", "encoder.layer.#.attention.attention.query", "layers.#.attention.q_proj"),
    ("blocks.#.attn.k", "encoder.layer.#.attention.attention.key", "layers.#.attention.k_proj"),
    ("blocks.#.attn.v", "encoder.layer.#.attention.attention.value", "layers.#.attention.v_proj"),
    ("blocks.#.attn.proj", "encoder.layer.#.attention.output.dense", "layers.#.attention.o_proj"),
    ("blocks.#.norm2", "encoder.layer.#.layernorm_after", "layers.#.layernorm_after"),
    ("blocks.#.mlp.fc1", "encoder.layer.#.intermediate.dense", "layers.#.mlp.fc1"),
    ("blocks.#.mlp.fc2", "encoder.layer.#.output.dense", "layers.#.mlp.fc2"),
    ("blocks.#.ls1.gamma", "encoder.layer.#.lambda_1", "layers.#.lambda_1"),  # BEiT's
    ("blocks.#.ls2.gamma", "encoder.layer.#.lambda_2", "layers.#.lambda_2"),
    ("norm", "layernorm"),
    ("head", "cls_classifier", "classifier"),
    ("head_dist", "distillation_classifier"),
)
# Google's vision_transformer and big_vision, dots for slashes, `weight` for kernel and scale.
_GOOGLE_BLOCK = "Transformer.encoderblock_#"
GOOGLE_NAMES = (
    ("cls_token", "cls"),
    ("pos_embed", "pos_embedding", "Transformer.posembed_input.pos_embedding"),
    ("patch_embed.proj", "embedding"),
    ("blocks.#.norm1", f"{_GOOGLE_BLOCK}.LayerNorm_0"),
    *(
        (f"blocks.#.attn.{ours}", *(f"{_GOOGLE_BLOCK}.{attention}.{theirs}" for attention in both))
        for both in [[f"MultiHeadDotProductAttention_{i}" for i in (0, 1)]]
        for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value"), ("proj", "out"))
    ),
    ("blocks.#.norm2", f"{_GOOGLE_BLOCK}.LayerNorm_1", f"{_GOOGLE_BLOCK}.LayerNorm_2"),
    *(
        (f"blocks.#.mlp.fc{i + 1}", *(f"{_GOOGLE_BLOCK}.MlpBlock_{n}.Dense_{i}" for n in (0, 3)))
        for i in (0, 1)
    ),
    ("norm", "Transformer.encoder_norm"),
)


def _vit(image_size: int, crop_ratio: float = 0.875, **kwargs) -> ModelSpec:
    kwargs = {"patch_size": 16, "depth": 12, "image_size": image_size, **kwargs}
    return ModelSpec(VisionTransformer, kwargs, image_size, crop_ratio=crop_ratio)


def _deit3(image_size: int, **kwargs) -> ModelSpec:
    # DeiT III: LayerScale, no position for the class token, constant stochastic depth.
    return _vit(
        image_size,
        crop_ratio=1.0,
        class_position=False,
        layer_scale=1e-4,
        constant_drop_path=True,
        **kwargs,
    )


def _specs() -> dict[str, ModelSpec]:
    specs = {}
    sizes = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
    for size, (width, heads) in sizes.items():
        for image_size in (224, 384) if size == "base" else (224,):
            for infix, distilled in (("", False), ("_distilled", True)):
                name = f"deit_{size}{infix}_patch16_{image_size}"
                specs[name] = _vit(image_size, width=width, num_heads=heads, distilled=distilled)
    deit3: dict[str, dict[str, Any]] = {
        "small": {"width": 384, "num_heads": 6},
        "medium": {"width": 512, "num_heads": 8},
        "base": {"width": 768, "num_heads": 12},
        "large": {"width": 1024, "num_heads": 16, "depth": 24},
    }
    for size, kwargs in deit3.items():
        for image_size in (224, 384):
            specs[f"deit3_{size}_patch16_{image_size}"] = _deit3(image_size, **kwargs)
    specs["deit3_huge_patch14_224"] = _deit3(224, width=1280, num_heads=16, depth=32, patch_size=14)
    return specs | _plain_vits()


def _plain_vits() -> dict[str, ModelSpec]:
    """Return timm's plain ViTs: DeiT's architecture, other patches and another convention."""
    shapes: dict[str, dict[str, Any]] = {
        "tiny": {"width": 192, "num_heads": 3},
        "small": {"width": 384, "num_heads": 6},
        "base": {"width": 768, "num_heads": 12},
        "large": {"width": 1024, "num_heads": 16, "depth": 24},
    }
    both = (224, 384)
    patches: dict[str, dict[int, tuple[int, ...]]] = {
        "tiny": {16: both},
        "small": {8: (224,), 16: both, 32: both},
        "base": {8: (224,), 16: both, 32: both},
        "large": {14: (224,), 16: both, 32: both},
    }
    specs = {}
    for size, by_patch in patches.items():
        for patch, image_sizes in by_patch.items():
            for image_size in image_sizes:
                name = f"vit_{size}_patch{patch}_{image_size}"
                crop = 0.9 if image_size == 224 else 1.0
                spec = _vit(image_size, crop, patch_size=patch, **shapes[size])
                # timm's first weights of this name are DINO's, which has ImageNet's mean and std.
                if name != "vit_small_patch8_224":
                    spec = dataclasses.replace(spec, mean=HALF, std=HALF)
                specs[name] = spec
    return specs


FAMILY = Family(
    cls=VisionTransformer,
    specs=_specs(),
    heads=("head", "head_dist"),
    stem="patch_embed/proj",
    aliases=DEIT_NAMES + HUGGING_FACE_NAMES + GOOGLE_NAMES,
    rewrite=lambda name, model: re.sub(r"^(deit|vit|beit)\.", "", name),
)

"""Model names (timm's) and what stands behind each: architecture and input convention."""

import dataclasses
import difflib
import fnmatch
from typing import Any

from flax import linen as nn

from deit_jax.models.efficientnet_lite import EfficientNetLite
from deit_jax.models.regnet import RegNetY
from deit_jax.models.vit import VisionTransformer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Architecture, its arguments, and the input that published weights of this name expect."""

    cls: type[nn.Module]
    kwargs: dict[str, Any]
    image_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_ratio: float = 0.875  # evaluation: shorter side = image_size / crop_ratio


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
    deit3 = {
        "small": {"width": 384, "num_heads": 6},
        "medium": {"width": 512, "num_heads": 8},
        "base": {"width": 768, "num_heads": 12},
        "large": {"width": 1024, "num_heads": 16, "depth": 24},
    }
    for size, kwargs in deit3.items():
        for image_size in (224, 384):
            specs[f"deit3_{size}_patch16_{image_size}"] = _deit3(image_size, **kwargs)
    specs["deit3_huge_patch14_224"] = _deit3(224, width=1280, num_heads=16, depth=32, patch_size=14)
    for name in RegNetY.VARIANTS:
        specs[name] = ModelSpec(RegNetY, {"variant": name})
    for name in EfficientNetLite.VARIANTS:
        specs[name] = ModelSpec(
            EfficientNetLite,
            {"variant": name},
            image_size=EfficientNetLite.VARIANTS[name].image_size,
            mean=HALF,
            std=HALF,
        )
    return specs


SPECS = _specs()


def list_models(pattern: str = "*") -> list[str]:
    """Return the registered names that match a shell pattern such as `deit_*distilled*`."""
    return sorted(fnmatch.filter(SPECS, pattern))


def get_spec(name: str) -> ModelSpec:
    """Return the spec of a registered name; raise ValueError with the nearest names otherwise."""
    if name not in SPECS:
        close = difflib.get_close_matches(name, SPECS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else "see deit_jax.list_models()"
        raise ValueError(f"unknown model {name!r}: {hint}")
    return SPECS[name]


def create_model(name: str, num_classes: int = 1000, **overrides: Any) -> nn.Module:
    """Build the Flax module of a registered name; overrides replace its architecture's fields.

    Raise ValueError for an unknown name or a field that the architecture does not have.
    """
    spec = get_spec(name)
    fields = {f.name for f in dataclasses.fields(spec.cls)} - {"parent", "name"}
    for key, value in overrides.items():
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise ValueError(
                f"model.{key}={value!r:.60}: {name} has no such field; leave it out "
                f"(it has {known})"
            )
    return spec.cls(num_classes=num_classes, **(spec.kwargs | overrides))

"""What transformers' image processors do, by the preprocessor_config.json of a folder."""

import math
import re
from typing import Any

from deit_jax.models.family import HALF
from deit_jax.weights.claims import as_tuple, is_number, must

_FILE = "preprocessor_config.json"
_RESAMPLE = {0: "nearest", 1: "Lanczos", 2: "bilinear", 4: "box", 5: "Hamming"}  # Pillow's numbers
_BICUBIC = 3
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_PLAIN = {
    **{"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False},
    **{"image_mean": HALF, "image_std": HALF, "resample": _BICUBIC, "rescale_factor": 1 / 255},
    **{"size": 224, "crop_size": 224},
}
_CLIP = {"image_mean": _CLIP_MEAN, "image_std": _CLIP_STD, "do_center_crop": True}
_FLAGS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop")
# What each does where the file says nothing; the file of a model whose processor has no name is
# read by that of its own kind.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": _PLAIN | {"resample": 2},
    "DeiT": _PLAIN | {"do_center_crop": True, "size": 256},
    "Beit": _PLAIN,
    "Bit": _PLAIN | _CLIP,
    "CLIP": _PLAIN | _CLIP,
}
_OF_MODEL = {"vit": "ViT", "deit": "DeiT", "beit": "Beit"}
_KEEP_SHAPE = ("Bit", "CLIP")  # a size of one number is the shorter side's


def of_processor(inputs: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Return the fields of Metadata; raise ValueError for what is not known.

    A flag that is null is off, as in transformers.
    """
    kind, notes = _kind(inputs, model_type)
    inputs = _DEFAULTS[kind] | inputs
    for key in _FLAGS:
        must(
            inputs[key] is None or isinstance(inputs[key], bool), key, inputs[key], "true or false"
        )
    mean, std = _normalization(inputs)
    reading, ratio = {}, 1.0
    if inputs["do_resize"]:
        size = _sides("size", inputs["size"], square=kind not in _KEEP_SHAPE)
        notes += _resampling(inputs["resample"])
        if inputs["do_center_crop"]:
            ratio = _ratio(_sides("crop_size", inputs["crop_size"]), size)
            notes += _squashed(size)
        elif "height" in size:
            reading = {"resize": "squash"}
    else:
        notes.append(f"do_resize false in {_FILE}; images are resized here")
    known: dict[str, Any] = {"mean": mean, "std": std, "crop_ratio": ratio}
    return known | {"reading": reading, "notes": tuple(notes)}


def _resampling(way: Any) -> list[str]:
    must(way == _BICUBIC or way in [*_RESAMPLE], "resample", way, "a number from 0 to 5")
    if way == _BICUBIC:
        return []
    said = f"resample {way} ({_RESAMPLE[way]}) in {_FILE}"
    return [f"{said}; images are resized bicubic here"]


def _squashed(size: dict[str, Any]) -> list[str]:
    if "height" not in size:
        return []
    shape = f"{size['height']}x{size['width']}"
    said = f"{_FILE} has images squashed to {shape} before the crop"
    return [f"{said}; here they keep their shape"]


def _kind(inputs: dict[str, Any], model_type: str) -> tuple[str, list[str]]:
    """Return which of _DEFAULTS a file is read by, and notes on it."""
    own = _OF_MODEL[model_type]
    said = inputs.get("image_processor_type") or inputs.get("feature_extractor_type")
    if said is None:
        return own, []
    match = re.fullmatch(r"(\w+?)(ImageProcessor|FeatureExtractor)(Fast|Pil)?", str(said))
    if match and match[1] in _DEFAULTS:
        return match[1], []
    return own, [f"{str(said)[:60]} in {_FILE} is not known here: read as {own}ImageProcessor"]


def _sides(key: str, value: Any, square: bool = True) -> dict[str, Any]:
    """Return an object of height and width, or of shortest_edge alone, from any form of it."""
    if isinstance(value, list) and len(value) == 2:
        value = dict(zip(("height", "width"), value, strict=True))
    elif is_number(value):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    known = isinstance(value, dict) and {*value} in ({"height", "width"}, {"shortest_edge"})
    fine = known and all(is_number(side) and side > 0 for side in value.values())
    must(fine, key, value, "height and width, or shortest_edge, in pixels")
    return value


def _ratio(crop: dict[str, Any], size: dict[str, Any]) -> float:
    """Return the side of the crop by that of the resized image."""
    inner, outer = min(crop.values()), min(size.values())
    ratio = inner / outer
    # So that the division by it, whose result loses its fraction, gives the side again.
    return ratio if int(inner / ratio) >= outer else math.nextafter(ratio, 0.0)


def _normalization(inputs: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of pixels from 0 to 1, whatever the file has them multiplied with."""
    mean, std = (
        _numbers(key, inputs[key] if inputs["do_normalize"] else plain)
        for key, plain in (("image_mean", 0.0), ("image_std", 1.0))
    )
    factor = inputs["rescale_factor"] if inputs["do_rescale"] else 1.0
    must(is_number(factor) and factor > 0, "rescale_factor", factor, "a number above 0")
    if math.isclose(scale := 255 * factor, 1, rel_tol=1e-6):
        return mean, std
    return tuple(x / scale for x in mean), tuple(x / scale for x in std)


def _numbers(key: str, value: Any) -> tuple[float, ...]:
    values = (value,) if is_number(value) else as_tuple(value)
    fine = isinstance(values, tuple) and all(is_number(x) for x in values)
    must(fine, key, value, "numbers, one per channel")
    return values

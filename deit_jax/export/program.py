"""A model as a function of images alone, with all that is to be known of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

import deit_jax
from deit_jax.export.choices import Options
from deit_jax.export.pixels import viewed
from deit_jax.models.preprocess import normalise
from deit_jax.shapes import sides
from deit_jax.weights.fit import LoadedWeights
from deit_jax.weights.load import folded

INPUT = "images"
OUTPUTS = {
    "logits": "the average of both heads' logits",
    "cls": "logits of the class head",
    "dist": "logits of the distillation head",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """What is exported: `function(params, images)` returns a dict of outputs in float32.

    `shape` is that of the images, in which a name stands for a size that is not fixed. `described`
    is what people and programs shall know: see docs/export.md.
    """

    opened: LoadedWeights
    options: Options
    function: Callable[[Any, Any], dict[str, jax.Array]]
    params: Any
    shape: tuple[int | str, ...]
    described: dict[str, Any]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the images."""
        return np.dtype(np.float32 if self.options.input == "normalised" else np.uint8)

    def of_images(self, images: Any) -> dict[str, jax.Array]:
        """Return the outputs, the weights being constants."""
        return self.function(self.params, images)

    def symbolic(self) -> jax.ShapeDtypeStruct:
        """Return the images' shape for jax.export; one that is traced may stand for several."""
        shape = export.symbolic_shape(", ".join(map(str, self.shape)))
        return jax.ShapeDtypeStruct(shape, self.dtype)


def program_of(opened: LoadedWeights, options: Options) -> Program:
    """Return the program of a model; raise UserError for options that do not go together."""
    if options.preprocess and options.input != "uint8":
        options = dataclasses.replace(options, input="uint8")
    opened.check_convention()
    # cuDNN's attention is a call that only some machines know.
    fields: dict[str, Any] = {"dtype": jnp.dtype(options.dtype)}
    fields |= {"attention": "xla"} if hasattr(opened.model, "attention") else {}
    model, params = folded(opened.model.clone(**fields), opened.variables)
    params = jax.tree.map(lambda x: np.asarray(x.astype(options.dtype)), params)
    function = _function(opened, model, options)
    shape = _shape(opened, options)
    described = _described(opened, model, options, shape)
    return Program(opened, options, function, params, shape, described)


def _function(opened: LoadedWeights, model, options: Options):
    mean, std = (tuple(map(float, x)) for x in (opened.mean, opened.std))

    def function(params, images):
        if options.layout == "NCHW":
            images = images.transpose(0, 2, 3, 1)
        if options.preprocess:
            images = viewed(images, opened.view)
        if options.input == "uint8":
            images = normalise(images, mean, std)
        heads = model.apply({"params": params}, images, train=False)
        if options.heads == "fused":
            return {"logits": heads.fused()}
        return {k: x for k, x in heads._asdict().items() if x is not None}

    return function


def _shape(opened: LoadedWeights, options: Options) -> tuple[int | str, ...]:
    height, width = ("h", "w") if options.preprocess else sides(opened.image_size)
    batch = options.batch or "b"
    if options.layout == "NCHW":
        return (batch, opened.reading.channels, height, width)
    return (batch, height, width, opened.reading.channels)


def _described(opened: LoadedWeights, model, options: Options, shape) -> dict[str, Any]:
    outputs = dict(OUTPUTS)
    if getattr(model, "distilled", False) and getattr(model, "dist_head", False):
        names = ["logits"] if options.heads == "fused" else ["cls", "dist"]
    else:
        names = ["logits"] if options.heads == "fused" else ["cls"]
        outputs["logits"] = OUTPUTS["cls"]
    size = opened.image_size
    return {
        "written_by": f"deit_jax {deit_jax.__version__}",
        "model": opened.name,
        "classes": list(opened.classes),
        "probabilities": "sigmoid" if opened.multi_label else "softmax",
        "dtype": options.dtype,
        "input": {
            "name": INPUT,
            "dtype": "float32" if options.input == "normalised" else "uint8",
            "layout": options.layout,
            "shape": list(shape),
            "is": _input_in_words(opened, options),
        },
        "images": {
            "size": list(size) if isinstance(size, tuple) else size,
            "resize": opened.reading.resize,
            "crop_ratio": opened.crop_ratio,
            "interpolation": "bicubic, antialiased",
            "mean": list(opened.mean),
            "std": list(opened.std),
            "fill": list(opened.reading.fill) if opened.reading.resize == "pad" else None,
            "upright": opened.reading.exif,
            "bits": opened.reading.bits,
        },
        "weights": {"step": opened.run and opened.run.step, "ema": options.ema},
        "outputs": {name: outputs[name] for name in names},
    }


def _input_in_words(opened: LoadedWeights, options: Options) -> str:
    channels = {1: "grey", 3: "RGB", 4: "RGBA"}.get(opened.reading.channels, "all channels")
    turned = ", turned upright by its EXIF tag" if opened.reading.exif else ""
    if options.preprocess:
        return f"pixels of a whole image ({channels}{turned}), of any size; all of a batch of one"
    if options.input == "uint8":
        return f"pixels ({channels}), resized and cropped as `images` says{turned}"
    return f"(pixel / 255 - mean) / std ({channels}), resized and cropped as `images` says{turned}"

"""What can be chosen of an export, by name; light, for `--help`."""

import dataclasses

HEADS = {
    "fused": "one output, the average of both heads' logits, as `deit predict` answers",
    "apart": "an output for each head",
}
DTYPES = {  # what answers may differ by from float32's here, in shares of the largest
    "float32": 1e-5,
    "bfloat16": 5e-2,
    "float16": 1e-2,
}
INPUTS = {
    "normalised": "float32, (pixel / 255 - mean) / std, at the model's size",
    "uint8": "pixels as bytes, at the model's size",
}
LAYOUTS = ("NHWC", "NCHW")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Format:
    """A format that programs are written in: a file that ends in `suffix`, or a folder.

    `module` has `write(program, path)`, which returns what the program was made with, and
    `open_program(path)`, which returns what runs it: a function of images that returns the outputs
    by name. `packages` are what it needs, as imported, and `remedy` how they are installed.
    """

    module: str
    suffix: str = ""
    packages: tuple[str, ...] = ()
    remedy: str = ""


FORMATS = {
    "stablehlo": Format("deit_jax.export.stablehlo"),
    "onnx": Format(
        "deit_jax.export.onnx_file",
        ".onnx",
        ("onnx", "onnx_ir", "onnxruntime", "jax2onnx"),
        "pip install 'deit_jax[onnx]' && pip install --no-deps jax2onnx",
    ),
    "savedmodel": Format(
        "deit_jax.export.savedmodel",
        "",
        ("tensorflow",),
        "pip install 'deit_jax[savedmodel]'",
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What an exported program shall be: see `deit export --help`."""

    heads: str = "fused"
    dtype: str = "float32"
    input: str = "normalised"
    preprocess: bool = False
    layout: str = "NHWC"
    batch: int | None = None  # None: any
    platforms: tuple[str, ...] = PLATFORMS
    opset: int | None = None
    ema: bool = False  # whether the weights are a moving average: it is told, not done

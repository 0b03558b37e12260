"""Programs of `deit export`: how far their answers are from the model's, and how fast they are.

    python -m benchmarks.export [--models=NAME,…] [--formats=onnx,stablehlo] [--speed=NAME,…]
        [--json=FILE]

Weights are random, those of norms and biases too, so that no part of a model is without effect.
Speed: one image a call on one core, 224 pixels, float32: onnxruntime, torch (timm, eager), and
`deit_jax.load` under jax.jit take turns. It needs torch and timm, and what `deit export` needs.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

MODELS = (
    *("deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224"),
    *("deit_base_distilled_patch16_224", "deit3_small_patch16_224", "deit3_base_patch16_224"),
    *("regnety_004", "regnety_160", "efficientnet_lite0"),
)
SPEED = ("deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224", "regnety_004")


def weights_of(name: str):
    """Return a model with random weights, no vector of which is zeros or ones."""
    import jax
    import numpy as np

    from deit_jax.models.registry import create_model, get_spec
    from deit_jax.weights.fit import LoadedWeights, default_classes, init_variables

    model, spec, rng = create_model(name, 1000), get_spec(name), np.random.default_rng(0)
    shapes = init_variables(model, 0)

    def drawn(path, x):
        around = (
            0.0 if path[-1].key in ("bias", "mean") else 0.3 if path[-1].key == "gamma" else 1.0
        )
        if x.ndim != 1:
            return np.asarray(x)
        return (around + 0.1 * np.abs(rng.normal(size=x.shape))).astype(np.float32)

    variables = {"batch_stats": {}} | jax.tree_util.tree_map_with_path(drawn, dict(shapes))
    return LoadedWeights(
        source=name,
        format="random weights",
        name=name,
        model=model,
        variables=variables,
        classes=default_classes(1000),
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        crop_ratio=spec.crop_ratio,
    )


def exported(name: str, to: str, folder: Path) -> dict:
    """Write a model and return how far the program's answers are from the model's."""
    from deit_jax.export.choices import FORMATS, Options
    from deit_jax.export.write import export

    path, began = folder / f"{name}{FORMATS[to].suffix}", time.perf_counter()
    made = export(weights_of(name), path, to, Options(heads="apart"))
    assert made.verified is not None
    return {
        "difference": made.verified.difference,
        "allowed": made.verified.allowed,
        "bytes": made.bytes,
        "seconds": round(time.perf_counter() - began, 1),
    }


def speeds(name: str, folder: Path, calls: int) -> dict:
    """Return the median milliseconds of a call of one image, the three in turns."""
    import jax
    import numpy as np
    import onnxruntime
    import timm
    import torch

    from deit_jax.export.write import export
    from deit_jax.weights.load import folded

    weights = weights_of(name)
    path = folder / "speed.onnx"
    export(weights, path, force=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)
    model, params = folded(weights.model, weights.variables)
    ours = jax.jit(lambda x: model.apply({"params": params}, x, train=False).fused())
    theirs = timm.create_model(name).eval()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    ways = {
        "onnxruntime": lambda: session.run(None, {"images": images}),
        "torch": lambda: theirs(pixels),
        "deit_jax": lambda: ours(images).block_until_ready(),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        for way in ways.values():
            way()
        for _ in range(calls):
            for key, way in ways.items():
                began = time.perf_counter()
                way()
                times[key].append(1000 * (time.perf_counter() - began))
    each = {key: round(statistics.median(x), 2) for key, x in times.items()}
    pairs = zip(times["torch"], times["onnxruntime"], strict=True)
    return each | {"torch by onnxruntime": round(statistics.median(a / b for a, b in pairs), 3)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--formats", default="onnx,stablehlo")
    parser.add_argument("--speed", default=",".join(SPEED))
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity") and args.speed:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # XLA has no flag for one thread
    import torch

    torch.set_num_threads(1)
    packages = ("jax", "onnx", "onnxruntime", "jax2onnx", "torch", "timm")
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in packages)
    found: dict = {
        "command": "python -m benchmarks.export",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, one core, {versions}",
        "verified": {},
        "milliseconds": {},
    }
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in filter(None, args.speed.split(",")):
            found["milliseconds"][name] = speeds(name, folder, args.calls)
            print(name, found["milliseconds"][name], flush=True)
        for name in filter(None, args.models.split(",")):
            for to in args.formats.split(","):
                found["verified"].setdefault(name, {})[to] = exported(name, to, folder)
                print(name, to, found["verified"][name][to], flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

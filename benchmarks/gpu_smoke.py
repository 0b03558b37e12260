"""Is it right on this device? Small checks with a verdict each, for benchmarks/gpu_check.py.

    python -m benchmarks.gpu_smoke --out=FILE.json [--toy]

Each compares with another way to compute the same, in float32 on this machine's CPU, with numpy or
with a published figure. FILE holds {"name": {"ok", "seconds", ...}} after each of them; a check
that raises is one that failed, and does not end the rest. --toy is for trying the code on a CPU.
"""

import argparse
import functools
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_jax
from benchmarks.gpu import cause
from deit_jax.configs import deit
from deit_jax.models import attention, cudnn, vit
from deit_jax.models.registry import create_model
from deit_jax.parallel import devices, sharding
from deit_jax.perf.flops import forward_flops
from deit_jax.step import compile as compile_lib
from deit_jax.storage import write_json
from deit_jax.teachers.folder import open_folder, write_teacher
from deit_jax.teachers.teacher import Teacher

HALF_ERROR = 0.02  # relative, of what is computed in bfloat16: 2^-8 and some
GMACS = {"tiny": 1.26, "small": 4.61, "base": 17.58}  # timm's, of ViTs at 224 pixels


class Checks(dict):
    """Results by name, written down after each."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def run(self, name: str, check: Callable[[], dict]) -> None:
        """Run one; {"ok": False, "error": ...} is what it found if it raises."""
        began = time.monotonic()
        try:
            found = check()
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            found = {
                "ok": False,
                "error": cause(error),
                "at": f"{Path(at.filename).name}:{at.lineno}",
            }
        self[name] = {**found, "seconds": round(time.monotonic() - began, 1)}
        write_json(self.path, self)
        print(f"{name}: {json.dumps(self[name])}", flush=True)


def relative_error(got, exact) -> float:
    """Return the distance of two arrays in units of the second's length."""
    got, exact = (np.asarray(x, np.float64).ravel() for x in (got, exact))
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def on_cpu(function, *operands):
    """Return what a function says in float32 on this machine's CPU."""
    cpu = jax.local_devices(backend="cpu")[0]
    operands = [jax.device_put(np.asarray(x, np.float32), cpu) for x in operands]
    with jax.default_matmul_precision("highest"):
        return jax.jit(function)(*operands)


def random(seed: int, *shape: int):
    """Return normal numbers in bfloat16."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def pulled(function, *operands_and_grad):
    """Return a function's value and its gradient by every operand."""
    *operands, grad = operands_and_grad
    out, pull = jax.vjp(function, *operands)
    return out, *pull(grad)


def patch_product(kernel, images):
    """Return patch embedding as the model does it: one product, the bias left at zero."""
    layer = vit.PatchEmbed(kernel.shape[0], kernel.shape[-1], images.dtype)
    bias = jnp.zeros(kernel.shape[-1:])
    return layer.apply({"params": {"proj": {"kernel": kernel, "bias": bias}}}, images)


def patch_convolution(kernel, images):
    """Return the same by the convolution that it stands for."""
    dims, stride = ("NHWC", "HWIO", "NHWC"), kernel.shape[:2]
    out = jax.lax.conv_general_dilated(images, kernel, stride, "VALID", dimension_numbers=dims)
    return out.reshape(out.shape[0], -1, out.shape[-1])


def kernels_gradient(function, kernel, images, grad):
    """Return function(kernel, images) and its gradient by the kernel."""
    return pulled(lambda kernel: function(kernel, images), kernel, grad)


# --- the checks ----------------------------------------------------------------------------------


def elementary() -> dict:
    """Functions that a GPU has of NVIDIA's libdevice, which may be missing."""
    x = np.linspace(0.1, 3, 1000, dtype=np.float32)
    errors = {
        name: relative_error(jax.jit(getattr(jnp, name))(x), getattr(np, name)(np.float64(x)))
        for name in ("exp", "log", "cos", "expm1", "tanh")
    }
    return {"ok": max(errors.values()) < 1e-5, "relative_errors": errors}


def memory_told() -> dict:
    """The figures by which a batch is parted, and a benchmark tells its memory."""
    device = jax.devices()[0]
    found = {"bytes_limit": devices.bytes_limit([device]), "peak": devices.peak_bytes([device])}
    return {"ok": device.platform != "gpu" or all(found.values()), **found}


def operations() -> dict:
    """Operations are counted from the program, where a plugin's analysis says nothing."""
    lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), np.float32))
    found = {
        name: forward_flops(create_model(f"deit_{name}_patch16_224"), 224) / 2e9 for name in GMACS
    }
    near = all(abs(found[name] / GMACS[name] - 1) < 0.02 for name in GMACS)
    return {"ok": near, "gmacs": found, "plugins_analysis": lowered.cost_analysis() is not None}


def grouped_convolution(dtype) -> dict:
    """A convolution of RegNetY-16GF's third stage, eleven groups of 112."""
    x, kernel = random(0, 2, 14, 14, 1232), random(1, 3, 3, 112, 1232) * 0.03

    def convolution(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=11
        )

    got = jax.jit(convolution)(x.astype(dtype), kernel.astype(dtype))
    error = relative_error(got, on_cpu(convolution, x, kernel))
    return {"ok": error < HALF_ERROR, "relative_error": error}


def attention_like_float32s(shape: tuple[int, ...], choice: str) -> dict:
    """Value and gradients, by the kernel that `model.attention` means here."""
    operands = [random(seed, *shape) for seed in range(4)]
    reason = cudnn.refusal(shape, jnp.bfloat16) if choice == "auto" else "model.attention=xla"
    function = functools.partial(attention.attention, choice=choice)
    got = jax.jit(functools.partial(pulled, function))(*operands)
    exact = on_cpu(functools.partial(pulled, jax.nn.dot_product_attention), *operands)
    errors = [relative_error(g, e) for g, e in zip(got, exact, strict=True)]
    kernel = f"xla, since {reason}" if reason else "cudnn"
    return {"ok": max(errors) < HALF_ERROR, "relative_errors": errors, "kernel": kernel}


def patches(size: int, width: int) -> dict:
    """Patch embedding is one product here; it should be the convolution that it stands for."""
    images, kernel = random(0, 2, size, size, 3), random(1, 16, 16, 3, width) * 0.05
    grad = random(2, 2, (size // 16) ** 2, width)
    got = jax.jit(functools.partial(kernels_gradient, patch_product))(kernel, images, grad)
    exact = on_cpu(functools.partial(kernels_gradient, patch_convolution), kernel, images, grad)
    errors = [relative_error(g, e) for g, e in zip(got, exact, strict=True)]
    return {"ok": max(errors) < HALF_ERROR, "relative_errors": errors}


def attentions_bits(shape: tuple[int, ...], deterministic: bool) -> dict:
    """Is attention's gradient the same each time? It need be only with train.deterministic."""
    operands = [random(seed, *shape) for seed in range(4)]
    mesh = sharding.make_mesh(deit.get_config().mesh, jax.devices()[:1])
    lowered = jax.jit(functools.partial(pulled, attention.attention)).lower(*operands)
    compiled = lowered.compile(compile_lib.compiler_options(mesh, deterministic))
    return _same_bits(lambda: compiled(*operands), deterministic)


def steps_bits(toy: bool, deterministic: bool) -> dict:
    """Do three steps from one state end in the same one each time?"""
    config = small_config(toy, "bfloat16", 32 if toy else 224, 8 if toy else 128)
    config.train.deterministic = deterministic
    step, state, teacher = gpu_jax.jit_step(config, 10)
    batch = gpu_jax.random_batch(config, 10)

    def three_steps():
        now = jax.tree.map(jnp.copy, state)  # which a step gives away
        for _ in range(3):
            now, _ = step(now, teacher, batch)
        return now

    return _same_bits(three_steps, deterministic)


def _same_bits(run: Callable, needed: bool) -> dict:
    first, *others = [jax.device_get(run()) for _ in range(4)]
    same = [all(jax.tree.leaves(jax.tree.map(np.array_equal, first, x))) for x in others]
    return {"ok": all(same) or not needed, "same_bits": all(same)}


def like_a_cpu(toy: bool) -> dict:
    """A distilled step in float32, against the same step on this machine's CPU."""
    config, values = small_config(toy, "float32", 32 if toy else 64, 8 if toy else 32), {}
    places = {"device": jax.devices()[0], "cpu": jax.local_devices(backend="cpu")[0]}
    for name, device in places.items():
        with jax.default_matmul_precision("highest"), jax.default_device(device):
            step, state, teacher = gpu_jax.jit_step(config, 10, device)
            _, metrics = step(state, teacher, gpu_jax.random_batch(config, 10, device))
        values[name] = {k: float(v) for k, v in metrics.items() if not jnp.ndim(v)}
    near = [np.isclose(values["device"][k], v, rtol=1e-3) for k, v in values["cpu"].items()]
    return {"ok": len(near) > 0 and all(map(bool, near)), **values}


def teacher_folder(toy: bool, dtype: str) -> dict:
    """A network exported as a teacher folder, against itself; how much slower or faster it is."""
    model = create_model("regnety_004", 10, folded=True)
    size, batch = (32, 2) if toy else (224, 64)
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    params = jax.jit(model.init)(jax.random.key(1), images[:1])["params"]

    def apply(params, images):
        return model.clone(dtype=images.dtype).apply({"params": params}, images, train=False).cls

    names = [f"class {i}" for i in range(10)]
    spec = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": size, "classes": names}
    with tempfile.TemporaryDirectory() as temporary:
        write_teacher(Teacher(apply=apply, params=params, **spec), Path(temporary) / "folder")
        teacher = open_folder(Path(temporary) / "folder", dtype)
    own = jax.jit(lambda p, x: apply(p, x.astype(dtype)).astype(jnp.float32))
    foreign = jax.jit(lambda p, x: teacher.apply(p, x)["logits"])
    ours = own, jax.tree.map(lambda x: x.astype(dtype), params)
    theirs = foreign, jax.device_put(teacher.params)
    logits = [np.asarray(function(held, images)) for function, held in (ours, theirs)]
    seconds = [_seconds(function, held, images) for function, held in (ours, theirs)]
    error = relative_error(logits[1], logits[0])
    return {
        "ok": error < (1e-4 if dtype == "float32" else HALF_ERROR),
        "relative_error": error,
        "time_against_our_own": seconds[1] / seconds[0],
    }


def _seconds(function, *operands) -> float:
    """Return the least time of ten calls, after one."""
    times = []
    for _ in range(11):
        began = time.perf_counter()
        jax.block_until_ready(function(*operands))
        times.append(time.perf_counter() - began)
    return min(times[1:])


def small_config(toy: bool, dtype: str, size: int, batch: int):
    """Return DeiT-Ti of two layers, distilled from a RegNetY of two."""
    row = {"model": "tiny", "image_size": size, "batch": batch, "part": "train", "peer": "ours"}
    config = gpu_jax.config_of(row | {"toy": toy})
    config.model.depth, config.dtype = 1 if toy else 2, dtype
    config.teacher.model.update(
        {"name": "regnety_002", "widths": (24, 56), "depths": (1, 1), "group_width": 8}
    )
    return config


def all_of(checks: Checks, toy: bool) -> None:
    """Run every check, those that find most at first."""
    few, many = (
        ((8, 18, 3, 32),),
        ((8, 198, 12, 64), (8, 197, 3, 64), (2, 578, 12, 64), (3, 50, 4, 16)),
    )
    checks.run("elementary functions", elementary)
    checks.run("memory is told", memory_told)
    checks.run("operations", operations)
    for shape in few if toy else few + many:
        for choice in ("auto", "xla"):
            name = f"attention {choice} {'x'.join(map(str, shape))}"
            checks.run(name, functools.partial(attention_like_float32s, shape, choice))
    for dtype in ("float32", "bfloat16"):
        checks.run(f"grouped convolution, {dtype}", functools.partial(grouped_convolution, dtype))
    checks.run("patch embedding", functools.partial(patches, 32 if toy else 224, 192))
    for dtype in ("float32", "bfloat16"):
        checks.run(f"a teacher folder, {dtype}", functools.partial(teacher_folder, toy, dtype))
    checks.run("a step like a CPU's", functools.partial(like_a_cpu, toy))
    shape = few[0] if toy else (256, 198, 12, 64)
    for on in (False, True):
        how = "deterministic" if on else "as usual"
        checks.run(f"attention's bits, {how}", functools.partial(attentions_bits, shape, on))
        checks.run(f"a step's bits, {how}", functools.partial(steps_bits, toy, on))


def main() -> None:
    """Read the command line and run the checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="small shapes, to try the code on a CPU")
    options = parser.parse_args()
    checks = Checks(options.out)
    all_of(checks, options.toy)
    failed = [name for name, found in checks.items() if not found["ok"]]
    print(f"{len(checks)} checks, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")


if __name__ == "__main__":
    main()

"""What JAX computes on here, and what it does not see."""

import os

from deit_jax.doctor.findings import NOTE, WRONG, Finding

_NHWC = ("NHWC", "HWIO", "NHWC")


def look(missed: str, seen: dict[str, list[str]]) -> list[Finding]:
    """Return findings on devices.

    `missed` is a line on a GPU that JAX has no plugin for, "" without; `seen` are the device files
    of this machine by kind, "nvidia" and "tpu".
    """
    import jax

    try:
        devices = jax.devices()
    except Exception as error:  # of JAX or of a plugin, of any kind
        first = next(iter(str(error).splitlines()), "") or "it found nothing that it may use"
        chosen = os.environ.get("JAX_PLATFORMS", "")
        remedy = "unset JAX_PLATFORMS, or install what it names" if chosen else _of_plugins()
        return [Finding("devices", f"JAX has none: {first}", WRONG, remedy, {"devices": []})]
    kinds: dict[str, int] = {}
    for device in devices:
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    facts = {"platform": devices[0].platform, "devices": kinds, "files": seen}
    found = [Finding("devices", f"JAX computes on {text}", facts=facts), _computes()]
    found += [_memory(device) for device in devices[:1] if device.platform != "cpu"]
    if missing := _unseen(devices[0].platform, missed, seen):
        found.append(missing)
    return found


def _computes() -> Finding:
    """Return whether a product and a convolution in bfloat16 come out right on the device."""
    import jax
    import jax.numpy as jnp

    def program(x, kernel):
        product = jnp.einsum("ij,jk->ik", x, x)
        image = x.reshape(1, 8, 8, 1)
        padded = jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=_NHWC
        )
        return product.sum() + padded.sum()

    ones = jnp.ones((8, 8), jnp.bfloat16)
    try:
        found = float(jax.jit(program)(ones, jnp.ones((1, 1, 1, 1), jnp.bfloat16)))
    except Exception as error:  # of the driver, of cuDNN, of memory that another process has
        text = f"a small program fails: {next(iter(str(error).splitlines()), '')[:200]}"
        return Finding(
            "computing", text, WRONG, f"end other programs on the device, or {_of_plugins()}"
        )
    if found != 8**3 + 8**2:
        return Finding("computing", f"a small program gives {found}", WRONG, "take another device")
    return Finding("computing", "a product and a convolution in bfloat16 are right")


def _of_plugins() -> str:
    return "pip install --upgrade jax, or set JAX_PLATFORMS=cpu to compute on the CPU"


def _unseen(platform: str, missed: str, seen: dict[str, list[str]]) -> Finding | None:
    """Return what there is and JAX does not use, with the reason."""
    if platform != "cpu":
        return None
    if missed:
        text, _, remedy = missed.partition(": ")
        return Finding("unseen", text, NOTE, remedy)
    chosen = os.environ.get("JAX_PLATFORMS", "")
    for kind, name, extra in (("nvidia", "NVIDIA GPU", "cuda"), ("tpu", "TPU", "tpu")):
        if not seen.get(kind):
            continue
        files = ", ".join(seen[kind][:4])
        if kind == "nvidia" and os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            reason, remedy = "CUDA_VISIBLE_DEVICES hides it", "unset CUDA_VISIBLE_DEVICES"
        elif chosen and chosen != "cpu":
            reason, remedy = f"JAX_PLATFORMS={chosen} leaves it out", "unset JAX_PLATFORMS"
        else:
            reason = "JAX did not start it: its driver, its plugin, or another process that has it"
            remedy = f"pip install --upgrade 'deit_jax[{extra}]'"
            remedy += ", and look at nvidia-smi" if kind == "nvidia" else ""
        text = f"there is a {name} ({files}) that is not used; {reason}"
        return Finding("unseen", text, NOTE, remedy)
    return None


def _memory(device) -> Finding:
    """Return how much memory a device has, as JAX may use it."""
    from deit_jax.parallel.devices import memory_stats

    stats = memory_stats(device)
    limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use", 0)
    if not limit:
        return Finding("device memory", "the device does not say")
    text = f"{limit / 1e9:.1f} GB a device for JAX, {used / 1e9:.1f} GB in use"
    return Finding("device memory", text, facts={"limit": limit, "in_use": used})

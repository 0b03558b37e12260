"""The figures of `deit plan`, in lines for people."""

from typing import Any

from deit_jax.perf.chips import GIB


def report(result: dict[str, Any]) -> str:
    """Return a plan in lines."""
    sizes, chips = result["per_chip"], result["chips"]
    mesh = " x ".join(f"{k} {v}" for k, v in result["mesh"].items())
    lines = [
        f"{result['config']['model']['name']} on {result['topology']}: {chips} chips ({mesh}), "
        f"batch {result['batch_size']} = {result['images_per_chip']:g} a chip",
        *result["notes"],
        "memory per chip: " + memory_line(sizes, result["fits"]),
    ]
    if result["estimated_cycles"] is None:
        return "\n".join(lines)
    moved = ", ".join(
        f"{kind.replace('_', '-')} {size / 1e6:.1f} MB in {result['collective_counts'][kind]}"
        for kind, size in result["collectives"].items()
        if size
    )
    epochs, left = result["config"]["epochs"], result["not_estimated"]
    return "\n".join(
        [
            *lines,
            f"operations per step: {result['flops_per_step'] / 1e12:.1f} TFLOP compiled, "
            f"{result['analytic_flops_per_step'] / 1e12:.1f} counted from the model",
            f"communication per step and chip: {moved or 'none'}",
            f"the compiler's estimate, not a measurement: {result['estimated_cycles'] / 1e6:.1f} M "
            f"cycles = {result['estimated_step_ms']:.1f} ms a step, "
            f"{result['images_per_second_per_chip']:.0f} images/s a chip, MFU {result['mfu']:.1%}, "
            f"{result['hours']:.1f} h for {epochs:g} epochs",
            f"not in it: waiting for other chips or for input, evaluation, {left['custom_calls']} "
            f"custom kernels, {left['loops_of_unknown_length']} loops of unknown length (counted "
            "once)",
            f"compiled in {result['compile_s']:.0f} s",
        ]
    )


def memory_line(sizes: dict[str, int | None], fits: bool) -> str:
    """Return the bytes of a chip and the verdict."""
    names = (("arguments", "argument"), ("temporaries", "temp"), ("peak", "peak"))
    found = [
        f"{name} {size / GIB:.2f} GiB"
        for name, key in names
        if (size := sizes[f"{key}_bytes"]) is not None
    ]
    whole = sizes["hbm_bytes"]
    assert whole is not None  # the table of chips has it
    verdict = "fits" if fits else "DOES NOT FIT"
    return f"{', '.join(found)} of {whole / GIB:.2f} GiB: {verdict}"


def advice(result: dict[str, Any], alternatives: list[str]) -> str:
    """Return what to change, in lines; "" if the step fits."""
    if result["fits"]:
        return ""
    return "\n".join(["try one of these, or --sweep to compile each:", *alternatives])


def sweep_report(results: list[dict[str, Any]]) -> str:
    """Return the alternatives, one a line."""
    lines = ["alternatives:"]
    for result in results:
        if "error" in result:
            text = result["error"]
        else:
            text = memory_line(result["per_chip"], result["fits"])
            if (step := result["estimated_step_ms"]) is not None:
                text += f"; estimated {step:.1f} ms a step, MFU {result['mfu']:.1%}"
        lines.append(f"{result['change']}: {text}")
    return "\n".join(lines)

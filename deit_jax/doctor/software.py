"""Packages: which versions are here, what is missing, what does not go together."""

import platform
import re
import sys
from importlib import metadata

from deit_jax.doctor.findings import NOTE, WRONG, Finding

NAME = "deit_jax"
# What runs of different machines differ by; the rest of the requirements is only checked.
SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
OLDEST_PYTHON = (3, 11)
EXTRAS_OF_PEOPLE = (
    *("viz", "fast", "cuda", "tpu", "plan", "hub", "gcs", "s3", "tiff", "torch", "teacher"),
    *("wandb", "mlflow", "trackio", "demo", "onnx", "savedmodel"),
)


def look() -> list[Finding]:
    """Return findings on Python, the packages that are needed, and the extras."""
    return [_python(), _packages(), _jax_and_jaxlib(), _extras()]


def version(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    facts = {"python": platform.python_version(), "system": platform.platform()}
    text = f"Python {facts['python']} on {facts['system']} ({platform.machine()})"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Finding("python", text, WRONG, f"install Python {oldest} or newer", facts)
    return Finding("python", text, facts=facts)


def requirements(distribution: str = NAME, extra: str = "") -> list[tuple[str, str]]:
    """Return (package, its versions) of what a distribution asks for here, itself or an extra.

    For an extra such as cuda, which is jax[cuda13], these are what that extra of jax asks for.
    """
    from packaging.requirements import Requirement

    found = []
    for text in metadata.requires(distribution) or ():
        wanted = Requirement(text)
        there = wanted.marker is None or wanted.marker.evaluate({"extra": extra})
        plain = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if not there or (extra and plain):
            continue
        found.append((wanted.name, str(wanted.specifier)))
        for nested in sorted(wanted.extras) if version(wanted.name) else ():
            found += requirements(wanted.name, nested)
    return found


def _fits(package: str, versions: str) -> bool:
    from packaging.specifiers import SpecifierSet

    here = version(package)
    return here is not None and SpecifierSet(versions).contains(here, prereleases=True)


def _packages() -> Finding:
    shown = {name: version(name) for name in (NAME, *SHOWN)}
    text = ", ".join(f"{name} {number or '(missing)'}" for name, number in shown.items())
    facts = {"versions": shown}
    try:
        wanted = requirements()
    except metadata.PackageNotFoundError:
        remedy = "pip install --editable . in the clone"
        return Finding("packages", f"{NAME} is not installed; {text}", NOTE, remedy, facts)
    bad = [f"{name}{versions}" for name, versions in wanted if not _fits(name, versions)]
    if bad:
        said = ", ".join(f"{b} (here {version(re.split(r'[<>=!~]', b)[0]) or 'none'})" for b in bad)
        command = "pip install " + " ".join(f'"{b}"' for b in bad)
        return Finding("packages", f"{text}; asked for: {said}", WRONG, command, facts)
    return Finding("packages", text, facts=facts)


def _jax_and_jaxlib() -> Finding:
    """Return whether JAX and its compiled half, and a plugin for GPUs, are of one version."""
    names = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
    here = {name: found for name in names if (found := version(name))}
    minors = {".".join(number.split(".")[:2]) for number in here.values()}
    text = ", ".join(f"{name} {number}" for name, number in here.items())
    if len(minors) > 1:
        remedy = f'pip install --upgrade "jax=={here.get("jax")}" and its plugin of that version'
        return Finding("jax", f"of different versions: {text}", WRONG, remedy, {"versions": here})
    return Finding("jax", f"of one version: {text}", facts={"versions": here})


def _extras() -> Finding:
    """Return which extras are installed, and how the others would be."""
    try:
        known = {extra: requirements(NAME, extra) for extra in EXTRAS_OF_PEOPLE}
    except metadata.PackageNotFoundError:
        return Finding("extras", "not known, as the package is not installed")
    there = [e for e, wanted in known.items() if wanted and all(version(n) for n, _ in wanted)]
    missing = [e for e, wanted in known.items() if wanted and e not in there]
    text = f"installed: {', '.join(there) or 'none'}"
    if missing:
        text += f"; not: {', '.join(missing)} (pip install 'deit_jax[NAME]' brings one)"
    return Finding("extras", text, facts={"installed": there, "missing": missing})

"""All findings, in the order in which people ask for them."""

import importlib
from collections.abc import Callable

from deit_jax.doctor import software
from deit_jax.doctor.findings import WRONG, Finding


def diagnose(
    workdir: str,
    online: bool,
    missed: str,
    seen: dict[str, list[str]],
    cache: Callable[[], str | None],
) -> list[Finding]:
    """Return what there is to say of this machine.

    `workdir` is where runs would be kept; a bucket is asked only if `online`. `missed` and `seen`
    are of devices.look; `cache` returns what machine.look takes. Packages come first, and what
    cannot even be loaded for want of them is a finding.
    """
    remote = "://" in workdir
    found = software.look()
    if not any(f.state == WRONG for f in found):  # or JAX might not even load
        found += _section("devices", lambda module: module.look(missed, seen))
        found += _section("images", lambda module: module.look())
    found += _section("machine", lambda module: module.look(cache()))
    if remote and not online:
        found.append(Finding("workdir", f"{workdir}: a bucket, not asked; --online does"))
    else:
        found += _section("machine", lambda module: [module.workdir(workdir)])
    if online:
        bucket = workdir if remote else ""
        found += _section("network", lambda module: module.look(bucket))
    return found


def _section(name: str, look: Callable) -> list[Finding]:
    """Return the findings of a module of this room, or that it cannot be had."""
    try:
        return look(importlib.import_module(f"deit_jax.doctor.{name}"))
    except Exception as error:  # of any library that is loaded for it
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        remedy = "install again what `packages` and `jax` above name, or else the whole package"
        return [Finding(name, f"cannot be looked at: {first}", WRONG, remedy)]

"""All findings, in the order in which people ask for them."""

from deit_jax.doctor import devices, images, machine, network, software
from deit_jax.doctor.findings import WRONG, Finding
from deit_jax.storage import is_remote


def diagnose(
    workdir: str, online: bool, missed: str, seen: dict[str, list[str]], cache: str | None
) -> list[Finding]:
    """Return what there is to say of this machine.

    `workdir` is where runs would be kept; a bucket is asked only if `online`. `missed` and `seen`
    are of devices.look, `cache` of machine.look.
    """
    found = software.look()
    if not any(f.state == WRONG for f in found):  # or JAX might not even load
        found += devices.look(missed, seen)
        found += images.look()
    found += machine.look(cache)
    if is_remote(workdir) and not online:
        found.append(Finding("workdir", f"{workdir}: a bucket, not asked; --online does"))
    else:
        found.append(machine.workdir(workdir))
    if online:
        found += network.look(workdir if is_remote(workdir) else "")
    return found

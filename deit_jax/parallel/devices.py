"""Memory of devices, as far as a plugin of JAX tells of it.

A plugin need not tell: `memory_stats` may be None, raise, or lack a figure.
"""

from collections.abc import Iterable
from typing import Any

import jax


def memory_stats(device) -> dict[str, Any]:
    """Return what a device tells of its memory, {} if nothing."""
    try:
        return device.memory_stats() or {}
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return {}


def peak_bytes(devices: Iterable) -> int | None:
    """Return the most that was in use at once on the fullest device, None if none tells."""
    used = [memory_stats(device).get("peak_bytes_in_use") for device in devices]
    return max(filter(None, used), default=None)


def bytes_limit(devices: Iterable) -> int | None:
    """Return how much JAX may use of the smallest device, None if one does not tell."""
    limits = [memory_stats(device).get("bytes_limit") or 0 for device in devices]
    return min(limits, default=None) if all(limits) else None

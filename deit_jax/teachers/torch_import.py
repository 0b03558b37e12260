"""PyTorch and what stands between it and JAX, imported where a torch teacher is asked for."""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from deit_jax.errors import UserError

_TORCHVISION = (  # PyPI's is for CUDA, and does not say so
    "install torchvision from where torch is from: for a CPU pip install --force-reinstall "
    "--no-deps torchvision --index-url https://download.pytorch.org/whl/cpu"
)
EXTRA = "pip install 'deit_jax[torch]'"


def import_package(name: str, asked: str) -> ModuleType:
    """Return a package; raise UserError, which says how to get it, where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        raise UserError(f"{asked}: needs {missing}, {EXTRA}") from error
    except Exception as error:  # such as torchvision's, of another build than torch
        reason = " ".join(str(error).split())
        hint = f"; {_TORCHVISION}" if "torchvision" in reason else ""
        raise UserError(f"{asked}: {name} cannot be imported ({reason:.200}){hint}") from error


def import_torchax(asked: str) -> ModuleType:
    """Return torchax.export, whatever version of torch is installed."""
    with _named_overloads():
        return import_package("torchax.export", asked)


@contextlib.contextmanager
def _named_overloads() -> Iterator[None]:
    """Let `torch.ops.aten.*.names_dim` and the like be None while torchax is imported.

    torch 2.13 has no named tensors any more, and torchax 0.0.13 lists overloads of them in its
    tables, where None does no harm.
    """
    packet: Any = torch._ops.OpOverloadPacket
    known = packet.__getattr__

    def lenient(self, key):
        try:
            return known(self, key)
        except AttributeError:
            if "imname" in key or "names" in key:
                return None
            raise

    packet.__getattr__ = lenient
    try:
        yield
    finally:
        packet.__getattr__ = known

"""One file, one format that weights are written in; EXPORTERS lists them, without JAX."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import PurePath
from typing import Any


@dataclasses.dataclass(frozen=True)
class Exporter:
    """A format that weights are written in: one file that ends in one of `suffixes`, or a folder.

    `module` has `write(opened, path)`, which raises ValueError, before it writes, if the format
    cannot hold the model, and needs no PyTorch. It may have `call(opened, path)`, which returns how
    others load what was written, Python for people to copy, or None. `says` is what other programs
    learn of how images are read: oblong, resize=squash, resize=pad, exif, bits.
    """

    module: str
    suffixes: tuple[str, ...] = ()
    says: tuple[str, ...] = ()

    @property
    def write(self) -> Callable[[Any, PurePath], None]:
        """The module's `write`."""
        return importlib.import_module(self.module).write

    def call(self, opened, path: PurePath) -> str | None:
        """Return what the module's `call` says, None where it has none."""
        said = getattr(importlib.import_module(self.module), "call", None)
        return said(opened, path) if said else None


EXPORTERS = {
    "timm": Exporter("deit_jax.weights.exporters.timm", (".safetensors",)),
    "timm_folder": Exporter(
        "deit_jax.weights.exporters.timm_folder", (), ("oblong", "resize=squash", "resize=pad")
    ),
    "deit": Exporter("deit_jax.weights.exporters.deit", (".pth", ".pt")),
    "huggingface": Exporter("deit_jax.weights.exporters.huggingface", (), ("resize=squash",)),
    "deit_jax": Exporter("deit_jax.weights.exporters.run"),
}

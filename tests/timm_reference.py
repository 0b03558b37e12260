"""Import torch, timm and transformers, the references of the parity tests."""

import importlib
import os

import pytest

# torchvision installed next to a CPU-only torch cannot load its compiled operators; importing it
# still registers fake kernels for these two, which must therefore have a schema.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries = []  # torch drops a schema together with the Library object that defined it


def _import(name):
    """Return a module; where it is missing, skip if TEST_TORCH=0 and fail otherwise."""
    if os.environ.get("TEST_TORCH") == "0":
        return pytest.importorskip(name)
    return importlib.import_module(name)


def _import_torchvision(torch):
    try:
        _import("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _libraries.append(library)
        _import("torchvision")


def import_torch():
    """Return torch, limited to one thread: the tests share the machine."""
    torch = _import("torch")
    torch.set_num_threads(1)
    return torch


def import_timm():
    """Return timm."""
    _import_torchvision(import_torch())
    return _import("timm")


def import_transformers():
    """Return Hugging Face transformers."""
    _import_torchvision(import_torch())
    return _import("transformers")

"""From a config to a model: `config.model` and `config.dtype`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deit_jax.errors import UserError
from deit_jax.models import cudnn, registry
from deit_jax.shapes import Size, simplest


def without_bfloat16() -> bool:
    """Return whether this machine's GPU is older than bfloat16 units: before Ampere."""
    capability = cudnn.compute_capability()
    return capability is not None and capability < cudnn.AMPERE


def compute_dtype(name: str) -> jnp.dtype:
    """Return the dtype that a config's `dtype` means on this machine."""
    if name == "auto":
        slow = jax.default_backend() == "cpu" or without_bfloat16()
        name = "float32" if slow else "bfloat16"
    return jnp.dtype(name)


def image_size(model_config) -> Size:
    """Return the size in pixels of the images that a `config.model` takes."""
    return simplest(model_config.image_size or _spec(model_config.name).image_size)


def in_channels(model_config, of_data: int | None = None, of: str = "") -> int:
    """Return the channels of the images that a `config.model` takes; None in it are the data's.

    Where these are not known either, colour. Raise UserError where it contradicts
    `config.data.channels`.
    """
    own = model_config.in_channels
    if of_data is None:
        return own or 3
    if own not in (None, of_data):
        raise UserError(
            f"config.{of}model.in_channels={own}: config.data.channels={of_data}, and a model "
            "takes what the data has; leave the former out"
        )
    return of_data


def build_model(
    model_config,
    num_classes: int,
    dtype: str = "float32",
    of: str = "",
    channels: int | None = None,
    **kwargs: Any,
):
    """Build the Flax module that a `config.model` describes; None fields stay the name's own.

    Raise UserError for an unknown name, fields that it does not have or values that they cannot
    have; `of` is "teacher." if the config is that of the teacher. `channels` are those of the data.
    """
    fields = {f.name for f in dataclasses.fields(_spec(model_config.name, of).cls)}
    overrides = {k: v for k, v in model_config.items() if k != "name" and v is not None}
    if "image_size" not in fields:  # a convnet takes any size
        overrides.pop("image_size", None)
    overrides["in_channels"] = in_channels(model_config, channels, of)
    if "in_channels" not in fields and (taken := overrides.pop("in_channels")) != 3:
        raise UserError(
            f"config.data.channels={taken}: {model_config.name} has no field in_channels and takes "
            "colours alone; choose another model"
        )
    try:
        return registry.create_model(
            model_config.name, num_classes, dtype=compute_dtype(dtype), **overrides, **kwargs
        )
    except ValueError as error:
        raise UserError(f"config.{of}{error}") from error


def for_counting(model):
    """Return a model to count parameters or products of, whose attention asks no GPU for cuDNN."""
    return model.clone(attention="xla") if hasattr(model, "attention") else model


def _spec(name: str, of: str = "") -> registry.ModelSpec:
    try:
        return registry.get_spec(name)
    except ValueError as error:
        raise UserError(f"config.{of}model.name={name}: {error}") from error

"""Features of any number of images, in a file."""

import hashlib
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np

from deit_jax.analysis.features import embedder
from deit_jax.analysis.inference import normalising, stream
from deit_jax.data.feature_file import FeatureFile
from deit_jax.data.sources.base import Subset
from deit_jax.data.sources.named import NamedImages
from deit_jax.shapes import input_shape
from deit_jax.weights.fit import LoadedWeights
from deit_jax.weights.torch_names import leaves


def embed(
    opened: LoadedWeights,
    images: NamedImages,
    out: str | PurePath,
    kind: str = "pooled",
    layer: int = -1,
    norm: bool = True,
    dtype: str = "float32",
    force: bool = False,
    title: str = "",
) -> list[str]:
    """Write features of images to a .npy or .parquet file; return the paths not readable.

    `kind` is one of choices.FEATURES, `layer` the block that they leave. What was begun with the
    same weights, images and features is taken up where it ended; see data/feature_file.py.
    """
    function = embedder(opened.model, kind, layer, norm)
    paths = [images.describe(i) for i in range(len(images))]
    shape = jax.eval_shape(function, opened.variables, _one(opened)).shape[1:]
    identity = {
        "weights": _digest(opened.variables),
        "images": hashlib.sha256("\n".join(paths).encode("utf-8", "surrogateescape")).hexdigest(),
        "features": kind,
        "layer": layer,
        "norm": norm,
        "dtype": dtype,
        "view": str(opened.view),
    }
    file = FeatureFile(Path(out), identity, paths, shape, np.dtype(dtype))
    file.begin(force)
    compiled = normalising(opened, function)
    rest = Subset(images, np.arange(file.done, len(images)))
    begun = file.done
    for batch in stream(opened, rest, compiled, title, of="the features"):
        file.append(begun + batch.numbers, batch.values, batch.images)
    file.finish()
    return [paths[i] for i in file.missing]


def _one(opened: LoadedWeights) -> Any:
    return jax.ShapeDtypeStruct(input_shape(opened.model, opened.image_size, 1), np.float32)


def _digest(variables: dict[str, Any]) -> str:
    """Return a checksum of all weights."""
    whole = hashlib.sha256()
    for path, leaf in leaves(variables):
        whole.update(path.encode())
        whole.update(np.ascontiguousarray(leaf).tobytes())
    return whole.hexdigest()

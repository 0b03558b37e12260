"""scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels, in ten classes."""

import numpy as np

from deit_jax.data.sources.assemble import assemble
from deit_jax.data.sources.base import ArraySource, Dataset


def open_source(rest: str, data) -> Dataset:
    """Return the digits, a part of them held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 1797 of 8 x 8, values 0..16
    classes = [str(name) for name in digits.target_names]
    return assemble(ArraySource("digits", images, digits.target), None, classes, data)

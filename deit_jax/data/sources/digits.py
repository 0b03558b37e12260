"""scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels, in ten classes."""

import numpy as np

from deit_jax.data.sources.base import ArraySource, Dataset, hold_out


def open_source(rest: str, data) -> Dataset:
    """Return the digits, a part of them held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 1797 of 8 x 8, values 0..16
    train, held = hold_out(ArraySource("digits", images, digits.target), data.eval_fraction)
    return Dataset(train, held, [str(name) for name in digits.target_names])

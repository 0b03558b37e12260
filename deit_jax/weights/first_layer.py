"""The first layer of one model's weights, made that of another: its channels and its patches."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float


def adapt_channels(
    kernel: Float[np.ndarray, "P Q c D"], channels: int
) -> Float[np.ndarray, "P Q C D"]:
    """Return the kernel of a convolution for another number of channels.

    Grey is the sum of any; of others colours are repeated, and scaled by 3 / channels so that alike
    channels give what they gave (timm's adapt_input_conv). Raise ValueError for other kernels.
    """
    have = kernel.shape[2]
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    if have != 3:
        raise ValueError(
            f"the weights' first layer reads {have} channels, the model's {channels}, and only "
            "weights of 3 are adapted (those of others to 1)"
        )
    repeated = np.tile(kernel, (1, 1, -(-channels // 3), 1))[:, :, :channels]
    return repeated * np.float32(3 / channels)


def resample_patches(
    kernel: Float[np.ndarray, "p p C D"], size: int
) -> Float[np.ndarray, "P P C D"]:
    """Return the kernel for patches of another size: FlexiViT's (arXiv 2212.08013, eq. 3).

    With B the matrix that resizes a patch, (B^T)^+ w gives resized patches the products that w gave
    the original ones, exactly where patches grow. B is bicubic with antialias, as in timm's
    resample_patch_embed; it is one matrix along each side.
    """
    along = np.asarray(_resizing(kernel.shape[0], size), np.float64)
    inverse = np.linalg.pinv(along.T)
    resampled = np.einsum("Pp,Qq,pqcd->PQcd", inverse, inverse, kernel, optimize=True)
    return resampled.astype(np.float32)


def _resizing(old: int, new: int) -> Float[np.ndarray, "P p"]:
    """Return the matrix that resizes a row of pixels."""
    resize = jax.jit(lambda rows: jax.image.resize(rows, (new, old), "cubic", antialias=True))
    return np.asarray(resize(jnp.eye(old)))

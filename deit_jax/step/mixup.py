"""Mixup and cutmix on the device, drawn once per group of consecutive examples.

The reference draws one lambda and one box per GPU batch of 64. Here that batch is a group of
`mixing.group_size` consecutive examples of the global batch, so that a run does not depend on how
many devices share it, and no image leaves its device.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt8

from deit_jax.step.losses import smooth_one_hot


def mix(
    key: Key[Array, ""],
    images: Float[Array, "B H W C"],
    labels: Int[Array, "B"] | UInt8[Array, "B K"],
    num_classes: int,
    smoothing: float,
    mixing,
) -> tuple[Float[Array, "B H W C"], Float[Array, "B K"]]:
    """Return mixed images and soft targets; `mixing` is the config of that name.

    The labels are smoothed before they are mixed, as in the reference. The partner of example i
    is the one half a group further on: neighbours, which may be copies of one image, never meet.
    Labels [B K], 1 where an image has a class, are targets as they are: nothing to smooth.
    """
    several = labels.ndim == 2
    targets = (
        labels.astype(jnp.float32) if several else smooth_one_hot(labels, num_classes, smoothing)
    )
    if mixing.prob == 0.0 or mixing.mixup_alpha == mixing.cutmix_alpha == 0.0:
        return images, targets
    group = mixing.group_size
    grouped_images = images.reshape(-1, group, *images.shape[1:])
    grouped_targets = targets.reshape(len(grouped_images), group, num_classes)
    height, width = images.shape[1:3]
    pixel_mask, lam = _draw(key, grouped_images.shape[0], height, width, mixing)

    keep = pixel_mask[:, None, :, :, None]  # [G 1 H W 1], 1 = the example's own pixel
    mixed = keep * grouped_images + (1.0 - keep) * _partner(grouped_images)
    lam = lam[:, None, None]
    mixed_targets = lam * grouped_targets + (1.0 - lam) * _partner(grouped_targets)
    return mixed.reshape(images.shape), mixed_targets.reshape(targets.shape)


def _partner(grouped: Shaped[Array, "G g *x"]) -> Shaped[Array, "G g *x"]:
    return jnp.roll(grouped, grouped.shape[1] // 2, axis=1)


def _draw(
    key: Key[Array, ""], groups: int, height: int, width: int, mixing
) -> tuple[Float[Array, "G H W"], Float[Array, "G"]]:
    """Draw for each group the weight of every own pixel and lambda, the weight of the own label."""
    k_on, k_switch, k_mixup, k_cutmix, k_box = jax.random.split(key, 5)
    on = jax.random.bernoulli(k_on, mixing.prob, (groups,))
    if mixing.cutmix_alpha == 0.0:
        use_cutmix = jnp.zeros(groups, bool)
    elif mixing.mixup_alpha == 0.0:
        use_cutmix = jnp.ones(groups, bool)
    else:
        use_cutmix = jax.random.bernoulli(k_switch, mixing.switch_prob, (groups,))

    lam_mixup = _beta(k_mixup, mixing.mixup_alpha, groups)
    box = cutmix_box(k_box, _beta(k_cutmix, mixing.cutmix_alpha, groups), height, width)
    lam_cutmix = 1.0 - jnp.mean(box, axis=(1, 2))  # of the clipped box

    lam = jnp.where(on, jnp.where(use_cutmix, lam_cutmix, lam_mixup), 1.0)
    cut = jnp.where(use_cutmix[:, None, None], 1.0 - box, lam_mixup[:, None, None])
    return jnp.where(on[:, None, None], cut, 1.0), lam


def _beta(key: Key[Array, ""], alpha: float, groups: int) -> Float[Array, "G"]:
    if alpha == 0.0:
        return jnp.ones(groups)
    # Devroye (1996), from Bailey's t distribution of 2 alpha degrees of freedom: exact for every
    # alpha, from two uniform numbers. jax.random.beta draws until it may keep what it drew: loops
    # of unknown length, each turn of which waits for all devices.
    key_radius, key_angle = jax.random.split(key)
    u = jax.random.uniform(key_radius, (groups,), minval=jnp.finfo(jnp.float32).tiny)
    cosine = jnp.cos(2 * jnp.pi * jax.random.uniform(key_angle, (groups,)))
    squared = jnp.expm1(-jnp.log(u) / alpha) * jnp.square(cosine)
    return 0.5 + 0.5 * jnp.sign(cosine) * jax.lax.rsqrt(1.0 + 1.0 / squared)


def cutmix_box(
    key: Key[Array, ""], lam: Float[Array, "G"], height: int, width: int
) -> Float[Array, "G H W"]:
    """Return 1 inside each group's box of relative side sqrt(1 - lam), clipped to the image.

    Sides are truncated to whole pixels and the centre is uniform over pixels as in timm
    0.3.2's rand_bbox, the reference's; a later timm rounds odd sides up.
    """
    side = jnp.sqrt(1.0 - lam)
    key_y, key_x = jax.random.split(key)

    def inside(key, size) -> Bool[Array, "G S"]:
        half = (size * side).astype(jnp.int32) // 2
        centre = jax.random.randint(key, lam.shape, 0, size)
        low = jnp.clip(centre - half, 0, size)[:, None]
        high = jnp.clip(centre + half, 0, size)[:, None]
        pixel = jnp.arange(size)
        return (pixel >= low) & (pixel < high)

    box = inside(key_y, height)[:, :, None] & inside(key_x, width)[:, None, :]
    return box.astype(jnp.float32)

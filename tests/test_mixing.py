"""Mixup, cutmix and erasing against their definitions, pixel by pixel in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import stats

from deit_jax.perf import hlo_cost
from deit_jax.step import mixup, random_erasing

B, H, W, K, GROUP = 64, 12, 20, 5, 8
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(B, H, W, 3)).astype(np.float32)
LABELS = RNG.integers(0, K, B).astype(np.int32)


ERASE = jax.jit(random_erasing.random_erase, static_argnums=2)


def config(**changes):
    values = {"prob": 1.0, "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch_prob": 0.5}
    return ConfigDict({**values, "group_size": GROUP, **changes})


@functools.cache
def jitted_mix(smoothing, changes):
    return jax.jit(lambda key, x, y: mixup.mix(key, x, y, K, smoothing, config(**dict(changes))))


def mix(seed=0, smoothing=0.1, **changes):
    out = jitted_mix(smoothing, tuple(changes.items()))(jax.random.key(seed), IMAGES, LABELS)
    return tuple(np.asarray(x) for x in out)


def partners():
    """Return for each example the index of the one half a group further on."""
    index = np.arange(B).reshape(-1, GROUP)
    return np.roll(index, GROUP // 2, axis=1).ravel()


def smoothed():
    one_hot = np.eye(K)[LABELS]
    return one_hot * 0.9 + 0.1 / K


def solve_lambda(targets):
    """Return each group's lambda, read off its targets."""
    own, other = smoothed(), smoothed()[partners()]
    lams = []
    for g in range(B // GROUP):
        rows = slice(g * GROUP, (g + 1) * GROUP)
        difference = (own - other)[rows]
        assert np.abs(difference).max() > 0, "a group of equal labels says nothing; change the seed"
        lams.append((difference * (targets - other)[rows]).sum() / (difference**2).sum())
    return np.repeat(lams, GROUP)


def test_mixup_blends_images_and_smoothed_labels_with_one_lambda_a_group():
    images, targets = mix(cutmix_alpha=0.0)
    lam = solve_lambda(targets)
    assert len(np.unique(lam.round(4))) == B // GROUP  # every group draws its own
    assert np.all((lam > 0) & (lam < 1))
    blend = lam[:, None, None, None]
    np.testing.assert_allclose(images, blend * IMAGES + (1 - blend) * IMAGES[partners()], atol=1e-5)
    expected = lam[:, None] * smoothed() + (1 - lam[:, None]) * smoothed()[partners()]
    np.testing.assert_allclose(targets, expected, atol=1e-6)


def test_cutmix_pastes_one_box_and_weighs_labels_by_its_clipped_area():
    images, targets = mix(mixup_alpha=0.0, seed=3)
    pasted = np.all(images == IMAGES[partners()], axis=-1)
    kept = np.all(images == IMAGES, axis=-1)
    assert np.all(pasted ^ kept)  # every pixel is whole, of one or of the other
    for group in pasted.reshape(-1, GROUP, H, W):
        assert np.all(group == group[0])
        rows, columns = group[0].any(1), group[0].any(0)
        assert group[0].sum() == rows.sum() * columns.sum()  # a full rectangle
        for line in (rows, columns):
            assert np.diff(np.flatnonzero(line)).max(initial=1) == 1
    np.testing.assert_allclose(solve_lambda(targets), 1 - pasted.mean((1, 2)), atol=1e-5)


def test_cutmix_boxes_are_distributed_as_timms():
    """Compare the boxes' areas with those of timm 0.3.2's rand_bbox, written out in numpy."""
    n, size = 4000, 32
    key_lam, key_box = jax.random.split(jax.random.key(1))
    lam = jax.random.uniform(key_lam, (n,))
    ours = np.asarray(mixup.cutmix_box(key_box, lam, size, size)).sum((1, 2))
    rng = np.random.default_rng(1)
    theirs = []
    for value in rng.uniform(size=n):
        side = int(size * np.sqrt(1 - value))
        y, x = rng.integers(size, size=2)
        y0, y1 = np.clip([y - side // 2, y + side // 2], 0, size)
        x0, x1 = np.clip([x - side // 2, x + side // 2], 0, size)
        theirs.append((y1 - y0) * (x1 - x0))
    assert stats.ks_2samp(ours, theirs).pvalue > 0.01


def test_both_are_on_half_the_time_and_prob_turns_groups_off():
    cut = [
        np.all((mix(seed)[0] == IMAGES) | (mix(seed)[0] == IMAGES[partners()]), axis=(1, 2, 3))
        for seed in range(12)
    ]
    share = np.mean([c.reshape(-1, GROUP)[:, 0] for c in cut])
    assert 0.3 < share < 0.7  # of 96 groups
    images, targets = mix(prob=0.0)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_allclose(targets, smoothed(), atol=1e-6)


@pytest.mark.parametrize("alpha", [0.4, 0.8, 3.0])
def test_mixup_lambda_follows_the_beta_distribution(alpha):
    groups = 5000
    key = jax.random.key(0)
    _, lam = jax.jit(
        lambda k: mixup._draw(k, groups, 4, 4, config(mixup_alpha=alpha, cutmix_alpha=0.0))
    )(key)
    lam = np.asarray(lam)
    assert np.all((lam >= 0) & (lam <= 1))
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_drawing_lambda_takes_no_loop_of_unknown_length():
    """One of unknown length would ask all devices in every turn whether to go on."""
    draw = jax.jit(lambda k: mixup._draw(k, 8, 4, 4, config()))
    assert hlo_cost.cost(draw.lower(jax.random.key(0)).compile().as_text()).unknown_loops == 0


@pytest.mark.parametrize(("group", "repeats"), [(64, 3), (8, 3), (6, 3), (8, 4)])
def test_copies_of_an_image_never_meet(group, repeats):
    """Adjacent triples are copies; wherever a group begins, no one's partner is its own copy."""
    positions = np.arange(5 * group).reshape(-1, group)
    for shift in range(repeats):
        image = (positions + shift) // repeats
        partner = np.asarray(mixup._partner(jnp.asarray(image)))
        assert not np.any(image == partner)


def test_erasing_fills_a_rectangle_with_standard_normal_noise():
    n = 1500
    images = np.full((n, 32, 32, 3), 100.0, np.float32)
    out = np.asarray(ERASE(jax.random.key(0), jnp.asarray(images), 0.25))
    erased = np.all(out != 100.0, axis=-1)
    assert np.all(np.all(out == 100.0, axis=-1) | erased)
    on = erased.any((1, 2))
    assert stats.binomtest(int(on.sum()), n, 0.25).pvalue > 0.01
    assert stats.kstest(out[erased].ravel()[:5000], "norm").pvalue > 0.01
    for mask in erased[on]:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()
    area, aspect = [], []
    for mask in erased[on]:
        h, w = mask.any(1).sum(), mask.any(0).sum()
        area.append(h * w / 32**2)
        aspect.append(h / w)
    assert min(area) > 0.01
    assert max(area) < 1 / 3 + 0.03  # sides are rounded to whole pixels
    assert min(aspect) > 0.2
    assert max(aspect) < 5


def test_erasing_has_the_rectangles_of_timms_algorithm():
    """Compare heights with those of timm's loop (draw, round, retry ten times) in numpy."""
    n, size = 3000, 16
    images = jnp.zeros((n, size, size, 1))
    out = np.asarray(ERASE(jax.random.key(4), images, 1.0))
    ours = (out != 0).any((2, 3)).sum(1)
    rng = np.random.default_rng(4)
    theirs = []
    for _ in range(n):
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * size * size
            aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
            h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if h < size and w < size:
                theirs.append(h)
                break
    assert stats.ks_2samp(ours, theirs).pvalue > 0.01


def test_erasing_off_returns_the_images():
    np.testing.assert_array_equal(ERASE(jax.random.key(0), jnp.asarray(IMAGES), 0.0), IMAGES)

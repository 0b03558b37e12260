"""Check what the augmentations draw, against timm's grammar, and that only the seed decides it."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from skimage import data
from sklearn.datasets import load_sample_images

from deit_jax.data import augment, image_ops


@pytest.fixture(scope="module")
def photos():
    """Three photographs of 224x224 and a wide one."""
    square = [*load_sample_images().images, data.astronaut()]
    resized = [cv2.resize(photo, (224, 224), interpolation=cv2.INTER_AREA) for photo in square]
    return [*resized, cv2.resize(data.chelsea(), (250, 181), interpolation=cv2.INTER_AREA)]


def test_three_augment_applies_exactly_one(photos):
    photo, rng, counts = photos[0], np.random.default_rng(0), [0, 0, 0]
    grey, inverted = image_ops.grayscale(photo), image_ops.solarize(photo, 128)
    blur = augment.make_augment("3aug")
    for _ in range(300):
        out = blur(photo, rng)
        counts[[np.array_equal(out, grey), np.array_equal(out, inverted), True].index(True)] += 1
    assert min(counts) > 70  # 100 each, standard deviation 8


def test_color_jitter_follows_torchvision(photos):
    """Blends by Pillow's enhancers with factors in [1-s, 1+s], in every order."""
    photo, jitter, orders = photos[0], augment.ColorJitter(0.4), set()
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        factors, order = rng.uniform(0.6, 1.4, size=3), rng.permutation(3)
        image = Image.fromarray(photo)
        for index in order:
            image = kinds[index](image).enhance(float(factors[index]))
        ours = jitter(photo, np.random.default_rng(seed))
        assert np.abs(ours.astype(int) - np.asarray(image).astype(int)).mean() < 0.01
        orders.add(tuple(order))
    assert len(orders) == 6


def test_make_augment(photos):
    photo = photos[0]
    none = augment.make_augment("")
    assert none(photo, np.random.default_rng(0)) is photo
    # timm and DeiT leave colour jitter out where there is an automatic augmentation.
    rand = "rand-m9-mstd0.5-inc1"
    assert augment.make_augment(rand, color_jitter=0.4) == augment.make_augment(rand)
    three = augment.make_augment("3aug", color_jitter=0.3)
    assert three == augment.make_augment("three", 0.3) == augment.make_augment("3-augment", 0.3)
    assert augment.make_augment("", 0.3) != none
    for function in (none, three, augment.make_augment(rand)):
        assert pickle.loads(pickle.dumps(function)) == function  # as worker processes need


def test_parses_timm_grammar():
    full = augment.make_augment("rand-m9-mstd0.5-inc1")
    assert full == augment.RandAugment(augment.INCREASING_OPS, 9.0, 0.5, 2, 0.5)
    plain = augment.RandAugment(augment.ORIGINAL_OPS)
    assert augment.make_augment("rand") == augment.make_augment("rand-inc0") == plain
    other = augment.make_augment("rand-p0.7-inc1-n3-mstd101")
    assert (other.magnitude, other.std, other.num_ops, other.prob) == (10, np.inf, 3, 0.7)
    assert len(augment.INCREASING_OPS) == len(augment.ORIGINAL_OPS) == 15
    assert sum(name.endswith("Increasing") for name in augment.INCREASING_OPS) == 6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rand-m9-w0", "'w0'.*weighted"),
        ("rand-tweights", "'tweights'.*weighted"),
        ("rand-m9-x3", "'x3'"),
        ("rand-m", "'m'"),
        ("rand-m9.5", "'m9.5'"),
        ("rand-m9-", "''"),
        ("rand-p1.5", "probability"),
        ("rand-m9-mstd-0.5", "'mstd'"),
        ("random", "'random'"),
        ("augmix-m5", "'augmix-m5'"),
    ],
)
def test_rejects_what_it_cannot_do(spec, message):
    with pytest.raises(ValueError, match=message):
        augment.make_augment(spec)


def test_rejects_negative_jitter():
    with pytest.raises(ValueError, match="negative"):
        augment.make_augment("", -0.1)


def test_draws_operations_levels_and_signs(monkeypatch):
    """2 of 15 with replacement, half of them applied, N(9, 0.5) clipped to 10, either sign."""
    calls = []

    def record(name):
        return lambda image, level, sign: calls.append((name, level, sign)) or image

    monkeypatch.setattr(augment, "OPS", {name: record(name) for name in augment.OPS})
    function, rng = augment.make_augment("rand-m9-mstd0.5-inc1"), np.random.default_rng(7)
    image, per_image = np.zeros((2, 2, 3), np.uint8), []
    for _ in range(6000):
        before = len(calls)
        function(image, rng)
        per_image.append([name for name, _, _ in calls[before:]])
    # Binomial: 6000 +- 55 applied, 400 +- 19 of each; the bounds are five standard deviations.
    assert abs(len(calls) - 6000) < 275
    names = [name for name, _, _ in calls]
    assert set(names) == set(augment.INCREASING_OPS)
    assert all(abs(names.count(name) - 400) < 100 for name in set(names))
    pairs = [pair for pair in per_image if len(pair) == 2]
    assert abs(len(pairs) - 1500) < 170
    assert sum(a == b for a, b in pairs) > 50  # 100 +- 10: with replacement
    levels = np.array([level for _, level, _ in calls])
    assert abs(levels.mean() - 8.996) < 0.03  # 9 less what the clip at two deviations takes off
    assert abs(levels.std() - 0.489) < 0.03
    assert levels.max() == 10.0
    assert abs(np.mean(levels == 10.0) - 0.0228) < 0.01
    assert abs(np.mean([sign for _, _, sign in calls])) < 0.07


def test_levels_fixed_uniform_and_clipped():
    rng = np.random.default_rng(0)

    def levels(spec):
        function = augment.make_augment(spec)
        return np.array([function.level(rng) for _ in range(2000)])

    assert set(levels("rand-m7")) == {7.0}
    assert set(levels("rand-m15")) == {10.0}
    uniform = levels("rand-m8-mstd101")
    assert uniform.min() >= 0
    assert uniform.max() < 8
    assert abs(uniform.mean() - 4) < 0.3
    wide = levels("rand-m5-mstd50")
    assert wide.min() == 0
    assert wide.max() == 10


@pytest.mark.parametrize("spec", ["rand-m9-mstd0.5-inc1", "rand-n4-p1.0-mstd101", "3aug"])
def test_same_seed_same_bytes_in_any_thread(photos, spec):
    function = augment.make_augment(spec, 0.3)

    def run(seed):
        return function(photos[seed % len(photos)], np.random.default_rng(seed)).tobytes()

    alone = [run(seed) for seed in range(96)]
    assert len(set(alone)) > 50
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(run, range(96))) == alone


@pytest.mark.parametrize("spec", ["rand-n4-p1.0-m5-inc1", "3aug"])
def test_takes_flipped_views(photos, spec):
    """A mirrored image arrives as a view with a negative stride."""
    view, function = photos[1][:, ::-1], augment.make_augment(spec, 0.3)
    for seed in range(20):
        ours = function(view, np.random.default_rng(seed))
        assert np.array_equal(ours, function(view.copy(), np.random.default_rng(seed)))

"""Eight devices out of one CPU, and small configs."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# No compilation cache, however much it would save: with jaxlib 0.12 a program for eight CPU devices
# that is read back from it starts its collectives in another order on each, and they never meet.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import pytest

from configs import base


@pytest.fixture
def tiny_config():
    """Return the full recipe around a student and a teacher that compile in seconds."""
    return make_tiny_config()


def make_tiny_config():
    c = base.get_config()
    c.batch_size, c.epochs = 32, 2.0
    c.data.source, c.data.eval_crop_ratio = "digits", 1.0
    c.data.eval_fraction = 0.9  # leaves 180 images to train on: five steps an epoch
    c.data.threads = 2
    c.model.name = "deit_tiny_distilled_patch16_224"
    c.model.image_size, c.model.patch_size, c.model.width, c.model.depth = 16, 4, 24, 2
    c.teacher.model.name = "regnety_002"
    c.teacher.model.widths, c.teacher.model.depths = (8, 16), (1, 1)
    c.teacher.model.stem_width = 8
    c.teacher.epochs = 1.0
    c.distill.kind = "hard"
    c.mixing.group_size = 8
    c.optim.warmup_epochs, c.optim.lr, c.optim.ema_decay = 1.0, 1e-3, 0.9
    c.train.log_every_steps, c.train.eval_batch_size = 1, 256
    return c


@pytest.fixture
def torch():
    """Return PyTorch; `make test` installs it, TEST_TORCH=0 does without."""
    return _reference("torch")


@pytest.fixture
def timm():
    """Return timm."""
    return _reference("timm")


def _reference(name):
    if os.environ.get("TEST_TORCH") == "0":
        pytest.skip("TEST_TORCH=0")
    from tests import timm_reference

    return getattr(timm_reference, f"import_{name}")()

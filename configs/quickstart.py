"""Distil a DeiT on real images in about two minutes on two CPU cores.

    deit train --config=configs/quickstart.py --workdir=runs/quickstart

The images are scikit-learn's handwritten digits (1797 of 8 x 8 pixels, a fifth held out), enlarged.
First a small RegNetY is trained as the teacher, then a small DeiT learns from its answers through
the distillation token. The same config trains on a folder of your own images, one folder a class:

    deit train --config=configs/quickstart.py --workdir=runs/mine \\
        --config.data.source=folder:/path/to/images
"""

from deit_jax.configs import base


def get_config():
    """Return the quickstart's config."""
    c = base.get_config()
    c.batch_size = 96
    c.epochs = 50.0
    c.data.source = "digits"
    c.data.eval_crop_ratio = 1.0

    c.model.name = "deit_tiny_distilled_patch16_224"
    c.model.image_size = 32
    c.model.patch_size = 8
    c.model.width = 96
    c.model.depth = 4
    c.model.drop_path = 0.0

    c.distill.kind = "hard"
    c.teacher.model.name = "regnety_002"
    c.teacher.model.widths = (32, 64)
    c.teacher.model.depths = (1, 2)
    c.teacher.model.group_width = 64
    c.teacher.model.stem_width = 16
    c.teacher.epochs = 12.0
    c.teacher.lr = 1e-2

    # Far milder than on ImageNet: a mirrored or cut digit may be another digit.
    c.augment.crop_scale = (0.8, 1.0)
    c.augment.flip_prob = 0.0
    c.augment.auto = ""
    c.augment.color_jitter = 0.0
    c.augment.repeats = 1
    c.augment.erase_prob = 0.1
    c.mixing.prob = 0.2
    c.mixing.group_size = 32

    c.optim.lr = 2e-3
    c.optim.warmup_epochs = 2.0
    c.optim.ema_decay = 0.995
    c.train.log_every_steps = 10
    c.train.eval_every_epochs = 2.0
    c.train.save_every_epochs = 10.0
    c.train.eval_batch_size = 128
    return c

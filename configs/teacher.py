"""The convnet teacher of DeiT: a RegNetY on ImageNet-1k.

    deit train --config=configs/teacher.py:variant=160 --workdir=runs/regnety_160

Argument: variant = 002, 004, 040, 080, 120 or 160. The paper trains its teachers "similarly" to
the students but with SGD, and does not publish the learning rate; the one below is RegNet's own,
0.1 for 128 images (arXiv 2003.13678). Published top-1 (DeiT table 5), not by us: RegNetY-4GF 80.0,
-8GF 81.7, -16GF 82.9. This config has not been run on ImageNet here.
"""

from deit_jax.configs import base


def get_config(text: str = ""):
    """Return the recipe for one RegNetY."""
    args = base.parse_args(text, variant="160")
    c = base.get_config()
    c.model = base.get_model_config(f"regnety_{args.variant}")
    c.optim.name = "sgd"
    c.optim.lr = c.get_ref("batch_size").to_float() * 0.1 / 128
    c.optim.weight_decay = 5e-5
    c.optim.ema_decay = 0.0
    return c

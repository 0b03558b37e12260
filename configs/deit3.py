"""DeiT III (arXiv 2204.07118) on ImageNet-1k: pre-training and its two fine-tunings.

    deit train --config=configs/deit3.py:size=base --workdir=runs/deit3_b
    deit train --config=configs/deit3.py:size=base,stage=finetune224 \\
        --config.init.weights=runs/deit3_b --workdir=runs/deit3_b_224
    deit train --config=configs/deit3.py:size=base,stage=finetune384 \\
        --config.init.weights=runs/deit3_b_224 --workdir=runs/deit3_b_384

Arguments: size = small, medium, base, large or huge; stage = pretrain, finetune224 or finetune384.
Binary cross-entropy, LAMB, 3-Augment and a lower resolution for pre-training, as in the reference's
README_revenge.md; base and larger are pre-trained below 224 and need finetune224. The commands for
medium are not published there; it takes base's learning rate and small's resolution.

Published top-1 on ImageNet-1k (the same file), by facebookresearch/deit and not by us:

    small 81.4   medium 83.0   base 83.8   large 84.9   huge 85.2
    at 384: small 83.4   base 85.0   large 85.8

This config has not been run on ImageNet here.
"""

from deit_jax.configs import base

# size: pre-training lr, resolution and stochastic depth, then depth's rate when fine-tuning at 224
# and at 384. The reference's H/14 takes 160 pixels and sees the
# 11 x 11 patches that fit into them: 154.
SIZES = {
    "small": (4e-3, 224, 0.05, 0.05, 0.0),
    "medium": (3e-3, 224, 0.1, 0.1, 0.1),
    "base": (3e-3, 192, 0.2, 0.2, 0.15),
    "large": (3e-3, 192, 0.45, 0.45, 0.4),
    "huge": (3e-3, 154, 0.6, 0.55, 0.55),
}
STAGES = ("pretrain", "finetune224", "finetune384")


def get_config(text: str = ""):
    """Return one stage of one size."""
    args = base.parse_args(text, size="small", stage="pretrain")
    if args.size not in SIZES or args.stage not in STAGES:
        raise ValueError(f"choose size from {', '.join(SIZES)} and stage from {', '.join(STAGES)}")
    lr, resolution, rate, rate_224, rate_384 = SIZES[args.size]
    c = base.get_config()
    c.model.name = f"deit3_{args.size}_patch{14 if args.size == 'huge' else 16}_224"
    c.data.eval_crop_ratio = 1.0
    c.optim.warmup_epochs = 5.0
    c.optim.ema_decay = 0.0
    c.augment.erase_prob = 0.0
    if args.stage == "pretrain":
        _pretrain(c, lr, resolution, rate)
    else:
        resolution = int(args.stage.removeprefix("finetune"))
        _finetune(c, resolution, rate_224 if resolution == 224 else rate_384)
    return c


def _pretrain(c, lr: float, resolution: int, drop_path: float) -> None:
    c.epochs, c.batch_size = 800.0, 2048
    c.model.image_size, c.model.drop_path = resolution, drop_path
    c.loss.kind, c.loss.smoothing = "binary", 0.0
    c.augment.auto, c.augment.color_jitter = "3aug", 0.3
    c.optim.name, c.optim.lr, c.optim.clip_norm = "lamb", lr, 1.0  # --unscale-lr


def _finetune(c, resolution: int, drop_path: float) -> None:
    c.init.required = True
    c.epochs, c.batch_size = 20.0, 512
    c.model.image_size, c.model.drop_path = resolution, drop_path
    c.augment.repeats = 1
    c.optim.lr, c.optim.weight_decay = 1e-5, 0.1

"""DeiT on ImageNet-1k (arXiv 2012.12877), plain or distilled.

    deit train --config=configs/deit.py:variant=small,distilled=True --workdir=runs/deit_s \\
        --config.teacher.weights=runs/regnety_160

Arguments: variant = tiny, small or base; distilled = True for the distillation token; kind = hard,
soft or none; epochs = 300 or 1000. `kind=hard,distilled=False` distils through the class token.

Published top-1 on ImageNet (DeiT tables 3 and 5, 224 px), by facebookresearch/deit and not by us:

    variant   plain   distilled, 300 epochs   distilled, 1000 epochs
    tiny      72.2    74.5                    76.6
    small     79.8    81.2                    82.6
    base      81.8    83.4                    84.2

This config has not been run on ImageNet here. Its teacher, RegNetY-16GF (82.9), is trained with
configs/teacher.py.
"""

from deit_jax.configs import base


def get_config(text: str = ""):
    """Return the paper's recipe for one variant."""
    args = base.parse_args(text, variant="base", distilled=False, kind="", epochs=300)
    if args.variant not in ("tiny", "small", "base"):
        raise ValueError(f"variant={args.variant}: choose tiny, small or base")
    c = base.get_config()
    c.epochs = float(args.epochs)
    c.model.name = f"deit_{args.variant}{'_distilled' if args.distilled else ''}_patch16_224"
    c.distill.kind = args.kind or ("hard" if args.distilled else "none")
    if c.distill.kind == "soft":  # DeiT section 5.2: "usual" distillation
        c.distill.alpha, c.distill.tau = 0.1, 3.0
    return c

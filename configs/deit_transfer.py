"""Fine-tune a DeiT trained on ImageNet on a smaller data set (DeiT section 5.4, table 7).

    deit train --config=configs/deit_transfer.py:dataset=cifar10,variant=base \\
        --config.init.weights=runs/deit_b --workdir=runs/cifar10

Arguments: dataset = cifar10, cifar100, flowers102, cars, inat18 or inat19; variant = tiny, small or
base; image_size = 224; distilled = True for a student with a distillation token. It learns from the
labels through the class token alone, unless `--config.distill.kind=hard` is given with a teacher.

The settings are those the authors gave in their issue tracker (45 for CIFAR and Cars, 105 and 141
for iNaturalist); none were published for Flowers, which here takes CIFAR's. TFDS has no iNaturalist
2019: give `--config.data.source=folder:PATH`. Published top-1 of DeiT-B / distilled DeiT-B (table
7), by the authors and not by us:

    cifar10 99.1 / 99.1   cifar100 90.8 / 91.3   flowers102 98.4 / 98.8
    cars    92.1 / 92.9   inat18   73.2 / 73.7   inat19     77.7 / 78.4

This config has not been run on these data sets here.
"""

from deit_jax.configs import base, deit

SOURCES = {
    "cifar10": ("tfds:cifar10", "train", "test"),
    "cifar100": ("tfds:cifar100", "train", "test"),
    "flowers102": ("tfds:oxford_flowers102", "train+validation", "test"),
    "cars": ("tfds:cars196", "train", "test"),
    "inat18": ("tfds:i_naturalist2018", "train", "validation"),
    "inat19": ("folder:inat19", "train", "validation"),
}


def get_config(text: str = ""):
    """Return the transfer to one data set."""
    args = base.parse_args(text, dataset="cifar10", variant="base", distilled=False, image_size=224)
    if args.dataset not in SOURCES:
        raise ValueError(f"dataset={args.dataset}: choose one of {', '.join(SOURCES)}")
    c = deit.get_config(f"variant={args.variant},distilled={args.distilled},kind=none")
    c.model.image_size = args.image_size
    c.data.source, c.data.train_split, c.data.eval_split = SOURCES[args.dataset]
    c.init.required, c.init.head = True, "drop"
    c.batch_size = 768
    c.optim.ema_decay = 0.0
    if args.dataset.startswith("inat"):
        c.epochs = 360.0
        c.optim.lr = 7.5e-5
        c.augment.erase_prob = 0.1
    else:
        c.epochs = 1000.0
        c.optim.name, c.optim.lr, c.optim.weight_decay = "sgd", 0.01, 1e-4
        c.augment.erase_prob = 0.0
        c.model.drop_path = 0.0
    return c

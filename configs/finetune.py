"""Fine-tune a trained DeiT on images of your own: a folder for each class, a thousand are enough.

    deit train --config=configs/finetune.py:data=/path/to/images,variant=small \\
        --config.init.weights=pretrained --workdir=runs/mine
    deit eval --config=configs/finetune.py:data=/path/to/images --workdir=runs/mine

`pretrained` are the weights published for the model's name; a run, a file or a folder do as well.
Arguments: data = a folder, or any config.data.source; variant = tiny, small or base; distilled =
True for weights with a distillation token, both of whose heads then learn the labels; image_size.
Of images without classes for evaluation a fifth is held out (config.data.eval_fraction).

New heads; a rate that falls by a quarter with every layer away from them (`optim.layer_decay`, as
in BEiT's and MAE's fine-tunings); light augmentation, no mixing, no copies; the run ends when ten
epochs have not been better, and `--checkpoint=best` is the best state. For fewer images yet, or a
CPU, train the heads alone: `--config.optim.tune=linear_probe`.

Measured on a small model only (benchmarks/finetune.py): from clothes to digits, so far apart,
`optim.layer_decay=1.0` was better. Try it where your images are unlike those of the weights.
"""

from deit_jax.configs import base, deit


def get_config(text: str = ""):
    """Return the fine-tuning of one variant on one's own data."""
    args = base.parse_args(text, data="", variant="small", distilled=False, image_size=224)
    c = deit.get_config(f"variant={args.variant},distilled={args.distilled},kind=none")
    c.model.image_size = args.image_size
    c.loss.heads = "both" if args.distilled else "cls"
    named = ":" in args.data or args.data in ("digits", "mnist", "fashion_mnist")
    c.data.source = args.data if named else f"folder:{args.data}"
    c.init.required, c.init.head = True, "drop"

    c.batch_size = 64
    c.epochs = 50.0
    c.optim.lr = c.get_ref("batch_size").to_float() * 1e-3 / 256
    c.optim.min_lr = c.get_ref("batch_size").to_float() * 1e-6 / 256
    c.optim.warmup_lr = c.get_ref("batch_size").to_float() * 1e-6 / 256
    c.optim.warmup_epochs = 5.0
    c.optim.layer_decay = 0.75
    c.optim.ema_decay = 0.0  # of a few thousand steps it would hold little else than the start

    c.augment.crop_scale = (0.4, 1.0)
    c.augment.auto = "rand-m6-mstd0.5-inc1"
    c.augment.repeats = 1
    c.augment.erase_prob = 0.0
    c.mixing.prob = 0.0

    c.train.eval_batch_size = 256
    c.train.log_every_steps = 10
    c.train.patience_epochs = 10.0
    c.train.keep_checkpoints = 1
    return c

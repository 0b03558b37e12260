"""DeiT's Table 8: the recipe without each of its parts, and with what it leaves out.

    python benchmarks/evidence/table8.py --scale=cpu

The moving average is the first row's own: every run keeps one.
"""

from study import NONE, PLAIN, Arm, Study

EXPECTED = """Written before the first run. The paper trains 86 million weights for 300 epochs,
where each part of the recipe fights overfitting: without any, 1.4 to 77 points are lost. Here a
model of a few hundred thousand weights sees its images some 20 times and does not overfit:
leaving out RandAugment, mixup, cutmix, both, erasing, or stochastic depth should each GAIN
accuracy, most by leaving out both mixup and cutmix; leaving out repeated augmentation (three
times as many different images) should gain a little or nothing; dropout should lose. SGD should
lose much, as in the paper (7.3). The moving average should gain, for the last steps of a short
training are noisy. If all this comes true, it does not contradict the paper: it says that the
recipe is for long trainings.

Added when SGD had collapsed at a learning rate of 0.1, and had come to 21 % at 0.01, before the
first run of this row: for SGD a weight decay of 0.05 is part of the gradient and shrinks the
weights by exp(-78) over these steps, where AdamW's shrinks them by exp(-0.16). With 5e-5, which
RegNetY is trained with, SGD should learn, and remain behind AdamW."""

CHANGES = {
    "sgd-little-decay": {"optim.name": "sgd", "optim.lr": 0.1, "optim.weight_decay": 5e-5},
    "no-randaugment": {"augment.auto": "", "augment.color_jitter": 0.0},
    "no-mixup": {"mixing.mixup_alpha": 0.0},
    "no-cutmix": {"mixing.cutmix_alpha": 0.0},
    "no-mixup-no-cutmix": {"mixing.prob": 0.0},
    "no-erasing": {"augment.erase_prob": 0.0},
    "no-stochastic-depth": {"model.drop_path": 0.0},
    "no-repeated-augmentation": {"augment.repeats": 1},
    "dropout": {"model.dropout": 0.1},
    "sgd": {"optim.name": "sgd", "optim.lr": 0.1},
}
ARMS = [NONE, *(Arm(name, PLAIN | change) for name, change in CHANGES.items())]

if __name__ == "__main__":
    Study("table8", EXPECTED, __doc__).run(ARMS)

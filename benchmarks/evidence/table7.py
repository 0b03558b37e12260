"""DeiT's Table 7: transfer, here of clothes to scikit-learn's handwritten digits.

    python benchmarks/evidence/table7.py --scale=cpu

Students without and with a teacher, trained on Fashion-MNIST, are fine-tuned on 100, 400 and 1438
digits with the labels alone, for as many steps as one from scratch; 359 are kept to test.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from study import NONE, PLAIN, TOKEN, Arm, Study, write_idx

EXPECTED = """Written before the first run. The paper: what DeiT learned on ImageNet carries over,
and the distilled one is a little better on most data sets. Expected here: starting from clothes
beats starting from nothing clearly at 100 and 400 digits and little at 1438; plain or distilled,
no difference that three seeds can tell."""

SIZES = (100, 400, 1438)
STEPS, BATCH, LR = 20, 64, 1e-3  # steps for every epoch of the pre-training
GENTLE = {  # as in configs/quickstart.py: a mirrored or cut digit may be another one
    "augment.crop_scale": (0.8, 1.0),
    "augment.flip_prob": 0.0,
    "augment.auto": "",
    "augment.color_jitter": 0.0,
    "augment.repeats": 1,
    "augment.erase_prob": 0.0,
    "mixing.prob": 0.2,
    "mixing.group_size": 32,
    "model.drop_path": 0.0,
    "batch_size": BATCH,
    "optim.lr": LR,
    "optim.ema_decay": 0.0,
}


def digits(count: int, folder: Path) -> Path:
    """Write some digits to train on and always the same 359 to test, as idx files."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    for part, chosen in (("t10k", order[:359]), ("train", order[359 : 359 + count])):
        images = (data.images[chosen] * (255 / 16)).round()
        folder.mkdir(parents=True, exist_ok=True)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", data.target[chosen])
    return folder


def arms(study: Study) -> list[Arm]:
    """Return three ways to begin for every number of digits."""
    found = []
    for count in SIZES:
        folder = digits(count, study.runs / f"digits-{count}")
        own = GENTLE | {"data.source": "mnist", "data.dir": str(folder)}
        own["epochs"] = STEPS * BATCH / count  # in the scale's epochs
        again = {**own, "init.required": True, "init.head": "drop"}
        token = {"distill.kind": "none", "loss.heads": "both"}
        found += [
            Arm(f"digits-{count}-scratch", PLAIN | own),
            Arm(f"digits-{count}-from-none", PLAIN | again, start=NONE),
            Arm(f"digits-{count}-from-token", token | again, start=TOKEN),
        ]
    return found


if __name__ == "__main__":
    study = Study("table7", EXPECTED, __doc__)
    study.run(arms(study))

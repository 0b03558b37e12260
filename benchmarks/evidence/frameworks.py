"""One recipe in two frameworks, from pixels to accuracy: timm in PyTorch, and ours.

    python benchmarks/evidence/frameworks.py --scale=cpu

The same images, the same teacher's weights, the same model; crops of random size and shape as the
paper has them. Nothing else is shared: see timm_side.py. It needs torch and timm (as `make test`).
"""

from importlib.metadata import version

import timm_side
from study import TOKEN, Arm, Study, teacher_config

EXPECTED = """Written before the first run. If the two are one recipe, their accuracies are draws of
one distribution: the difference of the means lies within its joint 95 % interval in 19 of 20
studies like this one, for each head and for the moving average. Known differences, each expected
to be too small to see: timm starts the class token near 0 and does not decay the distillation
token, where ours follows facebookresearch/deit; timm's seeds share one order of the images.

Written when six seeds of either had come out 1.2 points apart (0.3 to 2.2), before the first run
in our order. timm's sampler shuffles by the number of the epoch alone. What its one order is worth
is in every run of it, and in no interval: its distillation heads spread by 0.3, ours by 1.0. So
timm's runs are made once more, each over the shuffles of our run of its seed: ten of them, no more
and no fewer, compared by pairs that share their order. Expected: the order is the difference, and
0 lies in the pairs' intervals. Two more parts are not as ours but as this timm has them: the
partners in mixing (image i of a batch and 63 - i: in the middle copies of one image meet, which in
the paper are on different GPUs), and cutmix boxes of odd sides, which timm 0.3.2 drew a pixel
smaller."""

CROPS = {"augment.crop": "random_resized"}
OURS = Arm("recipe-ours", TOKEN.changes | CROPS, TOKEN.teacher)
TIMM = Arm("recipe-timm", TOKEN.changes | CROPS, TOKEN.teacher)
TIMM_IN_OUR_ORDER = Arm("recipe-timm-our-order", TOKEN.changes | CROPS, TOKEN.teacher)


class Frameworks(Study):
    """A study arms of which timm trains."""

    def train(self, arm: Arm, seed: int) -> dict:
        """Train a run by one of the two and return its results."""
        if arm is OURS:
            return super().train(arm, seed)
        config, workdir = self.config(arm, seed), self.workdir(arm.name, seed)
        network = teacher_config(arm.teacher, self.scale, self.data).model
        found = timm_side.train_once(
            config, self.teacher(arm.teacher), network, workdir, our_order=arm is TIMM_IN_OUR_ORDER
        )
        top1 = {name: {"top1": found[name]} for name in ("cls", "dist", "fused", "teacher")}
        return top1 | {"ema": {name: {"top1": value} for name, value in found["ema"].items()}}


def versions(study, arm: Arm, seed: int) -> dict:
    """Return the versions of what timm's arm was trained by."""
    return {} if arm is OURS else {name: version(name) for name in ("torch", "timm")}


if __name__ == "__main__":
    Frameworks("frameworks", EXPECTED, __doc__).run([OURS, TIMM_IN_OUR_ORDER, TIMM], versions)

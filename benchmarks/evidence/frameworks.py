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
token, where ours follows facebookresearch/deit; timm's seeds share one order of the images."""

CROPS = {"augment.crop": "random_resized"}
OURS = Arm("recipe-ours", TOKEN.changes | CROPS, TOKEN.teacher)
TIMM = Arm("recipe-timm", TOKEN.changes | CROPS, TOKEN.teacher)


class Frameworks(Study):
    """A study one arm of which timm trains."""

    def train(self, arm: Arm, seed: int) -> dict:
        """Train a run by one of the two and return its results."""
        if arm is not TIMM:
            return super().train(arm, seed)
        config, workdir = self.config(arm, seed), self.workdir(arm.name, seed)
        network = teacher_config(arm.teacher, self.scale, self.data).model
        found = timm_side.train_once(config, self.teacher(arm.teacher), network, workdir)
        top1 = {name: {"top1": found[name]} for name in ("cls", "dist", "fused")}
        return top1 | {"ema": {name: {"top1": value} for name, value in found["ema"].items()}}


def versions(study, arm: Arm, seed: int) -> dict:
    """Return the versions of what timm's arm was trained by."""
    return {name: version(name) for name in ("torch", "timm")} if arm is TIMM else {}


if __name__ == "__main__":
    Frameworks("frameworks", EXPECTED, __doc__).run([OURS, TIMM], versions)

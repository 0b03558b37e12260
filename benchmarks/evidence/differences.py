"""Which part makes the difference to timm? One part of either recipe as the other has it.

    python benchmarks/evidence/differences.py --scale=cpu

The runs of a seed share the order of the images, and of one framework all else too: views, first
weights, dropped blocks. The rows without a changed part are frameworks.py's.
"""

import contextlib
from unittest import mock

import frameworks
import jax
import jax.numpy as jnp
import timm_side
from flax import linen as nn
from frameworks import OURS, TIMM_IN_OUR_ORDER, Frameworks
from study import Arm

from deit_jax.models import vit
from deit_jax.step import mixup, optimizer
from deit_jax.step.train_step import model_inputs
from deit_jax.train.experiment import resolve

EXPECTED = """Written when six pairs of frameworks.py had come out 0.9 points apart in both heads
(0.1 to 1.6), before the first of these runs. The same weights answer alike in both, and twenty
updates on the same batches end in the same weights (tests/test_trajectory.py). What is left is how
the images look when they reach the student, how it starts, and which blocks are dropped. So timm
trains on our images, erased and mixed by us: if they are the difference, it comes to ours, if they
are not, it stays where it is. And ours has, one at a time:

timm's partners. It mixes image i of a batch with image 63 - i. The three copies of an image stand
side by side, so that in two of three batches the two images in the middle are copies of one image:
2 % of all are as good as not mixed. Ours mixes i with i + 32, and no copies meet; nor do they in
the paper's training, where they go to different GPUs. Without any mixing a student of 20 epochs
gains seven points (table 8). Expected: a tenth or two.

timm's tokens: the class token starts near 0, the distillation token is not decayed. Expected:
nothing to see, though the angle of the two goes with the class head's accuracy (claim.py)."""


@contextlib.contextmanager
def partners_of_timm():
    """Mix image i of a group with the i-th from its end."""
    with mock.patch.object(mixup, "_partner", lambda grouped: jnp.flip(grouped, 1)):
        yield


@contextlib.contextmanager
def tokens_of_timm():
    """Start the class token near 0, and do not decay the distillation token."""
    param = vit.VisionTransformer.param

    def near_zero(self, name, init, *shape):
        init = nn.initializers.normal(1e-6) if name == "cls_token" else init
        return param(self, name, init, *shape)

    no_decay = (*optimizer.NO_DECAY, "dist_token")
    with (
        mock.patch.object(vit.VisionTransformer, "param", near_zero),
        mock.patch.object(optimizer, "NO_DECAY", no_decay),
    ):
        yield


class OurImages:
    """timm's loader, but for the images: ours of the same seed, erased and mixed."""

    def __init__(self, config, dataset):
        self.ours = resolve(config, len(dataset.classes), len(dataset.train), whole=True)
        self.batches, self.epoch = self.ours.batches(dataset), 0
        self.inputs = jax.jit(lambda step, batch: model_inputs(step, batch, self.ours.settings)[:2])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches come next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.ours.order.steps_per_epoch

    def __iter__(self):
        for step in range(self.epoch * len(self), (self.epoch + 1) * len(self)):
            images, targets = (jax.device_get(x) for x in self.inputs(step, self.batches(step)))
            images = timm_side.torch.from_numpy(images.copy()).permute(0, 3, 1, 2).contiguous()
            yield images, timm_side.torch.from_numpy(targets.copy())


class OnOurImages(timm_side.Training):
    """A run by timm on our images."""

    def __init__(self, config, dataset, network, **more):
        super().__init__(config, dataset, network, **more)
        self.order = self.loader = OurImages(config, dataset)
        self.mixup = lambda images, targets: (images, targets)


PARTNERS = Arm("recipe-partners", OURS.changes, OURS.teacher)
TOKENS = Arm("recipe-tokens", OURS.changes, OURS.teacher)
IMAGES = Arm("recipe-timm-our-images", OURS.changes, OURS.teacher)
PARTS = {
    PARTNERS.name: partners_of_timm,
    TOKENS.name: tokens_of_timm,
    IMAGES.name: lambda: mock.patch.object(timm_side, "Training", OnOurImages),
}


class Differences(Frameworks):
    """A study of runs that have a part as the other framework has it."""

    def train(self, arm: Arm, seed: int) -> dict:
        """Train a run and return its results."""
        with PARTS.get(arm.name, contextlib.nullcontext)():
            return super().train(arm, seed)


if __name__ == "__main__":
    Differences("differences", EXPECTED, __doc__).run(
        [OURS, TIMM_IN_OUR_ORDER, IMAGES, PARTNERS, TOKENS], frameworks.versions
    )

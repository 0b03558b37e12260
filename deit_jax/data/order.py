"""The order of a run's examples and the random numbers of each: a function of (seed, position)."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from deit_jax.data.balance import BalancedOrder
from deit_jax.data.sources.base import Labelled, Source
from deit_jax.errors import UserError


def whole_steps(epochs: float, steps_per_epoch: int) -> int:
    """Return epochs in steps, at least one."""
    return max(1, math.floor(epochs * steps_per_epoch + 0.5))


@dataclasses.dataclass(frozen=True)
class EpochOrder:
    """Which image stands at each position: shuffled anew every epoch, copies side by side.

    An epoch has as many positions as whole batches fit in the data set; with `repeats` copies it
    meets 1 / repeats of the images (deit's RASampler, whose "300 epochs" are 100 passes). With a
    `balance` other than "none" classes are met as balance.py says.
    """

    num_images: int
    batch_size: int
    repeats: int
    seed: int
    balance: str = "none"

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch; one at least, which then repeats images."""
        return max(1, self.num_images // self.batch_size)

    def shuffled(self):
        """Return the endless sequence of image indices, one random permutation after another.

        It is a grain.MapDataset.
        """
        import grain  # takes a second, and only who loads images needs it

        return grain.MapDataset.range(self.num_images).seed(self.seed).shuffle().repeat()

    def images(self, source: Source):
        """Return the endless sequence of a source's image indices; raise UserError if it cannot."""
        if self.balance == "none":
            return self.shuffled()
        if not isinstance(source, Labelled):
            raise UserError(
                f"config.data.balance={self.balance}: {source.describe(0)}: this source does not "
                "tell its labels without reading every image; take none, or a folder:, hf: or wds: "
                "of the same images"
            )
        return BalancedOrder(source.labels, self._slots_per_epoch, self.balance, self.seed)

    @property
    def _slots_per_epoch(self) -> int:
        return -(-self.steps_per_epoch * self.batch_size // self.repeats)

    def slot(self, position: int) -> int:
        """Return where in `images()` the image at a position stands."""
        per_epoch = self.steps_per_epoch * self.batch_size
        epoch, within = divmod(position, per_epoch)
        if self.balance != "none":  # nothing is left out between epochs
            return epoch * self._slots_per_epoch + within // self.repeats
        passes = -(-per_epoch // (self.repeats * self.num_images))  # of a set smaller than a batch
        return epoch * passes * self.num_images + within // self.repeats


def offset_seed(seed: int, offset: int) -> int:
    """Return the seed of the data after `offset` rollbacks; far from those of neighbouring runs."""
    return (seed + offset * 0x9E3779B1) % 2**32 if offset else seed


def example_rng(seed: int, position: int) -> np.random.Generator:
    """Return the random numbers of one position; no other position shares them."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))


def example_rngs(seed: int) -> Callable[[int], np.random.Generator]:
    """Return `example_rng` of one seed, but ten times faster: each call ends the one before."""
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64))
    generator, state = np.random.Generator(bits), bits.state

    def at(position: int) -> np.random.Generator:
        state["state"]["key"][1] = position
        bits.state = state
        return generator

    return at

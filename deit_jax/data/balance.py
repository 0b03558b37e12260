"""How often classes are met, where it is not as often as they have images: `data.balance`.

An epoch has a fixed number of slots, and class c the share w_c / sum w of them: w_c the square root
of its number of images, or 1. All is integers and a function of (seed, epoch), so that any process
can begin anywhere: which images an epoch has follows without those before it.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

# A class's share of an epoch, by its number of images.
WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sqrt": np.sqrt,
    "equal": lambda counts: (counts > 0).astype(np.float64),
}
POINT = 32  # bits after the point of what an epoch has of the classes up to one
KEPT = 4  # epochs at hand: threads that load ahead stand in two at most, of tiny data in more


class BalancedOrder:
    """The endless sequence of image indices in which classes have the shares of `balance`.

    `order[slot]` is an image. Epoch e has the slots [e S, (e + 1) S), S = `slots`; in each a class
    has its exact share, rounded up or down so that 2^k epochs from a multiple of 2^k on have it
    within one image. A class gives its images in one random permutation after another, across
    epochs: at any time each was met as often as any other of it, or once more.
    """

    def __init__(self, labels: Int[np.ndarray, "n"], slots: int, balance: str, seed: int):
        labels = np.asarray(labels)
        counts = np.bincount(labels)
        weights = np.cumsum(WEIGHTS[balance](counts))  # sums in this order on every machine
        self._slots = slots
        self._salt = int(_mixed(np.array([seed], np.uint64))[0])
        ends = np.floor(weights / weights[-1] * (slots << POINT)).astype(np.int64)
        ends[weights == weights[-1]] = slots << POINT
        # Where in an epoch's slots each class begins and ends, from an offset of the seed's.
        self._edges = np.concatenate([[0], ends]) + (self._salt >> (64 - POINT))
        self._by_class = np.argsort(labels, kind="stable")  # images, class after class
        self._first = np.cumsum(counts) - counts
        self._counts = counts
        self._lock, self._epochs = threading.Lock(), OrderedDict[int, np.ndarray]()

    def __getitem__(self, slot: int) -> int:
        epoch, within = divmod(slot, self._slots)
        with self._lock:  # one thread makes an epoch, the others wait for it
            if epoch not in self._epochs:
                self._epochs[epoch] = self._images(epoch)
                if len(self._epochs) > KEPT:
                    self._epochs.popitem(last=False)
            return int(self._epochs[epoch][within])

    def share(self, epoch: int) -> Int[np.ndarray, "K"]:
        """Return how many slots of an epoch each class has."""
        return np.diff((self._edges + _reversed(epoch)) >> POINT)

    def before(self, epoch: int) -> Int[np.ndarray, "K"]:
        """Return how many slots each class has had in all epochs before one.

        These are blocks of 2^k epochs, one for each bit of their number, in which van der Corput's
        offsets are all multiples of 2^-k beyond one: the sum of floor(x + i / n) is floor(n x).
        """
        total = np.zeros_like(self._edges)
        for bit in range(epoch.bit_length()):
            if epoch >> bit & 1:
                block = (epoch >> (bit + 1)) << (bit + 1)
                total += (self._edges + _reversed(block)) >> (POINT - bit)
        return np.diff(total)

    def _images(self, epoch: int) -> Int[np.ndarray, "S"]:
        """Return the images of an epoch's slots."""
        share, before = self.share(epoch), self.before(epoch)
        there = np.flatnonzero(share)
        counts, share, before = self._counts[there], share[there], before[there]
        first_round, last_round = before // counts, (before + share - 1) // counts
        rounds = last_round - first_round + 1  # permutations of a class that an epoch touches
        # One row for each image of each of these permutations, permutation after permutation.
        group = np.repeat(np.arange(len(there)), rounds * counts)
        start = np.cumsum(rounds * counts) - rounds * counts
        place = np.arange(len(group)) - start[group]
        number = self._by_class[self._first[there][group] + place % counts[group]]
        permutation = first_round[group] + place // counts[group]
        which = np.cumsum(rounds)[group] - rounds[group] + place // counts[group]
        key = self._random(number, permutation, 1)
        ordered = number[np.lexsort((key, which))]
        # Of them the slots of this epoch: the first permutation from where the last epoch stopped.
        offset = before - first_round * counts
        mine = (place >= offset[group]) & (place < (offset + share)[group])
        images = ordered[mine]
        shuffle = self._random(np.arange(len(images)), np.full(len(images), epoch), 2)
        return images[np.argsort(shuffle, kind="stable")].astype(np.int32)

    def _random(self, first, second, purpose: int):
        """Return 64 random bits for each pair of numbers, of this seed and for this purpose."""
        salt = np.uint64((self._salt + purpose * _GOLDEN) % 2**64)
        return _mixed(_mixed(_mixed(first.astype(np.uint64) ^ salt) + second.astype(np.uint64)))


_GOLDEN = 0x9E3779B97F4A7C15


def _mixed(x):
    """Return well mixed bits of uint64 numbers (SplitMix64)."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _reversed(epoch: int) -> int:
    """Return van der Corput's number of an epoch: its bits behind the point, mirrored."""
    return int(f"{epoch % 2**POINT:0{POINT}b}"[::-1], 2)

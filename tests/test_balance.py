"""data.balance: the share of each class against its formula, every image as often as the next."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from deit_jax.configs import base
from deit_jax.data.balance import BalancedOrder
from deit_jax.data.batches import TrainBatches
from deit_jax.data.loader import load
from deit_jax.data.order import EpochOrder
from deit_jax.data.sources.base import ArraySource
from deit_jax.errors import UserError
from deit_jax.train.experiment import prepare
from deit_jax.train.run import train
from deit_jax.train.tape.fingerprint import check_fingerprint, fingerprint

COUNTS = np.array([1, 0, 3, 50, 200, 7, 11])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(7), COUNTS))
WANTED = {"sqrt": np.sqrt(COUNTS), "equal": (COUNTS > 0).astype(float)}


def epoch_of(order, slots, epoch):
    return np.array([order[slot] for slot in range(epoch * slots, (epoch + 1) * slots)])


@pytest.mark.parametrize("balance", ["sqrt", "equal"])
@pytest.mark.parametrize("slots", [97, 272, 3])
def test_the_shares_of_classes_are_those_of_the_formula(balance, slots):
    order = BalancedOrder(LABELS, slots, balance, seed=5)
    exact = slots * WANTED[balance] / WANTED[balance].sum()
    met = np.zeros(7)
    for epoch in range(64):
        counts = np.bincount(LABELS[epoch_of(order, slots, epoch)], minlength=7)
        assert counts.sum() == slots
        assert np.all((counts == np.floor(exact)) | (counts == np.floor(exact) + 1))
        met += counts
        if epoch + 1 in (1, 2, 4, 8, 16, 32, 64):
            assert np.abs(met - (epoch + 1) * exact).max() <= 1
    assert met[1] == 0


@pytest.mark.parametrize("balance", ["sqrt", "equal"])
def test_all_images_of_a_class_are_met_equally_often(balance):
    order = BalancedOrder(LABELS, 97, balance, seed=1)
    met = np.zeros(len(LABELS), int)
    for slot in range(97 * 20):
        met[order[slot]] += 1
        if slot % 97 == 96:
            for label in np.flatnonzero(COUNTS):
                assert np.ptp(met[label == LABELS]) <= 1


def test_any_epoch_follows_without_those_before_it():
    at = [3, 500, 0, 12, 2**20, 7, 8]
    alone = [epoch_of(BalancedOrder(LABELS, 31, "sqrt", 0), 31, e) for e in at]
    order = BalancedOrder(LABELS, 31, "sqrt", 0)
    assert all(np.array_equal(a, epoch_of(order, 31, e)) for a, e in zip(alone, at, strict=True))
    assert np.array_equal(sum(order.share(e) for e in range(500)), order.before(500))


def test_a_seed_has_its_own_order_and_classes_are_mixed():
    orders = [epoch_of(BalancedOrder(LABELS, 272, "equal", s), 272, 0) for s in (0, 1, 2**32 - 1)]
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])
    # The places of a class in an epoch are spread: of 45 places the mean is that of all, +- 4 sd.
    for label in np.flatnonzero(COUNTS):
        places = np.flatnonzero(label == LABELS[orders[0]])
        assert abs(places.mean() - 135.5) < 4 * 272 / np.sqrt(12 * len(places))


def test_every_image_of_a_class_is_as_likely_in_every_place_of_its_turn():
    """Chi-squared with 10 degrees of freedom: below 30 in 999 of 1000."""
    drawn = []
    for seed in range(440):
        order = BalancedOrder(np.repeat([0, 1], 11), 2, "equal", seed)
        drawn += [i for i in (order[0], order[1]) if i < 11]
    assert len(drawn) == 440
    assert ((np.bincount(drawn, minlength=11) - 40) ** 2 / 40).sum() < 30


def test_none_is_the_order_that_it_was():
    plain, source = EpochOrder(50, 16, 3, 0), ArraySource("a", np.zeros((50, 2, 2)), LABELS[:50])
    before, now = plain.shuffled(), plain.images(source)
    assert [int(before[i]) for i in range(120)] == [int(now[i]) for i in range(120)]


def batches(source, order, rows=None):
    augment = base.get_config().augment
    return TrainBatches(source, order, augment, 8, rows or range(order.batch_size))


def coloured(labels=LABELS):
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return ArraySource("coloured", np.broadcast_to(images, (len(labels), 8, 8, 3)), labels)


def test_batches_are_the_same_from_any_step_on_and_for_any_rows():
    source = coloured()
    order = EpochOrder(len(LABELS), 32, 3, 7, "sqrt")
    whole = batches(source, order)
    steps = [{k: v.copy() for k, v in batch.items()} for batch in load(whole, 0, 20, 2, 4)]
    resumed = [
        {k: v.copy() for k, v in b.items()} for b in load(batches(source, order), 9, 20, 1, 2)
    ]
    for left, right in zip(steps[9:], resumed, strict=True):
        assert all(np.array_equal(left[k], right[k]) for k in left)
    parts = [batches(source, order, rows)(13) for rows in (range(16), range(16, 32))]
    for key, value in steps[13].items():
        assert np.array_equal(value, np.concatenate([part[key] for part in parts]))


def test_copies_of_an_image_stand_side_by_side_and_share_the_epochs_slots():
    order = EpochOrder(len(LABELS), 32, 3, 7, "equal")
    images, length = order.images(coloured()), order.steps_per_epoch * 32
    met = np.zeros(7)
    for epoch in range(4):
        at = range(epoch * length, (epoch + 1) * length)
        drawn = [images[order.slot(position)] for position in at]
        assert all(len(set(drawn[i : i + 3])) == 1 for i in range(0, length, 3))
        met += np.bincount(LABELS[drawn[::3]], minlength=7)
    assert np.abs(met - 4 * -(-length // 3) * WANTED["equal"] / 6).max() <= 1


def test_the_next_image_stands_in_for_one_that_cannot_be_read():
    source, order = coloured(), EpochOrder(len(LABELS), 32, 1, 7, "equal")
    images = order.images(source)
    broken = images[order.slot(5)]

    class Broken(ArraySource):
        def __getitem__(self, index):
            if index == broken:
                raise UserError("torn")
            return super().__getitem__(index)

    torn = Broken("torn", source._images, LABELS)
    augment = base.get_config().augment
    augment.auto, augment.repeats = "", 1
    loaded = TrainBatches(torn, order, augment, 8, range(32), skip_unreadable=True)(0)
    standing = next(images[s] for s in range(order.slot(5), 10**6) if images[s] != broken)
    assert loaded["label"][5] == LABELS[standing]


def test_a_source_that_does_not_tell_its_labels_is_refused():
    class Untold:
        def __len__(self):
            return 50

        def __getitem__(self, index):
            raise AssertionError

        def describe(self, index):
            return f"untold[{index}]"

    with pytest.raises(UserError, match=r"data.balance=sqrt: untold.* does not tell its labels"):
        EpochOrder(50, 16, 3, 0, "sqrt").images(Untold())


def test_a_run_and_its_tape_know_the_balance(tiny_config):
    tiny_config.data.balance = "sqrt"
    tiny_config.data.eval_fraction = 0.9
    experiment, dataset = prepare(tiny_config)
    assert experiment.order.balance == "sqrt"
    ours = fingerprint(experiment, dataset, None)
    assert ours["data.balance"] == "sqrt"
    old = {k: v for k, v in ours.items() if k != "data.balance"}  # of before the field: none
    with pytest.raises(UserError, match=r"data.balance: none there, sqrt here"):
        check_fingerprint(Path("tape"), old, ours)
    check_fingerprint(Path("tape"), old, ours | {"data.balance": "none"})
    step = experiment.batches(dataset)(3)
    assert np.array_equal(step["label"], experiment.batches(dataset)(3)["label"])
    other = dataclasses.replace(experiment, order=dataclasses.replace(experiment.order, seed=9))
    assert not np.array_equal(step["label"], other.batches(dataset)(3)["label"])


@pytest.mark.slow
def test_a_tape_of_a_balanced_run_replays_and_a_stopped_run_goes_on(tiny_config, tmp_path):
    c = tiny_config
    c.data.balance, c.teacher.tape = "equal", "record"
    c.train.save_every_epochs = 0.4
    train(c, tmp_path / "whole")
    c.teacher.weights, c.teacher.tape = str(tmp_path / "whole" / "teacher"), "replay"
    c.teacher.tape_path = str(tmp_path / "whole" / "tape")
    train(c, tmp_path / "replayed")
    whole = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert (tmp_path / "replayed" / "metrics.jsonl").read_text() == whole
    for step in (8, 10):  # as if it had been stopped after step 6
        shutil.rmtree(tmp_path / "replayed" / "checkpoints" / str(step), ignore_errors=True)
    (tmp_path / "replayed" / "results.json").unlink()
    train(c, tmp_path / "replayed")
    assert (tmp_path / "replayed" / "metrics.jsonl").read_text() == whole

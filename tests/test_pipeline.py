"""Check that batches are a pure function of (seed, step), whoever loads them."""

import contextlib
import math
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

from deit_jax.configs import base
from deit_jax.data import batches as batches_lib
from deit_jax.data import decode, decoders
from deit_jax.data import loader as loader_lib
from deit_jax.data.batches import EvalBatches, TrainBatches
from deit_jax.data.loader import load
from deit_jax.data.order import EpochOrder, example_rng, example_rngs
from deit_jax.data.sources.base import ArraySource
from deit_jax.data.sources.folder import FolderSource
from deit_jax.data.sources.registry import open_dataset
from deit_jax.data.view import EvalView
from deit_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
DECODERS = decoders.available()
RANDAUGMENT = "rand-m9-mstd0.5-inc1"


class CountingSource(ArraySource):
    """Note which examples are read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def noise():
    """Fifty small images of which every crop is unlike every other."""
    images = np.random.default_rng(0).integers(256, size=(50, 24, 30, 3)).astype(np.uint8)
    return CountingSource("noise", images, np.arange(50))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photographs of several sizes and shapes in a folder, one of them grey."""
    root = tmp_path_factory.mktemp("photos")
    china, flower = load_sample_images().images
    pictures = {
        "place": [china, data.coffee(), data.rocket(), data.camera()],
        "being": [flower, data.chelsea(), data.astronaut(), data.cat()],
    }
    for name, images in pictures.items():
        (root / name).mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(root / name / f"{number}.jpg")
    config = base.get_config().data
    config.source, config.eval_fraction = f"folder:{root}", 0.5
    return open_dataset(config)


def augmentation(**changes):
    config = base.get_config().augment
    config.update(changes)
    return config


def train_batches(
    source, batch=16, repeats=3, seed=0, size=16, rows=None, decoder="auto", skip=False, **changes
):
    order, rows = EpochOrder(len(source), batch, repeats, seed), rows or range(batch)
    return TrainBatches(source, order, augmentation(**changes), size, rows, decoder, skip)


def images_of(order, positions):
    indices = order.shuffled()
    return [int(indices[order.slot(p)]) for p in positions]


def epoch_of(order, epoch):
    length = order.steps_per_epoch * order.batch_size
    return images_of(order, range(epoch * length, (epoch + 1) * length))


def copies(loader):
    """Return all batches of a loader, each in memory of its own."""
    return [{k: v.copy() for k, v in batch.items()} for batch in loader]


def equal(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(
    ("images", "batch", "steps"), [(100, 10, 10), (109, 10, 10), (10, 10, 1), (9, 10, 1), (1, 8, 1)]
)
def test_an_epoch_is_the_whole_batches_of_the_data_set(images, batch, steps):
    assert EpochOrder(images, batch, 3, 0).steps_per_epoch == steps


def test_an_epoch_without_copies_visits_different_images():
    order = EpochOrder(103, 10, 1, 0)
    epochs = [epoch_of(order, e) for e in range(20)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 100
        assert set(epoch) <= set(range(103))
    assert len({tuple(epoch) for epoch in epochs}) == 20
    # The three left out are others each time: 45 +- 5 in twenty epochs.
    assert len(set.union(*(set(range(103)) - set(epoch) for epoch in epochs))) > 20


@pytest.mark.parametrize(("images", "batch", "distinct"), [(99, 9, 33), (100, 10, 34), (64, 8, 22)])
def test_three_copies_visit_a_third_of_the_images_side_by_side(images, batch, distinct):
    order = EpochOrder(images, batch, 3, 0)
    epochs = [epoch_of(order, e) for e in range(12)]
    for epoch in epochs:
        assert len(set(epoch)) == distinct
        assert all(len(set(epoch[i : i + 3])) == 1 for i in range(0, len(epoch), 3))
        assert max(Counter(epoch).values()) == 3
    assert len({tuple(epoch) for epoch in epochs}) == 12
    # Each epoch draws its third from all images: twelve of them leave out (2/3)^12 < 1 %.
    assert len(set.union(*map(set, epochs))) > 0.95 * images


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize(("images", "batch"), [(5, 32), (1, 8), (3, 4)])
def test_a_data_set_smaller_than_a_batch_repeats_evenly(images, batch, repeats):
    order = EpochOrder(images, batch, repeats, 0)
    epochs = [epoch_of(order, e) for e in range(4)]
    for epoch in epochs:
        assert len(epoch) == batch
        counts = Counter(epoch)
        if batch >= images * repeats:
            assert set(counts) == set(range(images))
        assert max(counts.values()) - min(counts[i] for i in range(images)) <= repeats
    # Nor does an epoch go on with what the one before has already used of the shuffled images.
    slots = [{order.slot(p) for p in range(e * batch, (e + 1) * batch)} for e in range(4)]
    assert len(set.union(*slots)) == sum(map(len, slots))


def test_every_image_is_as_likely_in_every_place():
    """Chi-squared with 19 degrees of freedom: below 44 in 999 of 1000."""
    order = EpochOrder(20, 20, 1, 0)
    for place in (0, 7, 19):
        drawn = images_of(order, range(place, 20 * 400, 20))
        assert ((np.bincount(drawn, minlength=20) - 20) ** 2 / 20).sum() < 44


def test_another_seed_is_another_order():
    orders = [epoch_of(EpochOrder(40, 10, 1, seed), 0) for seed in (*range(20), 2**40)]
    assert len({tuple(order) for order in orders}) == 21
    # Nor is it the same one an epoch later.
    assert epoch_of(EpochOrder(40, 10, 1, 0), 1) not in orders


def test_positions_have_random_numbers_of_their_own():
    draws = {
        tuple(example_rng(seed, position).integers(2**63, size=2))
        for seed in (0, 1, 2**40)
        for position in (0, 1, 2, 2**32, 2**50)
    }
    assert len(draws) == 15


def test_a_generator_used_again_draws_what_a_new_one_does():
    for seed in (0, 7, 2**40):
        at = example_rngs(seed)
        for position in (3, 2**50, 0, 3, 1):
            ours, fresh = at(position), example_rng(seed, position)
            for _ in range(3):  # an odd number of 32-bit draws leaves half a word behind
                assert ours.integers(2**31, dtype=np.int32) == fresh.integers(2**31, dtype=np.int32)
                assert ours.normal() == fresh.normal()


def test_any_start_and_number_of_threads_gives_the_same_bytes(noise):
    batches = train_batches(noise)
    alone = [batches(step) for step in range(8)]
    for start in (0, 3, 7):
        for threads in (1, 4):
            loaded = copies(load(train_batches(noise), start, 8, threads, prefetch=4))
            assert len(loaded) == 8 - start
            assert all(equal(a, b) for a, b in zip(loaded, alone[start:], strict=True))
    assert list(load(batches, 8, 8, 1, 4)) == []
    assert not equal(alone[0], alone[1])
    assert not equal(alone[0], train_batches(noise, seed=1)(0))


def local_rows(batch_size, process, processes):
    """Return one process's share where processes hold the batch in order."""
    share = batch_size // processes
    return range(process * share, (process + 1) * share)


@pytest.mark.parametrize("processes", [1, 2, 4, 16])
def test_any_number_of_processes_gives_the_same_bytes(noise, processes):
    for step in (0, 5):
        whole = train_batches(noise)(step)
        parts = [
            train_batches(noise, rows=local_rows(16, process, processes))(step)
            for process in range(processes)
        ]
        assert equal(whole, {k: np.concatenate([p[k] for p in parts]) for k in whole})


def test_scattered_rows_are_those_of_the_whole_batch(noise):
    """On a torus a process's devices are seldom neighbours in the mesh."""
    rows = [0, 1, 5, 6, 7, 15]
    for step in (0, 3):
        whole, part = train_batches(noise)(step), train_batches(noise, rows=rows)(step)
        assert equal({k: v[rows] for k, v in whole.items()}, part)


@pytest.mark.parametrize("decoder", DECODERS)
def test_photographs_give_the_same_bytes_however_they_are_loaded(photos, decoder, monkeypatch):
    """Threads, processes, blocks, where a run goes on, and decoding once or for each copy."""
    monkeypatch.setattr(batches_lib, "BLOCK", 5)
    made = {"batch": 28, "size": 48, "decoder": decoder}
    whole = [train_batches(photos.train, **made)(step) for step in range(3)]
    for start, threads in ((0, 1), (0, 4), (1, 4), (2, 1)):
        loaded = copies(load(train_batches(photos.train, **made), start, 3, threads, 2))
        assert all(equal(a, b) for a, b in zip(loaded, whole[start:], strict=True))
    for processes in (2, 4, 28):  # with 28, each row decodes for itself
        for step in (0, 2):
            parts = [
                train_batches(photos.train, rows=local_rows(28, process, processes), **made)(step)
                for process in range(processes)
            ]
            joined = {k: np.concatenate([p[k] for p in parts]) for k in whole[step]}
            assert equal(whole[step], joined)


@pytest.mark.parametrize("repeats", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [16, 64, 100])
def test_blocks_share_out_the_rows_and_keep_copies_together(noise, batch, repeats, monkeypatch):
    monkeypatch.setattr(batches_lib, "BLOCK", 5)
    for rows in (range(batch), range(batch // 4, batch // 2)):
        batches = train_batches(noise, batch, repeats, rows=rows, size=8)
        order = EpochOrder(50, batch, repeats, 0)
        for step in range(4):
            noise.read, loaded = [], batches.empty()
            loaded["label"][:] = -1
            for block in reversed(range(batches.blocks)):
                batches.fill(step, block, loaded)
            expected = images_of(order, range(step * batch + rows.start, step * batch + rows.stop))
            assert loaded["label"].tolist() == expected
            slots = {order.slot(step * batch + row) for row in rows}
            assert len(noise.read) == len(slots)


@pytest.mark.parametrize("decoder", [d for d in DECODERS if d != "pillow"])
def test_decoders_differ_by_rounding(photos, decoder):
    plain = {"batch": 24, "size": 96, "auto": "", "color_jitter": 0.0}
    ours = train_batches(photos.train, decoder=decoder, **plain)(0)["image"].astype(int)
    reference = train_batches(photos.train, decoder="pillow", **plain)(0)["image"]
    assert np.abs(ours - reference).mean(axis=(1, 2, 3)).max() <= 0.3


def test_memory_is_used_again_once_nobody_refers_to_it(noise):
    batches = train_batches(noise)
    used, kept = set(), []
    for step, batch in enumerate(load(batches, 0, 40, 2, 2)):
        if step < 3:
            kept.append((step, batch["image"][4:8]))  # a view is a reference
        used.add(batch["image"].ctypes.data)
    assert len(used) <= 3 + 4  # those kept, and two ahead, one in use and one just left
    for step, view in kept:
        assert np.array_equal(view, batches(step)["image"][4:8])


def test_arrays_of_jax_keep_the_batch_they_share(noise):
    batches = train_batches(noise, batch=64, size=32)
    kept = [jax.device_put(batch["image"]) for batch in load(batches, 0, 12, 2, 2)]
    for step, array in enumerate(kept):
        assert np.array_equal(array, batches(step)["image"])


def test_batches_hold_uint8_images_with_the_labels_of_the_order(noise):
    batches, order = train_batches(noise), EpochOrder(50, 16, 3, 0)
    for step in (0, 2, 3, 40):
        batch = batches(step)
        assert batch["image"].shape == (16, 16, 16, 3)
        assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
        expected = images_of(order, range(16 * step, 16 * (step + 1)))
        assert batch["label"].tolist() == expected  # here the label is the index


def test_copies_of_an_image_are_decoded_once_and_cropped_differently(noise):
    batches, noise.read = train_batches(noise, auto="", color_jitter=0.0), []
    batch = batches(0)
    assert len(noise.read) == 6  # 16 = 5 x 3 + 1
    for start in range(0, 15, 3):
        assert len(set(batch["label"][start : start + 3].tolist())) == 1
        assert len({image.tobytes() for image in batch["image"][start : start + 3]}) == 3


def test_decoding_once_is_decoding_each(photos):
    """Nothing that happens to one copy shows in the next."""
    for auto in (RANDAUGMENT, "3aug"):
        whole = train_batches(photos.train, batch=12, size=48, auto=auto)(1)
        for row in range(12):
            one = train_batches(photos.train, 12, size=48, auto=auto, rows=range(row, row + 1))(1)
            assert np.array_equal(one["image"][0], whole["image"][row])


def test_a_view_is_crop_then_flip(noise):
    plain = {"auto": "", "color_jitter": 0.0}
    never = train_batches(noise, flip_prob=0.0, **plain)(0)["image"]
    always = train_batches(noise, flip_prob=1.0, **plain)(0)["image"]
    assert np.array_equal(always, never[:, :, ::-1])
    some = train_batches(noise, batch=48, flip_prob=0.5, **plain)(0)["image"]
    never = train_batches(noise, batch=48, flip_prob=0.0, **plain)(0)["image"]
    flipped = sum(not np.array_equal(a, b) for a, b in zip(some, never, strict=True))
    assert 12 <= flipped <= 36  # 24 +- 3.5
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.25, 1.25), "flip_prob": 0.0}
    batch = train_batches(noise, size=24, **plain, **whole)(0)
    for image, label in zip(batch["image"], batch["label"], strict=True):
        original = Image.fromarray(noise[int(label)]["image"])
        assert np.array_equal(image, original.resize((24, 24), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("auto", [RANDAUGMENT, "3aug", ""])
def test_photographs_go_through_every_augmentation(photos, auto):
    batches = train_batches(photos.train, batch=24, size=64, auto=auto)
    for batch in load(batches, 0, 2, 2, 2):
        assert batch["image"].shape == (24, 64, 64, 3)
        assert set(batch["label"].tolist()) == {0, 1}
        assert len({image.tobytes() for image in batch["image"]}) == 24
        # Photographs, not noise: neighbours resemble each other. Solarised ones less so.
        steps = np.abs(np.diff(batch["image"].astype(int), axis=2)).mean(axis=(1, 2, 3))
        assert np.median(steps) < 20
        assert batch["image"].std() > 30


@pytest.mark.parametrize(("examples", "batch"), [(50, 16), (48, 16), (5, 16), (17, 16)])
def test_evaluation_meets_every_example_once_and_masks_the_rest(noise, examples, batch):
    source = ArraySource("part", noise._images[:examples], noise.labels[:examples])
    batches = EvalBatches(source, batch, EvalView(16, 1.0), range(batch))
    assert len(batches) == -(-examples // batch)
    loaded = list(load(batches, 0, len(batches), 2, 2))
    valid = np.concatenate([b["valid"] for b in loaded])
    assert valid.dtype == bool
    assert valid.tolist() == [True] * examples + [False] * (batch * len(batches) - examples)
    assert np.concatenate([b["label"] for b in loaded])[valid].tolist() == list(range(examples))
    images = np.concatenate([b["image"] for b in loaded])
    assert not images[~valid].any()
    for index in range(examples):
        original = decode.decode(source[index]["image"], "")
        assert np.array_equal(images[index], decode.centre_crop(original, 16, 1.0))
    for processes in (2, 4):
        parts = [
            EvalBatches(source, batch, EvalView(16, 1.0), local_rows(batch, p, processes))(
                len(batches) - 1
            )
            for p in range(processes)
        ]
        assert equal(loaded[-1], {k: np.concatenate([p[k] for p in parts]) for k in parts[0]})


@pytest.fixture
def broken(tmp_path):
    """Eight photographs in a folder, three of them cut short, and the paths of those."""
    for number in range(8):
        path = tmp_path / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(data.chelsea()[:, 20 * number :]).save(path)
    paths = [str(tmp_path / "class1" / f"{number}.jpg") for number in (1, 3, 7)]
    for path in paths:
        Path(path).write_bytes(Path(path).read_bytes()[:2000])
    files = sorted(str(path) for path in tmp_path.rglob("*.jpg"))
    return FolderSource(tmp_path, files, np.arange(8)), paths


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_next_readable_image_stands_in_for_a_broken_one(broken, decoder, caplog):
    source, paths = broken
    batches = train_batches(source, decoder=decoder, skip=True)
    order = EpochOrder(8, 16, 3, 0)
    indices = order.shuffled()
    for step in range(3):
        expected = []
        for slot in (order.slot(position) for position in range(16 * step, 16 * step + 16)):
            while source.describe(int(indices[slot])) in paths:
                slot += 1
            expected.append(int(indices[slot]))
        assert batches(step)["label"].tolist() == expected
    assert sorted(name.split(" (")[0] for name in batches.unreadable) == paths
    assert [record.message.count("not a readable image") for record in caplog.records] == [1, 1, 1]
    for start, threads in ((0, 4), (2, 1)):
        again = train_batches(source, decoder=decoder, skip=True)
        loaded = copies(load(again, start, 3, threads, 2))
        assert all(equal(a, batches(start + i)) for i, a in enumerate(loaded))


def test_only_broken_images_stop_a_run_that_skips_them(broken):
    source = FolderSource(Path(broken[1][0]).parent, broken[1], np.arange(3))
    with pytest.raises(UserError, match=r"jpg \(example \d\): not readable, nor are the 999 "):
        train_batches(source, skip=True)(0)


@pytest.mark.parametrize("threads", [1, 4])
def test_any_failure_of_a_worker_names_its_example(noise, threads, monkeypatch):
    """Even a mistake of ours, in augmentation or in a source."""

    def fail(*args):
        raise ZeroDivisionError("by zero")

    batches = train_batches(noise)
    monkeypatch.setattr(batches, "_augment", fail)
    named = r"^noise example (\d+) \(example \1\): ZeroDivisionError: by zero"
    with pytest.raises(UserError, match=named):
        list(load(batches, 0, 4, threads, 2))
    batches = train_batches(noise)
    monkeypatch.setattr(CountingSource, "__getitem__", fail)
    with pytest.raises(UserError, match=named):
        list(load(batches, 0, 4, threads, 2))


@pytest.mark.parametrize("threads", [1, 4])
def test_an_unreadable_file_stops_the_loader_with_its_name(tmp_path, threads):
    for number in range(8):
        path = tmp_path / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(data.chelsea()).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    config = base.get_config().data
    config.source, config.eval_fraction = f"folder:{tmp_path}", 0.01
    parts = open_dataset(config)
    held = parts.eval.describe(0), parts.eval.describe(1)
    source = parts.eval if str(path) in held else parts.train
    batches = train_batches(source, batch=2, repeats=1)
    with pytest.raises(UserError, match=r"class1/7\.jpg \(example \d\): not a readable") as error:
        for _ in load(batches, 0, 100, threads, 4):
            pass
    assert type(error.value) is UserError
    assert "\n" not in str(error.value)


class Slow:
    """Take a tenth of a second per block, two blocks a batch."""

    blocks = 2

    def empty(self):
        return {"step": np.empty(2)}

    def fill(self, step, block, batch):
        time.sleep(0.1)
        batch["step"][block] = step

    def work_us(self):
        return math.inf


def test_batches_are_loaded_ahead_in_parallel_and_in_order():
    began = time.perf_counter()
    steps = [batch["step"].tolist() for batch in load(Slow(), 2, 18, 8, prefetch=4)]
    assert steps == [[step, step] for step in range(2, 18)]
    assert time.perf_counter() - began < 1.5  # 3.2 one after the other, 0.4 at best


def test_the_first_batch_is_loaded_by_all_threads():
    class Wide(Slow):
        blocks = 8

        def empty(self):
            return {"step": np.empty(8)}

    began = time.perf_counter()
    next(load(Wide(), 0, 1, 8, prefetch=1))
    assert time.perf_counter() - began < 0.5  # 0.8 by one thread


def test_small_images_are_loaded_by_one_thread_and_photographs_by_all(noise, photos, monkeypatch):
    """By default: of small ones Python's lock is what takes the time."""
    used = []
    true_options = grain.ReadOptions

    def options(num_threads, **others):
        used.append(num_threads)
        return true_options(num_threads=num_threads, **others)

    monkeypatch.setattr(grain, "ReadOptions", options)
    monkeypatch.setattr(loader_lib, "usable_cores", lambda: 16)
    config = base.get_config().augment
    pictures = photos.train
    for source, size in ((noise, 32), (noise, 128), (pictures, 224), (pictures, 32)):
        order = EpochOrder(len(source), 2, 1, 0)
        for batches in (
            TrainBatches(source, order, config, size, range(2)),
            EvalBatches(source, 2, EvalView(size, 0.875), range(2)),
        ):
            with contextlib.closing(load(batches, 0, 1, 0, prefetch=64)) as loader:
                next(loader)
    small, middle, photographs, shown_small = used[::2]
    assert used[::2] == used[1::2]
    assert (small, middle) == (1, 2)
    assert 8 <= photographs <= 16
    assert 2 <= shown_small < photographs
    with contextlib.closing(load(Slow(), 0, 1, 5, prefetch=64)) as loader:
        next(loader)
    assert used[-1] == 5  # who asks for a number gets it


def test_without_pythons_lock_every_core_has_a_thread(monkeypatch):
    assert loader_lib.useful_threads(0.0, 16) == 1
    assert loader_lib.useful_threads(math.inf, 16) == 16
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    assert loader_lib.useful_threads(0.0, 16) == 16


def test_an_image_that_cannot_be_opened_takes_no_thread_away(tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"no image")
    source = FolderSource(tmp_path, ["0.jpg"], np.arange(1))
    batches = EvalBatches(source, 1, EvalView(32, 0.875), range(1))
    assert batches.work_us() == math.inf


def test_a_loader_can_be_left_without_holding_up_the_process():
    """Were what is queued still loaded at exit, it would take half a minute."""
    script = """
        import time, numpy as np
        from deit_jax.data.loader import load

        class Slow:
            blocks = 1

            def empty(self):
                return {"step": np.empty(1)}

            def fill(self, step, block, batch):
                time.sleep(0.01 if step < 2 else 0.3)
                batch["step"][:] = step
                if step == 2:
                    raise ValueError

            def work_us(self):
                return 1e9

        slow = Slow()

        def leave():
            for batch in load(slow, 0, 1000, 2, 200):
                if batch["step"] == 1:
                    return

        leave()
        loader = load(slow, 0, 1000, 2, 200)
        next(loader)
        loader.close()
        try:
            list(load(slow, 0, 1000, 2, 200))
        except ValueError:
            pass
        raise SystemExit(7)
    """
    began = time.perf_counter()
    command = [sys.executable, "-c", textwrap.dedent(script)]
    assert subprocess.run(command, cwd=REPOSITORY, timeout=60, check=False).returncode == 7
    assert time.perf_counter() - began < 12


def test_ctrl_c_ends_a_loader_in_the_middle_of_its_work(tmp_path):
    """While photographs are decoded by several threads and the main one waits for a batch."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(data.astronaut()).save(tmp_path / name / f"{number}.jpg")
    script = f"""
        import signal

        from deit_jax.configs import base
        from deit_jax.data.batches import TrainBatches
        from deit_jax.data.loader import load
        from deit_jax.data.order import EpochOrder
        from deit_jax.data.sources.registry import open_dataset

        # Python leaves it ignored where it was, as in what a shell starts in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        c = base.get_config()
        c.data.source = "folder:{tmp_path}"
        source = open_dataset(c.data).train
        order = EpochOrder(len(source), 256, 3, 0)
        batches = TrainBatches(source, order, c.augment, 224, range(256))
        for batch in load(batches, 0, 10**6, 4, 8):
            print("batch", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as process:
        assert process.stdout.readline() == "batch\n"
        began = time.perf_counter()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert time.perf_counter() - began < 5
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")

"""Check MNIST and Fashion-MNIST from their idx files."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from deit_jax.data.sources.idx import DEFAULT_DIRS
from tests.test_sources import error_of, open_data, pixels


def write_idx(path, array, zipped):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    data = header + array.astype(np.uint8).tobytes()
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


@pytest.fixture
def idx(tmp_path):
    """Return a folder with a small MNIST, half of it gzipped, and its arrays."""
    rng, arrays = np.random.default_rng(0), {}
    for part, count in (("train", 30), ("t10k", 7)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = rng.integers(0, 10, count, np.uint8)
        arrays[part] = images, labels
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", images, zipped=part == "train")
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", labels, zipped=part == "t10k")
    return tmp_path, arrays


@pytest.mark.parametrize(("name", "third"), [("fashion_mnist", "Dress"), ("mnist", "3")])
def test_idx_files_are_read_with_numpy(idx, name, third):
    root, arrays = idx
    dataset = open_data(name, dir=str(root))
    assert (len(dataset.classes), dataset.classes[3]) == (10, third)
    for source, part in ((dataset.train, "train"), (dataset.eval, "t10k")):
        assert [source[i]["label"] for i in range(len(source))] == arrays[part][1].tolist()
        assert np.array_equal([x[:, :, 0] for x in pixels(source)], arrays[part][0])
    assert dataset.eval.describe(2) == f"{name} t10k example 2"


def test_each_mistake_in_idx_files_is_one_line(idx, tmp_path_factory):
    root, arrays = idx
    where, labels = {"dir": str(root)}, root / "train-labels-idx1-ubyte"
    nowhere = str(tmp_path_factory.mktemp("empty"))
    assert "no train-images-idx3-ubyte[.gz]" in error_of("mnist", dir=nowhere)
    assert "--config.data.dir" in error_of("mnist", dir=nowhere)
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-1])
    assert f"{labels}: 37 bytes where [30] need 38" in error_of("mnist", **where)
    labels.write_bytes(b"PK" + whole[2:])
    assert f"{labels}: not an idx file" in error_of("mnist", **where)
    write_idx(labels, arrays["train"][1][:9], zipped=False)
    assert "9 labels for 30 images" in error_of("mnist", **where)
    write_idx(labels, np.full(30, 10), zipped=False)
    assert "label 10; mnist has 10 classes" in error_of("mnist", **where)
    packed = root / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:200])
    assert f"{packed}: cannot be read" in error_of("mnist", **where)


def test_the_real_fashion_mnist_where_debian_has_put_it():
    if not Path(DEFAULT_DIRS["fashion_mnist"]).is_dir():
        pytest.skip("apt install dataset-fashion-mnist")
    dataset = open_data("fashion_mnist")
    assert (len(dataset.train), len(dataset.eval)) == (60_000, 10_000)
    assert np.bincount(dataset.train.labels).tolist() == [6000] * 10
    assert dataset.classes[dataset.train[0]["label"]] == "Ankle boot"


def test_the_split_to_evaluate_on_is_chosen(idx):
    root, arrays = idx
    dataset = open_data("mnist", dir=str(root), train_split="test", eval_split="training")
    assert dataset.train.labels.tolist() == arrays["t10k"][1].tolist()
    assert dataset.eval.labels.tolist() == arrays["train"][1].tolist()
    line = error_of("mnist", dir=str(root), eval_split="extra")
    assert line == "config.data.eval_split=extra: mnist has no such split; there are train, test"

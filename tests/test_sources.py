"""Check where images come from: embedded digits, folders, and TFDS without TensorFlow."""

import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from deit_jax.configs import base
from deit_jax.data.decode import decode
from deit_jax.data.sources import base as base_lib
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


def open_data(source, **fields):
    config = base.get_config().data
    config.source = str(source)
    config.update(fields)
    return open_dataset(config)


def error_of(source, **fields):
    with pytest.raises(UserError) as error:
        open_data(source, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def names(source, root):
    return [str(Path(source.describe(i)).relative_to(root)) for i in range(len(source))]


def pixels(source):
    return [np.asarray(decode(source[i]["image"], source.describe(i))) for i in range(len(source))]


def test_digits_are_all_there_and_stratified():
    dataset = open_data("digits", eval_fraction=0.2)
    digits = load_digits()
    assert dataset.classes == [str(i) for i in range(10)]
    assert len(dataset.train) + len(dataset.eval) == 1797
    train, held = pixels(dataset.train), pixels(dataset.eval)
    # Every image of scikit-learn's once, with its label: 0..16 there, 0..255 here.
    labels = [s[i]["label"] for s in (dataset.train, dataset.eval) for i in range(len(s))]
    ours = [
        ((x[:, :, 0] * (16 / 255)).round().astype(int).tobytes(), y)
        for x, y in zip(train + held, labels, strict=True)
    ]
    theirs = [
        (x.astype(int).tobytes(), y) for x, y in zip(digits.images, digits.target, strict=True)
    ]
    assert sorted(ours) == sorted(theirs)
    assert max(x.max() for x in train) == 255
    per_class = np.bincount([dataset.eval[i]["label"] for i in range(len(held))])
    assert np.array_equal(per_class, np.round(0.2 * np.bincount(digits.target)))


def test_a_part_that_is_not_there_is_no_held_out_one(folder):
    root = folder(*(f"{c}/{i}.png" for c in "ab" for i in range(4)))
    for source in ("digits", f"folder:{root}"):
        line = error_of(source, eval_split="test")
        assert "config.data.eval_split=test: config.data.source=" in line
        assert " has no parts; leave it out" in line


def test_the_same_examples_are_held_out_every_time():
    def described(source):
        return [source.describe(i) for i in range(len(source))]

    first, second = open_data("digits"), open_data("digits")
    assert described(first.eval) == described(second.eval)
    assert described(first.train) == described(second.train)
    assert not set(described(first.train)) & set(described(first.eval))
    # Not the first or the last of a class, in case the examples come in some order.
    indices = [int(name.split()[-1]) for name in described(first.eval)]
    assert abs(np.mean(indices) - 898) < 100


@pytest.mark.parametrize(("fraction", "held"), [(0.01, 1), (0.5, 2), (0.99, 3)])
def test_hold_out_leaves_each_class_an_example_on_either_side(folder, fraction, held):
    root = folder(*(f"{c}/{i}.png" for c in "ab" for i in range(4)))
    dataset = open_data(f"folder:{root}", eval_fraction=fraction)
    assert [dataset.eval[i]["label"] for i in range(len(dataset.eval))] == held * [0] + held * [1]
    assert sorted(names(dataset.train, root) + names(dataset.eval, root)) == [
        f"{c}/{i}.png" for c in "ab" for i in range(4)
    ]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_hold_out_needs_a_fraction(fraction):
    assert "eval_fraction" in error_of("digits", eval_fraction=fraction)


@pytest.mark.parametrize("val", ["val", "validation", "test"])
def test_a_folder_with_splits(folder, val):
    root = folder(
        "train/b/1.png",
        "train/a/2.png",
        "train/B/3.png",
        "train/10/4.png",
        "train/9/5.png",
        f"{val}/a/1.png",
        f"{val}/b/2.png",
    )
    dataset = open_data(f"folder:{root}")
    assert dataset.classes == ["9", "10", "a", "B", "b"]  # as timm sorts names
    assert names(dataset.train, root / "train") == [
        "10/4.png",
        "9/5.png",
        "B/3.png",
        "a/2.png",
        "b/1.png",
    ]
    assert [dataset.train[i]["label"] for i in range(5)] == [1, 0, 3, 2, 4]
    # A class without images to evaluate keeps its number.
    assert names(dataset.eval, root / val) == ["a/1.png", "b/2.png"]
    assert [dataset.eval[i]["label"] for i in range(2)] == [2, 4]
    assert [x[0, 0, 0] for x in pixels(dataset.train)] == [3, 4, 2, 1, 0]


def test_folder_labels_are_torchvisions(folder, timm):
    from torchvision.datasets import ImageFolder

    root = folder(
        "train/z/1.png",
        "train/a/y/2.JPEG",
        "train/a/x/3.png",
        "train/a/0.png",
        "train/z/notes.txt",
        "val/a/1.png",
    )
    reference = ImageFolder(str(root / "train"))
    dataset = open_data(f"folder:{root}", nested="top")
    assert dataset.classes == reference.classes
    ours = {(dataset.train.describe(i), dataset.train[i]["label"]) for i in range(4)}
    assert ours == set(reference.samples)


def test_nested_folders_belong_to_their_class_and_hidden_ones_to_none(folder, tmp_path_factory):
    root = folder(
        "a/2.png",
        "a/deep/er/1.png",
        "a/0.png",
        "b/x.webp",
        "b/y.JPG",
        ".git/1.png",
        "a/.ipynb_checkpoints/0.png",
        "a/._0.png",
        "b/readme.txt",
        "stray.png",
    )
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (4, 4)).save(elsewhere / "linked.png")
    (root / "b" / "link").symlink_to(elsewhere)
    dataset = open_data(f"folder:{root}", eval_fraction=0.5, nested="top")
    assert dataset.classes == ["a", "b"]
    found = names(dataset.train, root) + names(dataset.eval, root)
    assert sorted(found) == [
        "a/0.png",
        "a/2.png",
        "a/deep/er/1.png",
        "b/link/linked.png",
        "b/x.webp",
        "b/y.JPG",
    ]


def test_a_lone_train_folder_is_a_split_not_a_class(folder):
    root = folder("train/a/1.png", "train/a/2.png", "train/b/1.png", "train/b/2.png")
    dataset = open_data(f"folder:{root}")
    assert (dataset.classes, len(dataset.train), len(dataset.eval)) == (["a", "b"], 2, 2)
    folder("car/1.png", "car/2.png")
    line = error_of(f"folder:{root}")
    assert "is train/ the images to train on, or a class beside car?" in line
    dataset = open_data(f"folder:{root}", train_split=".", nested="top")
    assert dataset.classes == ["car", "train"]


def test_each_mistake_in_a_folder_is_one_line_that_names_it(folder, tmp_path):
    assert f"{tmp_path}/none: no such folder" in error_of(f"folder:{tmp_path}/none")
    assert f"{tmp_path}: no class folders" in error_of(f"folder:{tmp_path}")
    (tmp_path / "dog").mkdir()
    assert f"{tmp_path}: no class folders with images" in error_of(f"folder:{tmp_path}")
    folder("flat/train/1.png", "flat/test/1.png")  # as contests have them, with labels in a table
    line = error_of(f"folder:{tmp_path}/flat")
    assert f"{tmp_path}/flat/train: no class folders with images" in line
    assert "--config.data.labels=FILE" in line
    shutil.rmtree(tmp_path / "flat")
    folder("cat/1.png", "cat/2.png")
    line = error_of(f"folder:{tmp_path}")
    assert "no training images of class 'dog'" in line
    assert "--config.data.min_images=1" in line
    folder("dog/only.png")
    line = error_of(f"folder:{tmp_path}")
    assert "dog/only.png: the only image of its class" in line
    assert "--config.data.min_images=2" in line
    line = error_of(f"folder:{tmp_path}", min_images=2)
    assert "config.data.min_images=2: 1 of 2 classes have so many training images" in line
    assert line.endswith("2 are needed; the largest has 2")
    folder("splits/train/cat/1.png", "splits/val/cat/1.png", "splits/val/dgo/1.png")
    root = tmp_path / "splits"
    assert error_of(f"folder:{root}") == f"{root}/val/dgo: no class of this name in {root}/train"


def test_a_file_that_went_away_is_named(folder):
    root = folder("a/1.png", "a/2.png")
    dataset = open_data(f"folder:{root}")
    Path(dataset.train.describe(0)).unlink()
    with pytest.raises(UserError, match=r"a/\d\.png: cannot be read \(No such file"):
        dataset.train[0]


@pytest.mark.parametrize("source", ["", "digit", "folder", "folder:", "tfds:", "imagenet", "a:b"])
def test_a_source_of_no_known_kind_lists_the_kinds(source):
    assert "give digits, folder:PATH, tfds:NAME, wds:PATH" in error_of(source)


def test_parquet_says_how_to_convert_it():
    line = error_of("parquet:/data/imagenet-1k")
    assert "no cheap random access" in line
    assert "deit prepare /data/imagenet-1k DST" in line


def test_packed_strings_are_the_strings(folder):
    strings = ["", "a", "/data/ü/鳥.png", os.fsdecode(b"/not/\xffutf8"), "", "z" * 1000]
    packed = base_lib.PackedStrings(strings)
    assert len(packed) == 6
    assert list(packed) == strings
    assert packed[-1] == strings[-1]
    with pytest.raises(IndexError):
        packed[6]
    assert list(base_lib.PackedStrings.unpack(packed.block, packed.ends)) == strings


def test_many_names_take_the_memory_of_their_characters():
    names = (f"/data/imagenet/train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(10**5))
    tracemalloc.start()
    packed = base_lib.PackedStrings(names)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 7.5e6  # about 55 characters and an end each; a list of them takes 11.8 MB
    assert packed[10**5 - 1].endswith("_99999.JPEG")


@pytest.mark.parametrize(
    ("source", "field"),
    [
        ("digits", "labels"),
        ("digits", "classes"),
        ("mnist", "min_images"),
        ("wds:/data", "nested"),
        ("hf:/data", "labels"),
        ("tfds:mnist", "label_column"),
    ],
)
def test_a_field_that_a_source_would_leave_unheard_is_refused(source, field):
    value = {"min_images": 3, "nested": "top"}.get(field, "x")
    line = error_of(source, **{field: value})
    assert line == (
        f"config.data.{field}={value}: config.data.source={source} has no use for it; leave it out"
    )

"""Check what is understood of folders as people name them, and that the rest is said or refused."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from deit_jax.data.formats import image_suffixes
from tests.test_sources import error_of, names, open_data, pixels

TRAIN = ("train", "Train", "training", "TRAINING", "training_set", "train2017", "trainset")
EVAL = ("val", "Valid", "validation", "dev", "test", "Testing", "test_set", "val2017")


@pytest.mark.parametrize("val", EVAL)
@pytest.mark.parametrize("train", TRAIN)
def test_splits_in_any_usual_name_are_never_classes(folder, train, val):
    root = folder(f"{train}/a/1.png", f"{train}/b/2.png", f"{val}/a/3.png")
    dataset = open_data(f"folder:{root}")
    assert dataset.classes == ["a", "b"]
    assert names(dataset.train, root) == [f"{train}/a/1.png", f"{train}/b/2.png"]
    assert names(dataset.eval, root) == [f"{val}/a/3.png"]
    assert (dataset.reading.train, dataset.reading.eval) == (f"{train}/", f"{val}/")


def test_the_split_to_evaluate_on_is_chosen(folder):
    root = folder(*(f"{s}/{c}/{s}{c}.png" for s in ("train", "valid", "test") for c in "ab"))
    for wanted, got in (("validation", "valid"), ("test", "test"), ("TEST", "test")):
        dataset = open_data(f"folder:{root}", eval_split=wanted)
        assert names(dataset.eval, root) == [f"{got}/{c}/{got}{c}.png" for c in "ab"]
        other = "test" if got == "valid" else "valid"
        assert dataset.reading.notes == (f"{other}/ is left aside (not asked for)",)
    dataset = open_data(f"folder:{root}", train_split="test", eval_split="train")
    assert names(dataset.train, root) == [f"test/{c}/test{c}.png" for c in "ab"]
    assert names(dataset.eval, root) == [f"train/{c}/train{c}.png" for c in "ab"]
    assert "has no such split; there are test, train, valid" in error_of(
        f"folder:{root}", eval_split="holdout"
    )
    assert "has no such folder; there are test, train, valid" in error_of(
        f"folder:{root}", train_split="all"
    )
    folder("val/a/1.png")
    line = error_of(f"folder:{root}")
    assert "'validation' could be any of val, valid; give its own name" in line
    assert names(open_data(f"folder:{root}", eval_split="val").eval, root) == ["val/a/1.png"]


def test_only_splits_to_evaluate_on_are_no_classes(folder):
    root = folder("val/a/1.png", "val/b/1.png", "test/a/1.png", "test/b/1.png")
    assert "has no such folder; there are test, val" in error_of(f"folder:{root}")
    root = folder("words/seg_train/a/1.png", "words/seg_train/b/2.png", "words/seg_test/a/3.png")
    dataset = open_data(f"folder:{root / 'words'}", train_split="seg_train", eval_split="seg_test")
    assert (dataset.classes, len(dataset.train), len(dataset.eval)) == (["a", "b"], 2, 1)


def test_a_flat_folder_beside_the_splits_is_left_aside_and_said(folder):
    root = folder(*(f"train/{c}/{i}.png" for c in "ab" for i in range(5)), "test/1.png")
    dataset = open_data(f"folder:{root}")
    assert (len(dataset.train), len(dataset.eval)) == (8, 2)
    assert dataset.reading.held_out
    assert dataset.reading.notes == ("test/ is left aside (no class folders in it)",)
    line = error_of(f"folder:{root}", eval_split="test")
    assert "no class folders or labels in it; there are train" in line


def test_a_class_called_train_is_a_class(folder):
    root = folder(*(f"{c}/{i}.png" for c in ("train", "plane", "car") for i in range(2)))
    dataset = open_data(f"folder:{root}")
    assert dataset.classes == ["car", "plane", "train"]
    assert "train taken for classes" in dataset.reading.notes[0]


def test_classes_are_timms(folder, timm):
    """Numbers by their value; of nested folders the innermost; the labels of timm's reader."""
    from timm.data.readers.reader_image_folder import find_images_and_targets

    root = folder(
        *(
            f"train/{name}/{i}.png"
            for name in ("0", "2", "10", "1", "999", "x9", "X10")
            for i in "ab"
        ),
        "train/animals/cat/1.png",
        "train/animals/dog/1.png",
        "train/things/old/cup/1.png",
        "val/cat/1.png",
    )
    reference, number = find_images_and_targets(str(root / "train"))
    dataset = open_data(f"folder:{root}")
    assert dataset.classes == sorted(number, key=number.get)
    ours = [(dataset.train.describe(i), dataset.train[i]["label"]) for i in range(len(reference))]
    assert sorted(ours) == sorted(reference)
    assert "data.nested=top: 0, 1, 2" in dataset.reading.notes[0]
    joined = open_data(f"folder:{root}", nested="path", eval_split="train")
    _, number = find_images_and_targets(str(root / "train"), leaf_name_only=False)
    assert joined.classes == sorted(number, key=number.get)


@pytest.mark.parametrize(
    "paths",
    [
        ("cat/2020/1.png", "cat/2021/1.png", "dog/2020/1.png", "dog/2021/2.png"),
        ("cat/1.png", "cat/more/1.png", "dog/1.png", "dog/2.png"),
    ],
)
def test_nested_folders_that_are_not_clear_are_asked_about(folder, paths):
    root = folder(*paths)
    line = error_of(f"folder:{root}")
    assert "which of the nested folders is the class? " in line
    assert "--config.data.nested=top (cat, dog)" in line
    dataset = open_data(f"folder:{root}", nested="top", eval_fraction=0.5)
    assert (dataset.classes, len(dataset.train) + len(dataset.eval)) == (["cat", "dog"], 4)


def test_links_are_followed_once(folder, tmp_path_factory):
    root = folder(*(f"{c}/{i}.png" for c in "ab" for i in range(4)))
    (root / "a" / "loop").symlink_to(root)
    (root / "b" / "again").symlink_to(root / "a")
    (root / "b" / "same.png").symlink_to(root / "b" / "1.png")
    (root / "b" / "gone.png").symlink_to(root / "nowhere.png")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(root / "a" / "1.png", elsewhere / "1.png")
    (root / "b" / "far.png").symlink_to(elsewhere / "1.png")
    (root / "b" / "far2.png").symlink_to(elsewhere / "1.png")
    dataset = open_data(f"folder:{root}", eval_fraction=0.5)
    found = names(dataset.train, root) + names(dataset.eval, root)
    assert sorted(found) == sorted([*(f"{c}/{i}.png" for c in "ab" for i in range(4)), "b/far.png"])
    assert dataset.reading.left_out == {
        "folders met again through links": 2,
        "links to images that are there": 2,
        "links to nothing": 1,
    }


def test_two_names_of_one_folder_are_not_two_classes(folder):
    root = folder(*(f"cat/{i}.png" for i in range(4)), *(f"dog/{i}.png" for i in range(4)))
    (root / "kitty").symlink_to(root / "cat")
    assert "no training images of class 'kitty'" not in open_data(f"folder:{root}").classes
    assert open_data(f"folder:{root}").classes == ["cat", "dog"]


def test_leftovers_are_ignored_and_counted(folder):
    root = folder(
        *(f"{c}/{i}.png" for c in "ab" for i in range(4)),
        "__MACOSX/a/._1.png",
        ".ipynb_checkpoints/1.png",
        "a/.ipynb_checkpoints/1-checkpoint.png",
        "a/._1.png",
        "@eaDir/a/1.png",
        "b/Thumbs.db",
        "b/notes.txt",
        "b/notes.TXT",
        "stray.png",
        "README",
    )
    dataset = open_data(f"folder:{root}", eval_fraction=0.5)
    assert (dataset.classes, len(dataset.train), len(dataset.eval)) == (["a", "b"], 4, 4)
    assert dataset.reading.left_out == {
        "leftovers of other programs": 6,
        "files .txt": 2,
        "files of other kinds": 1,
        "images beside the class folders": 1,
    }


def test_every_suffix_that_can_be_read_is_read(folder):
    """What Pillow writes and reads here under each ending is taken, pixels and all."""
    root = folder("a/0.png", "b/0.png", "b/1.png")
    written = []
    for end in image_suffixes():
        kind = Image.registered_extensions().get(end)
        if kind not in Image.SAVE or kind in ("ICO", "PSD", "QOI", "JXL"):
            continue
        Image.new("RGB", (16, 16), (200, 10, 10)).save(root / "a" / f"x{end.upper()}", format=kind)
        written.append(f"a/x{end.upper()}")
    assert {"a/x.JFIF", "a/x.GIF", "a/x.AVIF", "a/x.WEBP"} <= set(written)
    dataset = open_data(f"folder:{root}", eval_fraction=0.5)
    found = set(names(dataset.train, root) + names(dataset.eval, root))
    assert set(written) <= found
    for part in (dataset.train, dataset.eval):
        for name, image in zip(names(part, root), pixels(part), strict=True):
            if "x." in name:
                assert np.abs(image[8, 8].astype(int) - [200, 10, 10]).max() < 30, name


def test_small_classes_are_left_out_on_demand(folder):
    root = folder(
        *(f"train/{c}/{i}.png" for c in "ace" for i in range(3)), "train/b/0.png", "val/a/1.png"
    )
    (root / "train" / "d").mkdir()
    folder("val/b/1.png", "val/e/1.png")
    (root / "val" / "c").mkdir()  # nothing to evaluate of a class is no fault
    line = error_of(f"folder:{root}")
    assert "no training images of class 'd'" in line
    dataset = open_data(f"folder:{root}", min_images=2)
    assert dataset.classes == ["a", "c", "e"]
    assert np.bincount(dataset.train.labels).tolist() == [3, 3, 3]
    assert names(dataset.eval, root) == ["val/a/1.png", "val/e/1.png"]
    assert [dataset.eval[i]["label"] for i in range(2)] == dataset.eval.labels.tolist() == [0, 2]
    assert dataset.reading.left_out["classes of fewer than 2 training images"] == 2


def test_a_folder_that_came_or_went_moves_no_other_image(folder):
    """Each image's side follows from its own name: one more of a class moves one at most."""
    root = folder(*(f"{c}/{i}.png" for c in "abc" for i in range(100)))
    before = open_data(f"folder:{root}")
    held = set(names(before.eval, root))
    assert np.bincount(before.eval.labels).tolist() == [20, 20, 20]
    for number in range(8):
        folder(f"b/new{number}.png")
        now = set(names(open_data(f"folder:{root}").eval, root))
        moved = (held ^ now) - {f"b/new{number}.png"}
        assert len(moved) <= 1
        assert all(name.startswith("b/") for name in moved)
        (root / "b" / f"new{number}.png").unlink()
    for c in "ac":
        folder(f"zzz/{c}.png")
    others = set(names(open_data(f"folder:{root}").eval, root))
    assert {n for n in others if n[0] != "z"} == held  # another class moves nothing
    shutil.rmtree(root / "zzz")
    os.rename(root, root.parent / "elsewhere")
    moved = open_data(f"folder:{root.parent / 'elsewhere'}")
    assert set(names(moved.eval, root.parent / "elsewhere")) == held


def test_runs_of_before_keep_their_split_and_their_order(folder):
    """What open_folder did until 2026, written out: plain order, a permutation of all."""
    root = folder(*(f"{c}/{i}.png" for c in ("9", "10") for i in range(10)))
    dataset = open_data(f"folder:{root}", rules=1)
    assert dataset.classes == ["10", "9"]
    paths = [f"{c}/{i}.png" for c in ("10", "9") for i in range(10)]
    order = np.random.default_rng(0).permutation(20)
    by_class = order[np.argsort(order >= 10, kind="stable")]
    expected = sorted([*by_class[:2], *by_class[10:12]])
    assert names(dataset.eval, root) == [paths[i] for i in expected]

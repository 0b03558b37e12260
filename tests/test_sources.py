"""Check where images come from: embedded digits, folders, and TFDS without TensorFlow."""

import json
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from configs import base
from deit_jax.data import sources
from deit_jax.data.decode import decode
from deit_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


def open_data(source, **fields):
    config = base.get_config().data
    config.source = str(source)
    config.update(fields)
    return sources.open_dataset(config)


def error_of(source, **fields):
    with pytest.raises(UserError) as error:
        open_data(source, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def names(source, root):
    return [str(Path(source.describe(i)).relative_to(root)) for i in range(len(source))]


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes small PNG files, each with pixels of its own."""

    def write(*paths):
        for number, path in enumerate(paths):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / path, format="png")
        return tmp_path

    return write


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
    assert dataset.classes == ["10", "9", "B", "a", "b"]  # as Python and torchvision sort names
    assert names(dataset.train, root / "train") == [
        "10/4.png",
        "9/5.png",
        "B/3.png",
        "a/2.png",
        "b/1.png",
    ]
    assert [dataset.train[i]["label"] for i in range(5)] == [0, 1, 2, 3, 4]
    # A class without images to evaluate keeps its number.
    assert names(dataset.eval, root / val) == ["a/1.png", "b/2.png"]
    assert [dataset.eval[i]["label"] for i in range(2)] == [3, 4]
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
    dataset = open_data(f"folder:{root}")
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
    dataset = open_data(f"folder:{root}", eval_fraction=0.5)
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
    folder("train/3.png", "train/4.png", "car/1.png", "car/2.png")
    assert open_data(f"folder:{root}").classes == ["car", "train"]


def test_each_mistake_in_a_folder_is_one_line_that_names_it(folder, tmp_path):
    assert f"{tmp_path}/none: no such folder" in error_of(f"folder:{tmp_path}/none")
    assert f"{tmp_path}: no class folders" in error_of(f"folder:{tmp_path}")
    (tmp_path / "dog").mkdir()
    assert f"{tmp_path}/dog: no images" in error_of(f"folder:{tmp_path}")
    folder("cat/1.png", "cat/2.png")
    assert f"{tmp_path}/dog: no images" in error_of(f"folder:{tmp_path}")
    folder("dog/only.png")
    assert "dog/only.png: the only image of its class" in error_of(f"folder:{tmp_path}")
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
    assert "give digits, folder:PATH or tfds:NAME" in error_of(source)


# TFDS. Prepared in a process of its own: TFDS registers each builder class for good, and prints.
PREPARE = """
    import io, sys
    from sklearn.datasets import load_digits
    import numpy as np
    import tensorflow_datasets as tfds
    from PIL import Image

    class Digits(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        label = tfds.features.ClassLabel(num_classes=10)
        names = tfds.features.ClassLabel(names=[f"digit {i}" for i in range(10)])

        def _info(self):
            features = tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(None, None, 1)), "label": self.label})
            return tfds.core.DatasetInfo(
                builder=self, features=features, supervised_keys=("image", "label"))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(0, 20),
                    "validation": self._generate_examples(20, 30)}

        def _generate_examples(self, start, stop):
            digits = load_digits()
            for i in range(start, stop):
                png = io.BytesIO()
                Image.fromarray((digits.images[i] * 15).astype(np.uint8)).save(png, "png")
                png.seek(0)  # TFDS keeps a file's bytes; it would need TensorFlow to encode
                yield i, {"image": png, "label": digits.target[i]}

    class NamedDigits(Digits):
        label = Digits.names

    class Numbers(Digits):
        label = tfds.features.Scalar(np.int64)

    for builder in (Digits, NamedDigits, Numbers):
        builder(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
    assert "tensorflow" not in sys.modules
"""


def run_python(script, *args):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    run_python(PREPARE, folder)
    return folder


def test_tfds_gives_the_images_and_labels_that_were_put_in(tfds_dir):
    dataset = open_data("tfds:digits", dir=str(tfds_dir))
    assert dataset.classes == [str(i) for i in range(10)]  # no names were given
    assert (len(dataset.train), len(dataset.eval)) == (20, 10)
    digits = load_digits()
    expected = {  # TFDS shuffles
        ((x * 15).astype(np.uint8).tobytes(), y)
        for x, y in zip(digits.images[:30], digits.target[:30], strict=True)
    }
    for source, part in ((dataset.train, slice(0, 20)), (dataset.eval, slice(20, 30))):
        labels = [source[i]["label"] for i in range(len(source))]
        assert sorted(labels) == sorted(digits.target[part])
        images = [x[:, :, 0].tobytes() for x in pixels(source)]
        assert set(zip(images, labels, strict=True)) <= expected
        assert len(set(images)) == len(source)
    assert dataset.eval.describe(7) == "tfds:digits validation[7]"


def test_tfds_class_names_versions_and_parts_of_splits(tfds_dir):
    dataset = open_data(
        "tfds:named_digits:1.0.0",
        dir=str(tfds_dir),
        train_split="train[5:15]",
        eval_split="train[:25%]",
    )
    assert dataset.classes[3] == "digit 3"
    assert (len(dataset.train), len(dataset.eval)) == (10, 5)


def test_tfds_reads_the_same_in_many_threads(tfds_dir):
    source = open_data("tfds:digits", dir=str(tfds_dir)).train
    order = np.random.default_rng(0).integers(20, size=400).tolist()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(source.__getitem__, order)) == [source[i] for i in order]


def test_tfds_needs_no_tensorflow_and_prints_nothing(tfds_dir):
    """In a process of its own, as other tests may have imported TensorFlow."""
    done = run_python(
        """
        import sys
        from configs import base
        from deit_jax.data import decode, sources
        from deit_jax.errors import UserError

        config = base.get_config().data
        config.source, config.dir = "tfds:digits", sys.argv[1]
        dataset = sources.open_dataset(config)
        decode.decode(dataset.train[0]["image"], "example")
        config.source = "tfds:mnist"
        try:
            sources.open_dataset(config)
        except UserError as error:
            assert "not prepared" in str(error), error
        else:
            raise AssertionError
        assert not {"tensorflow", "torch"} & set(sys.modules)
        """,
        tfds_dir,
    )
    assert done.stdout + done.stderr == ""


def test_each_mistake_in_a_tfds_name_is_one_line(tfds_dir):
    where = {"dir": str(tfds_dir)}
    assert "mnist: not prepared in" in error_of("tfds:mnist", **where)
    assert "array_record" in error_of("tfds:mnist", **where)
    assert "Dataset digitz not found" in error_of("tfds:digitz", **where)
    assert "'/nowhere'" in error_of("tfds:digits", dir="/nowhere")
    assert "version 99.0.0" in error_of("tfds:mnist:99.0.0", **where)
    assert "2.0.0" in error_of("tfds:digits:2.0.0", **where)
    assert "tfds:a b" in error_of("tfds:a b", **where)
    known = "no split 'trian' (it has train, validation)"
    assert known in error_of("tfds:digits", train_split="trian", **where)
    assert "no split 'test'" in error_of("tfds:digits", eval_split="test", **where)
    assert "no split 'train[:x]'" in error_of("tfds:digits", eval_split="train[:x]", **where)
    assert "not image classification" in error_of("tfds:numbers", **where)


def test_a_tfrecord_copy_says_how_to_convert_it(tfds_dir, tmp_path):
    copy = tmp_path / "digits" / "1.0.0"
    shutil.copytree(tfds_dir / "digits" / "1.0.0", copy)
    for file in copy.glob("*array_record*"):
        file.rename(copy / file.name.replace("array_record", "tfrecord"))
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    line = error_of("tfds:digits", dir=str(tmp_path))
    assert str(copy) in line
    assert "tfds convert_format" in line

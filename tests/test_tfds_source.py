"""Check TFDS data sets in ArrayRecord files, without TensorFlow."""

import json
import resource
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from deit_jax.data.sources.tfds import allow_open_files
from deit_jax.errors import UserError
from tests.test_sources import error_of, open_data, pixels

REPOSITORY = Path(__file__).resolve().parent.parent

# Prepared in a process of its own: TFDS registers each builder class for good, and prints.
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

    class Many(Digits):
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=n) for n in ("light", "dark")]

        def _split_generators(self, manager):
            return {"train": self._generate_examples(0, 17),
                    "validation": self._generate_examples(17, 24)}

        def _generate_examples(self, start, stop):
            for i in range(start, stop):
                png = io.BytesIO()
                value = i if self.builder_config.name == "light" else 100 + i
                Image.fromarray(np.full((4, 4), value, np.uint8)).save(png, "png")
                png.seek(0)
                yield i, {"image": png, "label": i % 10}

    class Cifar10Corrupted(Many):  # TFDS's own has a config of this name, and others
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="brightness_1")]

    for builder in (Many, Cifar10Corrupted):
        for config in builder.BUILDER_CONFIGS:
            builder(data_dir=sys.argv[1], config=config.name, file_format="array_record"
                ).download_and_prepare()
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


def values(source):
    """Return what each image of `many` is filled with, which is its number there."""
    return [int(image[0, 0, 0]) for image in pixels(source)]


def test_tfds_configs_by_their_names(tfds_dir):
    def opened(name):
        return open_data(f"tfds:{name}", dir=str(tfds_dir))

    light, dark = opened("many/light"), opened("many/dark:1.0.0")
    assert sorted(values(light.train)) == list(range(17))
    assert sorted(values(dark.train)) == list(range(100, 117))
    assert sorted(values(dark.eval)) == list(range(117, 124))
    assert [x["label"] for x in iter_of(light.eval)] == [v % 10 for v in values(light.eval)]
    assert values(opened("many").train) == values(light.train)  # the first one, as in TFDS
    own = opened("cifar10_corrupted/brightness_1")
    assert sorted(values(own.eval)) == list(range(117, 124))


def iter_of(source):
    return (source[i] for i in range(len(source)))


@pytest.mark.parametrize(
    ("split", "parts"),
    [
        ("train[:80%]", [("train", 0, 14)]),  # 13.6, to the closest
        ("train[80%:]", [("train", 14, 17)]),
        ("train[:33%]", [("train", 0, 6)]),
        ("train[:8]+validation", [("train", 0, 8), ("validation", 0, 7)]),
        ("train[:25%]+train[75%:]", [("train", 0, 4), ("train", 13, 17)]),
        ("train[-3:]", [("train", 14, 17)]),
        ("all", [("train", 0, 17), ("validation", 0, 7)]),
    ],
)
def test_parts_of_splits_are_those_that_tfds_means(tfds_dir, split, parts):
    whole = open_data("tfds:many/dark", dir=str(tfds_dir))
    there = {"train": values(whole.train), "validation": values(whole.eval)}
    expected = [v for name, start, stop in parts for v in there[name][start:stop]]
    dataset = open_data("tfds:many/dark", dir=str(tfds_dir), train_split=split, eval_split=split)
    assert values(dataset.train) == values(dataset.eval) == expected
    labels = [x["label"] for x in iter_of(dataset.train)]
    assert labels == [v % 10 for v in expected]


def test_tfds_splits_by_their_usual_names(tfds_dir):
    dataset = open_data("tfds:digits", dir=str(tfds_dir), train_split="training", eval_split="val")
    assert (len(dataset.train), len(dataset.eval)) == (20, 10)
    line = error_of("tfds:digits", dir=str(tfds_dir), train_split="validation", eval_split="dev")
    assert "no split 'dev'" in line  # not what is trained on, unless by its name
    parts = {"train_split": "train+validation[:5]", "eval_split": "val"}
    assert "no split 'val'" in error_of("tfds:digits", dir=str(tfds_dir), **parts)


def test_tfds_reads_the_same_in_many_threads(tfds_dir):
    source = open_data("tfds:digits", dir=str(tfds_dir)).train
    order = np.random.default_rng(0).integers(20, size=400).tolist()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(source.__getitem__, order)) == [source[i] for i in order]


def test_a_data_set_of_more_files_than_may_be_open_raises_the_limit(monkeypatch):
    set_to = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    for limits, result in (
        ((1024, 524288), [(1536, 524288)]),
        ((1024, resource.RLIM_INFINITY), [(1536, resource.RLIM_INFINITY)]),
        ((2048, 4096), []),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), []),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        set_to.clear()
        allow_open_files(1024)
        assert set_to == result
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    with pytest.raises(UserError, match="1024 files, but a process may open only 1024"):
        allow_open_files(1024)


def test_tfds_needs_no_tensorflow_and_prints_nothing(tfds_dir):
    """In a process of its own, as other tests may have imported TensorFlow."""
    done = run_python(
        """
        import sys
        from deit_jax.configs import base
        from deit_jax.data import decode
        from deit_jax.data.sources.registry import open_dataset
        from deit_jax.errors import UserError

        config = base.get_config().data
        config.source, config.dir = "tfds:digits", sys.argv[1]
        dataset = open_dataset(config)
        decode.decode(dataset.train[0]["image"], "example")
        config.source = "tfds:mnist"
        try:
            open_dataset(config)
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
    there = "which has many/dark/1.0.0, many/light/1.0.0"
    assert there in error_of("tfds:many/drak", **where)
    assert there in error_of("tfds:many/dark:2.0.0", **where)
    line = error_of("tfds:cifar10_corrupted/brightness_9", **where)
    assert "which has cifar10_corrupted/brightness_1/1.0.0" in line
    for part, why in (("[20:]", "incompatible with 17"), ("[10:5]", ""), ("[:0]", "0 length")):
        line = error_of("tfds:many", train_split=f"train{part}", **where)
        assert f"no split 'train{part}' (it has train, validation" in line
        assert why in line


def test_a_tfrecord_copy_says_how_to_convert_it(tfds_dir, tmp_path):
    copy = tmp_path / "digits" / "1.0.0"
    shutil.copytree(tfds_dir / "digits" / "1.0.0", copy)
    for file in copy.glob("*array_record*"):
        file.rename(copy / file.name.replace("array_record", "tfrecord"))
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    line = error_of("tfds:digits", dir=str(tmp_path))
    assert str(copy) in line
    assert line.endswith(f"`deit prepare {copy} DST`")  # test_prepare_tables.py does so


def test_an_image_without_tfds_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert error_of("tfds:imagenet2012").endswith("pip install tensorflow-datasets")

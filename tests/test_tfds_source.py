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


def test_an_image_without_tfds_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert error_of("tfds:imagenet2012").endswith("pip install tensorflow-datasets")

"""Check what `deit prepare` reads: the official ILSVRC tars in their layout, and parquet."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from deit_jax import __main__ as program
from deit_jax.data.prepare import build
from tests.test_prepare import contents, folder_data, opened, photographs, raw, tree

__all__ = ["tree"]  # a fixture

# The first three of the thousand classes.
WNIDS = ("n01440764", "n01443537", "n01484850")
VALIDATION = (3, 1, 2, 2, 1)  # ILSVRC2012_IDs as below


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def jpeg(number):
    image = Image.fromarray(photographs()["coffee"]).crop((number, 0, number + 60, 50))
    data = io.BytesIO()
    image.save(data, "jpeg")
    return data.getvalue()


def ground_truth(folder):
    """Write the devkit: the ids in meta.mat are not in the order of the WordNet ids."""
    from scipy.io import savemat

    fields = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images"
    rows = [
        (2, "n01443537", "goldfish, Carassius auratus", "…", 0, [], 0, 3),
        (3, "n01440764", "tench, Tinca tinca", "…", 0, [], 0, 3),
        (1, "n01484850", "great white shark", "…", 0, [], 0, 3),
        (1001, "n00001740", "fish", "an inner node", 3, [1, 2, 3], 1, 0),
    ]
    synsets = np.empty((len(rows), 1), dtype=[(name, object) for name in fields.split()])
    for i, row in enumerate(rows):
        for name, value in zip(fields.split(), row, strict=True):
            synsets[name][i, 0] = np.array(value) if isinstance(value, list) else value
    (folder / "data").mkdir(parents=True)
    savemat(folder / "data" / "meta.mat", {"synsets": synsets})
    text = "".join(f"{i}\n" for i in VALIDATION)
    (folder / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(text)


@pytest.fixture
def ilsvrc(tmp_path):
    """Return a folder of the three files, and {file name: (bytes, WordNet id)} of all images."""
    root, images = tmp_path / "ILSVRC", {}
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in reversed(WNIDS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(3):
                    name = f"{wnid}_{i + 10}.JPEG"
                    images[name] = (jpeg(len(images)), wnid)
                    add(tar, name, images[name][0])
            add(outer, f"{wnid}.tar", inner.getvalue())
    of_id = {1: "n01484850", 2: "n01443537", 3: "n01440764"}
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for i in (2, 0, 4, 1, 3):  # not in order
            name = f"ILSVRC2012_val_{i + 1:08d}.JPEG"
            images[name] = (jpeg(100 + i), of_id[VALIDATION[i]])
            add(tar, name, images[name][0])
    ground_truth(tmp_path / "ILSVRC2012_devkit_t12")
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    return root, images


def check_imagenet(result, images, splits=(9, 5)):
    import tensorflow_datasets as tfds

    assert result["path"].endswith("imagenet2012/5.1.0")
    dataset = opened(result)  # opened with the features in TFDS's own code
    names = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    assert dataset.classes == names == sorted(names)
    assert (len(dataset.train), len(dataset.eval)) == splits
    found = {}
    for source in (dataset.train, dataset.eval):
        for example in raw(source):
            name = example["file_name"].decode()
            found[name] = (example["image"], names[example["label"]])
    assert found == images


def test_the_official_tars_become_tfds_imagenet2012(ilsvrc, tmp_path):
    root, images = ilsvrc
    check_imagenet(build.prepare(root, tmp_path / "out", workers=1), images)


def test_the_devkit_may_be_extracted(ilsvrc, tmp_path):
    root, images = ilsvrc
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    shutil.copytree(tmp_path / "ILSVRC2012_devkit_t12", root / "ILSVRC2012_devkit_t12")
    check_imagenet(build.prepare(root, tmp_path / "out", workers=1), images)


def test_without_the_devkit_the_validation_labels_are_tfds_own(ilsvrc, tmp_path):
    import tensorflow_datasets as tfds

    root, images = ilsvrc
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    for i, wnid in enumerate(path.read_text().split()[:5]):
        name = f"ILSVRC2012_val_{i + 1:08d}.JPEG"
        images[name] = (images[name][0], wnid)
    check_imagenet(build.prepare(root, tmp_path / "out", workers=1), images)


def test_extracted_imagenet_is_imagenet2012_too(tmp_path):
    import tensorflow_datasets as tfds

    names = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    data = jpeg(0)
    for split in ("train", "val"):
        for wnid in names:
            (tmp_path / "in" / split / wnid).mkdir(parents=True)
            (tmp_path / "in" / split / wnid / f"{wnid}_1.JPEG").write_bytes(data)
    result = build.prepare(tmp_path / "in", tmp_path / "out", workers=1)
    assert result["path"].endswith("imagenet2012/5.1.0")
    assert opened(result).classes == names


def test_hugging_faces_parquet_arrives_with_its_class_names(tree, tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder, root = folder_data(tree), tmp_path / "imagenet-mini" / "data"
    root.mkdir(parents=True)
    names = [*folder.classes, "unseen"]
    described = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    for split, source, files in (("train", folder.train, 3), ("validation", folder.eval, 1)):
        for number, part in enumerate(np.array_split(np.arange(len(source)), files)):
            examples = [source[int(i)] for i in part]
            images = [{"bytes": e["image"], "path": f"{i}.jpg"} for i, e in enumerate(examples)]
            columns = {"image": images, "label": [e["label"] for e in examples]}
            table = pyarrow.table(columns)
            table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
            path = root / f"{split}-{number:05d}-of-{files:05d}.parquet"
            pyarrow.parquet.write_table(table, path, row_group_size=3)
    result = build.prepare(root.parent, tmp_path / "out", workers=1)
    assert (result["name"], result["shards"]) == ("imagenet_mini", 4)
    ours = opened(result)
    assert ours.classes == names
    assert contents(ours.train) == contents(folder.train)
    assert contents(ours.eval) == contents(folder.eval)


def error_of(capsys, *words):
    code = program.main(["prepare", *map(str, words)])
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1, err
    return code, err


def test_each_mistake_is_one_line(capsys, tree, ilsvrc, tmp_path):
    root, _ = ilsvrc
    out = tmp_path / "out"
    assert error_of(capsys, tree) == (
        2,
        "deit prepare: give SRC and DST; see `deit prepare --help`",
    )
    assert "no such folder" in error_of(capsys, "/nowhere", out)[1]
    assert "no class folders" in error_of(capsys, tree / "cat", out)[1]
    assert "small letters" in error_of(capsys, tree, out, "--name=My Set")[1]
    assert "TFDS's own; give --name" in error_of(capsys, tree, out, "--name=mnist")[1]
    assert "TFDS's own; give --name" in error_of(capsys, tree, out, "--name=imagenet2012")[1]
    assert "cannot be written" in error_of(capsys, tree, "/proc/x")[1]
    code, line = error_of(capsys, tree, out, "--max-side=-3")
    assert (code, "max_side" in line) == (2, True)
    (root / "ILSVRC2012_img_val.tar").rename(tmp_path / "val.tar")
    assert "ILSVRC2012_img_val.tar: missing" in error_of(capsys, root, out)[1]
    whole = (tmp_path / "val.tar").read_bytes()
    (root / "ILSVRC2012_img_val.tar").write_bytes(whole[:5000])
    assert "ILSVRC2012_img_val.tar: not a readable" in error_of(capsys, root, out)[1]
    (root / "ILSVRC2012_img_val.tar").write_bytes(whole)
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"no")
    assert "ILSVRC2012_devkit_t12.tar.gz: cannot be read" in error_of(capsys, root, out)[1]
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.parquet").write_bytes(b"PAR1")
    assert "train.parquet: not a parquet file" in error_of(capsys, tmp_path / "table", out)[1]

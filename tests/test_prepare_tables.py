"""Check `deit prepare` on tables, by type or by name of columns, and on TFDS's TFRecords."""

import io
import json
import shutil
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from deit_jax import __main__ as program
from deit_jax.configs import base
from deit_jax.data.prepare import build, tables
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from tests.test_hf_source import CLASSES, images, integers, make, png, rows


def opened(result, **fields):
    data = base.get_config().data
    data.source = f"tfds:{result['name']}"
    data.dir = str(result["path"]).rpartition(f"/{result['name']}/")[0]
    data.update(fields)
    return open_dataset(data)


def contents(source):
    return sorted((x["image"], x["label"]) for x in (source[i] for i in range(len(source))))


def error_of(source, tmp_path, **options):
    with pytest.raises(UserError) as error:
        build.prepare(source, Path(tempfile.mkdtemp(dir=tmp_path)), workers=1, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_a_data_set_of_other_columns_arrives(tmp_path, form):
    parts = {
        name: make(count, start, image="img", label="fine_label", size=(integers(), [4] * count))
        for name, count, start in (("train", 12, 0), ("test", 5, 100))
    }
    root = tmp_path / "pictures"
    if form == "saved":
        datasets.DatasetDict(parts).save_to_disk(str(root), num_shards={"train": 3, "test": 1})
    else:
        for name, part in parts.items():
            part.to_parquet(str(root / "data" / f"{name}-00000-of-00001.parquet"), batch_size=5)
    result = build.prepare(root, tmp_path / "out", workers=1)
    assert result["examples"] == {"train": 12, "validation": 5}
    dataset = opened(result)
    assert dataset.classes == CLASSES
    assert contents(dataset.train) == sorted(rows(parts["train"], "img", "fine_label"))
    assert contents(dataset.eval) == sorted(rows(parts["test"], "img", "fine_label"))
    assert build.prepare(root, tmp_path / "out", workers=1)["shards_kept"] == result["shards"]


def test_a_lone_saved_data_set_in_many_shards_and_processes(tmp_path, monkeypatch):
    whole = make(40)
    whole.save_to_disk(str(tmp_path / "set"), num_shards=4)
    monkeypatch.setattr("deit_jax.data.prepare.readers.SHARD_BYTES", 1)
    result = build.prepare(tmp_path / "set", tmp_path / "out", workers=2)
    assert result["shards"] == 4
    assert contents(opened(result, eval_split="train[:1]").train) == sorted(rows(whole))


def test_columns_are_named_on_the_command_line(tmp_path, capsys):
    train = make(
        label="fine_label",
        coarse_label=(datasets.ClassLabel(names=["fish", "beast"]), [0, 1] * 6),
        thumbnail=(datasets.Image(), images(12, 100)),
    )
    train.to_parquet(str(tmp_path / "set" / "train.parquet"))
    command = ["prepare", str(tmp_path / "set"), str(tmp_path / "out"), "--workers=1"]
    assert program.main([*command, "--image-column=thumbnail"]) == 1
    line = capsys.readouterr().err
    assert "fine_label, coarse_label could each be the labels" in line
    assert "--label-column=NAME" in line
    chosen = ["--image-column=thumbnail", "--label-column=coarse_label"]
    assert program.main([*command, *chosen]) == 0
    dataset = opened(
        {"name": "set", "path": tmp_path / "out" / "set" / "1.0.0"}, eval_split="train"
    )
    assert dataset.classes == ["fish", "beast"]
    assert contents(dataset.train) == sorted(rows(train, "thumbnail", "coarse_label"))


def test_strings_become_classes(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    for name, kinds in (("train-0", "c9 c10"), ("train-1", "c10 c2"), ("test", "c2 c2")):
        column = [png(len(name) * 10 + i) for i in range(2)]
        table = pa.table({"image": column, "kind": kinds.split()})
        pyarrow.parquet.write_table(table, root / f"{name}.parquet")
    dataset = opened(build.prepare(root, tmp_path / "out", workers=1))
    assert dataset.classes == ["c2", "c9", "c10"]
    assert sorted(label for _, label in contents(dataset.train)) == [0, 1, 2, 2]
    assert [label for _, label in contents(dataset.eval)] == [0, 0]
    table = pa.table({"image": column, "kind": ["c2", "c3"]})
    pyarrow.parquet.write_table(table, root / "test.parquet")
    assert "test.parquet: label 'c3' is no class" in error_of(root, tmp_path)


def test_images_given_by_their_paths(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    for i in range(2):
        (root / f"{i}.png").write_bytes(png(i))
    column = [{"bytes": None, "path": f"{i}.png"} for i in range(3)]
    for count, name in ((2, "train"), (3, "test")):
        table = pa.table({"image": column[:count], "label": [0, 1, 0][:count]})
        pyarrow.parquet.write_table(table, root / f"{name}.parquet")
    assert "test.parquet:0:2: 2.png: cannot be read" in error_of(root, tmp_path)
    (root / "test.parquet").unlink()
    dataset = opened(build.prepare(root, tmp_path / "out", workers=1), eval_split="train")
    assert contents(dataset.train) == sorted([(png(0), 0), (png(1), 1)])


def test_a_test_split_without_labels_is_left_aside(tmp_path, caplog):
    parts = {"train": make(6), "test": make(3, 50, labels=[-1] * 3)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    result = build.prepare(tmp_path / "set", tmp_path / "out", workers=1)
    assert result["examples"] == {"train": 6}
    assert ".arrow: has no labels and is left aside" in caplog.text


def test_each_mistake_in_a_table_is_one_line(tmp_path):
    root = tmp_path / "set"
    make(6, labels=[0, None, 2, 0, -1, 2]).to_parquet(str(root / "train.parquet"))
    assert "train.parquet: 2 of 6 examples have no label" in error_of(root, tmp_path)
    assert "--label-column=lable: " in error_of(root, tmp_path, columns=("", "lable"))
    other = make(3, feature=datasets.ClassLabel(names=["x", "y", "z"]))
    make(6).to_parquet(str(root / "train.parquet"))
    other.to_parquet(str(root / "test.parquet"))
    assert "test.parquet: names other classes in column 'label'" in error_of(root, tmp_path)
    make(3, label="kind").to_parquet(str(root / "test.parquet"))
    assert "test.parquet: its columns or kind of labels differ" in error_of(root, tmp_path)
    for name, kinds in (("train", ["a", "b"]), ("test", [0, 1])):
        table = pa.table({"image": [png(0), png(1)], "label": kinds})
        pyarrow.parquet.write_table(table, root / f"{name}.parquet")
    assert "test.parquet: its columns or kind of labels differ" in error_of(root, tmp_path)
    make(3).save_to_disk(str(tmp_path / "saved"))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:700])
    assert f"{arrow}: not an Arrow file that can be read" in error_of(tmp_path / "saved", tmp_path)
    arrow.unlink()
    assert f"{arrow}: not an Arrow file that can be read" in error_of(tmp_path / "saved", tmp_path)
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": []}')
    assert "no files of images to train on" in error_of(tmp_path / "saved", tmp_path)
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert "not as save_to_disk writes it" in error_of(tmp_path / "saved", tmp_path)
    datasets.DatasetDict(fold=make(3)).save_to_disk(str(tmp_path / "folds"))
    assert "no split to train on (it has fold)" in error_of(tmp_path / "folds", tmp_path)


def test_a_data_set_prepared_before_columns_could_be_chosen_goes_on(tmp_path):
    """Its journal knows a shard by four facts; more would make it another data set's."""
    make(6).to_parquet(str(tmp_path / "set" / "train.parquet"))
    _, found = tables.plan(tmp_path / "set", 1, "", "")
    (shard,) = found["train"]
    assert shard.facts() == [["train.parquet", (0,), 6, shard.bytes]]
    shutil.rmtree(tmp_path / "set")


RECORDS = Path(__file__).parent / "golden" / "tfrecord"  # which TensorFlow 2.21 wrote, by TFDS
VERSION = RECORDS / "many" / "light" / "1.0.0"


def test_tfds_in_tfrecord_is_converted_as_the_error_says(tmp_path):
    data = base.get_config().data
    data.source, data.dir = "tfds:many/light", str(RECORDS)
    with pytest.raises(UserError) as error:
        open_dataset(data)
    command = str(error.value).partition("`deit ")[2].removesuffix("`").split()
    assert command == ["prepare", str(VERSION), "DST"]
    assert program.main([*command[:-1], str(tmp_path), "--workers=1"]) == 0
    data.source, data.dir = "tfds:many_light", str(tmp_path)
    dataset = open_dataset(data)
    assert dataset.classes == [str(i) for i in range(10)]
    for source, numbers in ((dataset.train, range(17)), (dataset.eval, range(17, 24))):
        # Image i was made 3 pixels large, its red i and no other colour, its label i % 10.
        found = []
        for encoded, label in contents(source):
            image = Image.open(io.BytesIO(encoded))
            assert (image.size, image.getpixel((1, 1))[1:]) == ((3, 3), (0, 0))
            found.append((image.getpixel((1, 1))[0], label))
        assert sorted(found) == [(i, i % 10) for i in numbers]


def test_damaged_tfrecords_are_one_line(tmp_path):
    root = tmp_path / "many" / "1.0.0"
    shutil.copytree(VERSION, root)
    record = root / "many-train.tfrecord-00000-of-00001"
    whole = record.read_bytes()
    record.write_bytes(whole[:-9])
    assert f"{record}: damaged or cut short" in error_of(root, tmp_path)
    record.write_bytes(whole[: -(106 + 16)])  # the last one's bytes, its length and checksums
    assert f"{record}: 16 examples, where its data set notes 17" in error_of(root, tmp_path)
    record.write_bytes(whole[:12] + b"no example" * 5 + whole[62:])
    assert f"{record}:0: no example of TFDS" in error_of(root, tmp_path)
    record.unlink()
    assert f"{record}: cannot be read" in error_of(root, tmp_path)
    info = json.loads((root / "dataset_info.json").read_text())
    (root / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "array_record"}))
    assert "in array_record; only tfrecord is converted; train on it as it is" in error_of(
        root, tmp_path
    )
    (root / "features.json").write_text("{}")
    assert f"{root}: not as TFDS writes it" in error_of(root, tmp_path)


def test_a_data_set_of_tfdss_own_gets_another_name(tmp_path):
    """TFDS would open mnist with the features of its own builder."""
    root = tmp_path / "mnist" / "1.0.0"
    shutil.copytree(VERSION, root)
    info = json.loads((root / "dataset_info.json").read_text())
    info = {k: v for k, v in info.items() if k not in ("configName", "configDescription")}
    (root / "dataset_info.json").write_text(json.dumps({**info, "name": "mnist"}))
    for file in root.glob("many-*"):
        file.rename(root / file.name.replace("many", "mnist"))
    result = build.prepare(root, tmp_path / "out", workers=1)
    assert result["name"] == "mnist_array_record"
    assert len(opened(result).train) == 17

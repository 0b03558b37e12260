"""Check `deit prepare` on tables: columns by type or by name, parquet and save_to_disk."""

import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

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
        build.prepare(source, tmp_path / "error", workers=1, **options)
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


def test_each_mistake_in_a_table_is_one_line(tmp_path):
    root = tmp_path / "set"
    make(6, labels=[0, None, 2, 0, -1, 2]).to_parquet(str(root / "train.parquet"))
    assert "train.parquet: 2 of 6 examples have no label" in error_of(root, tmp_path)
    assert "--label-column=lable: " in error_of(root, tmp_path, columns=("", "lable"))
    other = make(3, feature=datasets.ClassLabel(names=["x", "y", "z"]))
    make(6).to_parquet(str(root / "train.parquet"))
    other.to_parquet(str(root / "test.parquet"))
    assert "name other classes in column 'label'" in error_of(root, tmp_path)
    make(3).save_to_disk(str(tmp_path / "saved"))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:700])
    assert f"{arrow}: not an Arrow file that can be read" in error_of(tmp_path / "saved", tmp_path)
    arrow.unlink()
    assert f"{arrow}: not an Arrow file that can be read" in error_of(tmp_path / "saved", tmp_path)
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

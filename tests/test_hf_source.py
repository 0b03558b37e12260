"""Check data sets of Hugging Face's `datasets` against the library's own rows."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from deit_jax.config.serialize import from_json, to_json
from deit_jax.configs import base
from deit_jax.data.sources import splits
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from tests.test_sources import REPOSITORY, error_of, open_data, pixels

CLASSES = ["cat", "dog", "eel"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` converts in a folder of its own; return it."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    datasets.disable_progress_bars()
    return folder


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (number, 255 - number, 7)).save(buffer, "png")
    return buffer.getvalue()


def images(count, start=0):
    return [{"bytes": png(start + i), "path": f"{start + i}.png"} for i in range(count)]


def make(count=12, start=0, image="image", label="label", feature=None, labels=None, **more):
    """Return a Dataset of images of one colour each, labels 0 1 2 0 1 2 … unless given."""
    kinds = {name: kind for name, (kind, _) in more.items()}
    features = {image: datasets.Image(), label: feature or datasets.ClassLabel(names=CLASSES)}
    columns = {image: images(count, start), label: labels or [i % 3 for i in range(count)]}
    columns |= {name: values for name, (_, values) in more.items()}
    return datasets.Dataset.from_dict(columns, datasets.Features(features | kinds))


def saved(tmp_path, **parts):
    """Write a DatasetDict as `save_to_disk` does; return the source's name."""
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    return f"hf:{tmp_path}/set"


def parquet(folder, **columns):
    """Write train-….parquet without Hugging Face's notes; return the source's name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pa.table(columns), path)
    return f"hf:{folder}"


def integers():
    return datasets.Value("int64")


def content(source):
    return [(source[i]["image"], source[i]["label"]) for i in range(len(source))]


def rows(dataset, image="image", label="label"):
    """Return (bytes, label) of all rows as the library itself reads them."""
    encoded = dataset.cast_column(image, datasets.Image(decode=False))
    return [(row[image]["bytes"], row[label]) for row in encoded]


def test_a_saved_data_set_gives_the_librarys_rows(tmp_path):
    train, test = make(12), make(5, start=100)
    dataset = open_data(saved(tmp_path, train=train, test=test))
    assert dataset.classes == CLASSES
    assert content(dataset.train) == rows(train)
    assert content(dataset.eval) == rows(test)  # there is no split for validation
    assert dataset.train.labels.tolist() == train["label"][:]
    assert dataset.train.describe(7) == f"hf:{tmp_path}/set train[7]"
    for ours, theirs in zip(pixels(dataset.train), train, strict=True):
        assert np.array_equal(ours, np.asarray(theirs["image"]))


def test_rows_in_many_chunks_and_many_files(tmp_path):
    train = make(50)
    train.save_to_disk(str(tmp_path / "set"), num_shards=4)
    source = open_data(f"hf:{tmp_path}/set", eval_split="train").train
    assert content(source) == rows(train)
    many = datasets.concatenate_datasets([make(n, start=10 * n) for n in range(1, 6)])
    many.to_parquet(str(tmp_path / "hub" / "train.parquet"), batch_size=4)
    reopened = open_data(f"hf:{tmp_path}/hub", eval_split="train").train
    assert content(reopened) == rows(many)
    assert reopened[-1] == reopened[14]
    with pytest.raises(IndexError):
        reopened[15]


def test_a_lone_data_set_has_a_part_held_out(tmp_path):
    whole = make(30)
    whole.save_to_disk(str(tmp_path / "set"))
    dataset = open_data(f"hf:{tmp_path}/set", eval_fraction=0.2)
    assert (len(dataset.train), len(dataset.eval)) == (24, 6)
    assert np.bincount(dataset.eval.labels).tolist() == [2, 2, 2]
    assert sorted(content(dataset.train) + content(dataset.eval)) == sorted(rows(whole))


def test_parquet_in_the_hubs_layout(tmp_path, cache):
    parts = {"train": make(9), "validation": make(4, 50), "test": make(3, 80)}
    (tmp_path / "data").mkdir()
    for name, part in parts.items():
        part.to_parquet(str(tmp_path / "data" / f"{name}-00000-of-00001.parquet"))
    dataset = open_data(f"hf:{tmp_path}")
    assert content(dataset.train) == rows(parts["train"])
    assert content(dataset.eval) == rows(parts["validation"])
    assert list(cache.rglob("*.arrow"))  # which is what has random access
    asked = open_data(f"hf:{tmp_path}", eval_split="test")
    assert content(asked.eval) == rows(parts["test"])


def test_parquet_that_changed_is_read_anew(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    for start in (0, 60):
        make(6, start).to_parquet(str(path))
        os.utime(path, (start + 1, start + 1))
        source = open_data(f"hf:{tmp_path}", eval_split="train").train
        assert content(source) == rows(make(6, start))


@pytest.mark.parametrize(
    "part", ["train[:80%]", "train[80%:]", "train[-3:]", "train[:4]+validation", "train[:33%]"]
)
def test_parts_of_splits_are_the_librarys(tmp_path, part):
    for name, one in (("train", make(17)), ("validation", make(5, 90))):
        one.to_parquet(str(tmp_path / "set" / f"{name}.parquet"), batch_size=4)
    dataset = open_data(f"hf:{tmp_path}/set", train_split=part, eval_split=part)
    expected = datasets.load_dataset(str(tmp_path / "set"), split=part)
    assert content(dataset.train) == content(dataset.eval) == rows(expected)
    assert dataset.train.describe(0) == f"hf:{tmp_path}/set {part}[0]"
    for wrong in ("train[:x]", "nope[:3]", "train[9:9]", "train+nope", "train[20:]"):
        line = error_of(f"hf:{tmp_path}/set", train_split=wrong)
        assert line.startswith(f"config.data.train_split={wrong}: ")
        assert line.endswith("it has train, validation)")


def test_a_selection_is_what_is_selected(tmp_path, monkeypatch):
    """Old versions of the library wrote one beside its table."""
    chosen = make(9).select([7, 2, 5, 0])
    assert chosen._indices is not None
    source = saved(tmp_path, train=make(9))
    monkeypatch.setattr(datasets, "load_from_disk", lambda _: chosen)
    assert content(open_data(source, eval_split="train").train) == rows(chosen)


def test_configs_of_a_folder(tmp_path):
    card = {"configs": [{"config_name": n, "data_files": f"{n}/*.parquet"} for n in ("a", "b")]}
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    for name, start in (("a", 0), ("b", 90)):
        (tmp_path / name).mkdir()
        make(6, start).to_parquet(str(tmp_path / name / "train.parquet"))
    dataset = open_data(f"hf:{tmp_path}:b", eval_split="train")
    assert content(dataset.train) == rows(make(6, 90))
    assert "'a', 'b'" in error_of(f"hf:{tmp_path}")
    line = error_of(f"hf:{tmp_path}:c")
    assert "'c'" in line
    assert "'a', 'b'" in line


@pytest.mark.parametrize(
    ("image", "label"), [("img", "labels"), ("img", "fine_label"), ("picture", "kind")]
)
def test_columns_are_found_by_their_types(tmp_path, image, label):
    train = make(9, image=image, label=label, width=(integers(), [5] * 9))
    source = open_data(saved(tmp_path, train=train), eval_split="train").train
    assert content(source) == rows(train, image, label)


def test_columns_can_be_chosen(tmp_path):
    coarse, names = [i % 2 for i in range(12)], ["fish", "beast"]
    train = make(
        label="fine_label",
        coarse_label=(datasets.ClassLabel(names=names), coarse),
        thumbnail=(datasets.Image(), images(12, 100)),
    )
    source = saved(tmp_path, train=train)
    dataset = open_data(
        source, image_column="thumbnail", label_column="coarse_label", eval_split="train"
    )
    assert dataset.classes == names
    assert content(dataset.train) == rows(train, "thumbnail", "coarse_label")
    line = error_of(source, image_column="image")
    assert "fine_label, coarse_label could each be the labels" in line
    assert "config.data.label_column=NAME" in line
    line = error_of(source, label_column="fine_label")
    assert "image, thumbnail could each be the images" in line
    assert "config.data.image_column=NAME" in line


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_without_notes_of_its_features(tmp_path, struct):
    encoded = [png(i) for i in range(6)]
    column = [{"bytes": b, "path": None} for b in encoded] if struct else encoded
    source = parquet(tmp_path, picture=column, label=[0, 1, 2] * 2, file_name=list("abcdef"))
    dataset = open_data(source, eval_split="train")
    assert dataset.classes == ["0", "1", "2"]
    assert content(dataset.train) == list(zip(encoded, [0, 1, 2] * 2, strict=True))


@pytest.mark.parametrize("encoded", [False, True])
def test_strings_become_classes_in_natural_order(tmp_path, encoded):
    strings = ["class 10", "class 9", "Disc", "class 9", "class 10", "Disc"]  # as timm sorts them
    values = pa.array(strings)
    column = [png(i) for i in range(6)]
    source = parquet(tmp_path, image=column, kind=values.dictionary_encode() if encoded else values)
    dataset = open_data(source, eval_split="train")
    assert dataset.classes == ["class 9", "class 10", "Disc"]
    assert [dataset.classes[i] for i in dataset.train.labels] == strings
    assert dataset.train.labels.dtype == np.int32


def test_integers_are_numbers_of_classes_and_gaps_are_said(tmp_path, caplog):
    source = parquet(tmp_path, image=[png(i) for i in range(4)], label=[1, 1, 4, 4])
    with caplog.at_level(logging.WARNING, "deit_jax"):
        dataset = open_data(source)
    assert dataset.classes == ["0", "1", "2", "3", "4"]
    assert "3 of 5 classes have no training image: 0, 2, 3" in caplog.text


def test_another_numbering_of_the_same_classes_is_translated(tmp_path):
    other = make(3, 50, feature=datasets.ClassLabel(names=["eel", "cat", "dog"]))
    dataset = open_data(saved(tmp_path, train=make(), validation=other))
    named = [dataset.classes[label] for label in dataset.eval.labels]
    assert named == ["eel", "cat", "dog"]
    stranger = make(3, 50, feature=datasets.ClassLabel(names=["eel", "cat", "dgo"]))
    line = error_of(saved(tmp_path / "2", train=make(), validation=stranger))
    assert "set validation: label 'dgo' is no class of the training images" in line
    strings = datasets.Value("string")
    line = error_of(
        saved(
            tmp_path / "3",
            train=make(feature=strings, labels=list("abc") * 4),
            validation=make(3, feature=strings, labels=list("abx")),
        )
    )
    assert "label 'x' is no class of the training images" in line
    line = error_of(
        saved(
            tmp_path / "4",
            train=make(feature=strings, labels=list("abc") * 4),
            validation=make(3, feature=integers()),
        )
    )
    assert "has labels of int64, the training images of string" in line


def test_images_given_by_their_paths(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    column = [{"bytes": None, "path": str(tmp_path / f"{i}.png")} for i in range(4)]
    column += [{"bytes": None, "path": "../4.png"}, {"bytes": None, "path": None}]
    source = parquet(tmp_path / "set", image=column, label=[0, 1] * 3)
    train = open_data(source, eval_split="train").train
    assert [train[i]["image"] for i in range(5)] == [png(i) for i in range(5)]
    with pytest.raises(UserError, match=r"train\[5\]: no image there, neither bytes nor a path"):
        train[5]
    (tmp_path / "0.png").unlink()
    with pytest.raises(UserError, match=r"train\[0\]: .*0\.png: cannot be read \(No such file"):
        train[0]


def test_many_threads_read_the_same(tmp_path):
    source = saved(tmp_path, train=make(100))
    train = open_data(source, eval_split="train").train
    order = np.random.default_rng(0).integers(100, size=2000).tolist()
    expected = content(train)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(train.__getitem__, order))
    assert [(x["image"], x["label"]) for x in found] == [expected[i] for i in order]


def test_a_split_goes_by_any_of_its_usual_names():
    def chosen(wanted, *there):
        return splits.choose_split(wanted, there)

    assert chosen("train", "Train", "test") == "Train"
    assert chosen("train", "training") == "training"
    assert chosen("train", "test") is None
    for name in ("val", "valid", "dev", "VALIDATION", "test", "testing"):
        assert chosen("validation", "train", name) == name
    assert chosen("validation", "test", "train", "val") == "val"
    assert chosen("val", "train", "dev", "test") == "dev"
    assert chosen("test", "train", "validation") is None
    assert chosen("testing", "train", "test") == "test"
    assert chosen("fold1", "fold2") is None
    assert chosen("fold1", "Fold1") == "Fold1"


def test_a_split_without_labels_is_left_aside_unless_it_is_asked_for(tmp_path, caplog):
    source = saved(tmp_path, train=make(30), test=make(5, 50, labels=[-1] * 5))
    with caplog.at_level(logging.INFO, "deit_jax"):
        dataset = open_data(source)
    assert "split 'test' has no labels and is left aside" in caplog.text
    assert len(dataset.train) + len(dataset.eval) == 30
    line = error_of(source, eval_split="test")
    assert "test: 5 of 5 examples have no label" in line


def test_what_is_trained_on_is_no_evaluation_unless_asked_for(tmp_path):
    source = saved(tmp_path, train=make(12), test=make(12, 50))
    dataset = open_data(source, train_split="train+test")
    assert (len(dataset.train), len(dataset.eval)) == (18, 6)  # a part is held out
    assert not set(content(dataset.train)) & set(content(dataset.eval))
    dataset = open_data(source, train_split="test", eval_split="train")
    assert content(dataset.eval) == rows(make(12))


@pytest.mark.parametrize("labels", [[0, None, 2, 0, None, 2], [0, -1, 2, 0, -1, 2]])
def test_missing_labels_are_counted(tmp_path, labels):
    line = error_of(saved(tmp_path, train=make(6, labels=labels)), eval_split="train")
    assert "train: 2 of 6 examples have no label (null, -1 or empty)" in line
    assert "config.data.label_column" in line


def test_each_mistake_in_columns_and_splits_is_one_line(tmp_path):
    floats = (datasets.Value("float32"), [0.5] * 12)
    source = saved(tmp_path, train=make(score=floats))
    assert "label_column=lable: " in error_of(source, label_column="lable")
    assert "no such column (it has image (struct<" in error_of(source, image_column="img")
    assert "label_column=score: " in error_of(source, label_column="score")
    assert "has float there; a label is a ClassLabel" in error_of(source, label_column="score")
    assert "has int64 there, no encoded images" in error_of(source, image_column="label")
    assert "no split 'fold' (it has train)" in error_of(source, train_split="fold")
    assert "no split 'test' with labels (it has train)" in error_of(source, eval_split="test")
    scored = saved(tmp_path / "2", train=make(label="score", feature=floats[0], labels=floats[1]))
    assert "no column of labels (it has image" in error_of(scored)
    several = datasets.Sequence(datasets.ClassLabel(names=CLASSES))
    tags = saved(tmp_path / "3", train=make(label="tags", feature=several, labels=[[0, 1]] * 12))
    assert "column 'tags' has several labels an image" in error_of(tags)
    assert "has several labels an image" in error_of(tags, label_column="tags")
    texts = parquet(tmp_path / "4", image=[png(0)], a=["x"], b=[1])
    assert "a, b could each be the labels" in error_of(texts)
    none = parquet(tmp_path / "5", image=["x.png"], label=[1])
    assert "no column of images (it has image (string), label (int64))" in error_of(none)
    large = parquet(tmp_path / "6", image=[png(0)], label=[2**40])
    assert f"label {2**40}, but classes are at most 1000000" in error_of(large)
    beyond = make(3, feature=integers(), labels=[0, 1, 7])
    beyond = saved(tmp_path / "7", train=make(), validation=beyond)
    assert "set validation: label 7, but there are 3" in error_of(beyond)
    for name, part in (("train", make()), ("validation", make(3).select([]))):
        part.to_parquet(str(tmp_path / "8" / f"{name}.parquet"))
    assert '"validation" corresponds to no data' in error_of(f"hf:{tmp_path}/8")


def test_each_mistake_in_a_place_is_one_line(tmp_path, monkeypatch):
    assert "no such folder, nor a name of the hub" in error_of(f"hf:{tmp_path}/none")
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in error_of(f"hf:{tmp_path}/empty")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(b"PAR1 and nothing else")
    line = error_of(f"hf:{tmp_path}/bad")
    assert f"{tmp_path}/bad/train.parquet: cannot be read" in line
    assert "footer" in line
    make(300).to_parquet(str(tmp_path / "bad" / "train.parquet"))
    data = (tmp_path / "bad" / "train.parquet").read_bytes()
    (tmp_path / "bad" / "train.parquet").write_bytes(data[:4] + bytes(2000) + data[2004:])
    assert f"hf:{tmp_path}/bad: cannot be read" in error_of(f"hf:{tmp_path}/bad")
    source = saved(tmp_path, train=make())
    arrow = next((tmp_path / "set" / "train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert f"{source}: Expected to read" in error_of(source)
    assert "folders have no columns" in error_of("folder:/data", image_column="img")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error_of(source).endswith("pip install 'deit_jax[hub]'")


def test_the_hubs_data_sets_come_from_the_cache_where_there_is_no_hub(tmp_path):
    """In a process of its own, as the library reads the environment when it is imported."""
    make(12).to_parquet(str(tmp_path / "set" / "train.parquet"))
    make(6, 60).to_parquet(str(tmp_path / "set" / "validation.parquet"))
    cache = tmp_path / "home" / "datasets"
    datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(cache))
    # Where the library keeps what it fetched as someone/pictures.
    shutil.move(cache / "set", cache / "someone___pictures")
    for info in (cache / "someone___pictures").rglob("*"):
        if info.is_file() and info.name.startswith("set-"):
            info.rename(info.with_name(info.name.replace("set-", "pictures-", 1)))
    code = """
        import sys
        from deit_jax.configs import base
        from deit_jax.data.sources.registry import open_dataset
        from deit_jax.errors import UserError

        config = base.get_config().data
        config.source = "hf:someone/pictures"
        dataset = open_dataset(config)
        print(len(dataset.train), len(dataset.eval), dataset.classes)
        for name in ("someone/pictures:other", "someone/else", "nothing"):
            config.source = f"hf:{name}"
            try:
                open_dataset(config)
            except UserError as error:
                print(error)
        assert not {"tensorflow", "torch", "jax"} & set(sys.modules)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    opened, *lines = done.stdout.splitlines()
    assert opened == f"12 6 {CLASSES}"
    assert len(lines) == 3
    assert "default" in lines[0]  # the config that is there
    for line in lines[1:]:
        assert "not in the local cache, and the hub cannot be reached (HF_HUB_OFFLINE" in line


def test_a_config_older_than_columns_opens():
    old = to_json(base.get_config())
    old["data"]["source"] = "digits"
    del old["data"]["image_column"], old["data"]["label_column"]
    assert len(open_dataset(from_json(old).data).classes) == 10


def test_a_run_on_a_saved_data_set_opens_in_a_command(tmp_path):
    source = saved(tmp_path, train=make(), validation=make(6, 50))
    code = "import sys; from deit_jax import __main__; sys.exit(__main__.main(sys.argv[1:]))"
    arguments = ["inspect", "--config=quickstart.py", f"--config.data.source={source}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, f"--out={tmp_path / 'sheet.png'}"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(tmp_path / "sheet.png").stat().st_size > 0


HF_SETS = [[0], [0, 2], [], [2, 2], [1], [0, 1, 2]] * 2
LISTS = {
    "classes": (datasets.Sequence(datasets.ClassLabel(names=CLASSES)), HF_SETS),
    "numbers": (datasets.Sequence(datasets.Value("int32")), HF_SETS),
    "names": (
        datasets.Sequence(datasets.Value("string")),
        [[CLASSES[k] for k in labels] for labels in HF_SETS],
    ),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_are_several_labels_an_image(tmp_path, kind):
    feature, values = LISTS[kind]
    made = make(label="tags", feature=feature, labels=values, other=(integers(), [1] * 12))
    dataset = open_data(saved(tmp_path, train=made, validation=made), multi_label=True)
    assert dataset.classes == (["0", "1", "2"] if kind == "numbers" else CLASSES)
    for part in (dataset.train, dataset.eval):
        assert part.labels.dtype == np.uint8
        for i, labels in enumerate(HF_SETS):
            assert np.flatnonzero(part[i]["label"]).tolist() == sorted(set(labels))
            assert part[i]["image"] == png(i)


def test_lists_that_are_no_labels_are_one_line(tmp_path):
    numbers, several = datasets.Sequence(datasets.Value("int32")), {"multi_label": True}

    def line(name, feature=numbers, **columns):
        made = make(6, feature=feature, **columns)
        return error_of(saved(tmp_path / name, train=made, validation=made), **several)

    assert "has one label an image; leave config.data.multi_label out" in line("a", None)
    hot = [[0, 1, 1], [1, 0, 0]] * 3
    assert "every list has 3 values of 0 and 1" in line("b", labels=hot)
    assert "2 of 6 examples have no list of labels" in line("c", labels=[[0], [1], None] * 2)
    assert "3 of 9 examples have no label" in line("d", labels=[[0, 1], [-1]] * 3)
    named = datasets.Sequence(datasets.ClassLabel(names=CLASSES))
    train = make(6, feature=named, labels=[[0, 1]] * 6)
    ours = datasets.Sequence(datasets.ClassLabel(names=["cat", "fox"]))
    held = make(6, feature=ours, labels=[[0, 1]] * 6)
    source = saved(tmp_path / "e", train=train, validation=held)
    assert "label 'fox' is no class of the training images" in error_of(source, **several)
    assert "set --config.data.multi_label=True" in error_of(source)

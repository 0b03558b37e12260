"""Several labels an image: what tables and lists of them mean, and what is refused in one line."""

import json

import numpy as np
import pytest

from deit_jax.data import card
from deit_jax.data.sources.base import Subset
from tests.test_sources import error_of, names, open_data

SETS = {1: ["cat"], 2: ["cat", "sea dog"], 3: [], 4: ["eel", "sea dog"], 5: ["sea dog"], 6: ["eel"]}
CLASSES = ["cat", "eel", "sea dog"]


def lines(head, row):
    return "\n".join([head, *(row(f"images/{i}.png", labels) for i, labels in SETS.items())])


def one_hot(path, labels):
    return ",".join([path, *("1" if name in labels else "0" for name in CLASSES)])


FORMS = {
    "bar.csv": lines("path,label", lambda p, x: f"{p},{'|'.join(x)}"),
    "semicolon.csv": lines("image,labels", lambda p, x: f"{p},{'; '.join(x)}"),
    "comma.csv": lines("image,tags", lambda p, x: f'{p},"{", ".join(x)}"'),
    "chest.csv": lines("Image Index,Finding Labels", lambda p, x: f"{p},{'|'.join(x)}"),
    "pandas.csv": lines("image,labels", lambda p, x: f'{p},"{x}"'),
    "one_hot.csv": lines("filename, cat, eel, sea dog", one_hot),
    "map.json": json.dumps({f"images/{i}.png": x for i, x in SETS.items()}),
    "pairs.json": json.dumps([[f"images/{i}.png", x] for i, x in SETS.items()]),
    "objects.json": json.dumps([{"file": f"images/{i}.png", "tags": x} for i, x in SETS.items()]),
    "lines.txt": "\n".join(f"images/{i}.png,{'|'.join(x)}" for i, x in SETS.items()),
    "rows.csv": "path,label\nimages/3.png,\n"
    + "\n".join(f"images/{i}.png,{x}|" for i, xs in SETS.items() for x in xs),
}


@pytest.fixture
def images(folder):
    return folder(*(f"images/{i}.png" for i in range(1, 8)))


def open_sets(root, **fields):
    return open_data(f"folder:{root}", multi_label=True, **fields)


def refusal(root, **fields):
    line = error_of(f"folder:{root}", multi_label=True, **fields)
    assert "\n" not in line
    return line


def sets_of(dataset, root):
    """Return {path: names of its labels} of both parts, as the examples have them."""
    known = {}
    for part in (dataset.train, dataset.eval):
        for i, name in enumerate(names(part, root)):
            label = part[i]["label"]
            assert label.dtype == np.uint8
            assert np.array_equal(label, part.labels[i])
            known[name] = [dataset.classes[k] for k in np.flatnonzero(label)]
    return known


@pytest.mark.parametrize("name", FORMS)
def test_sets_of_labels_in_the_forms_of_public_data(images, tmp_path_factory, name):
    file = tmp_path_factory.mktemp("labels") / name
    file.write_text(FORMS[name])
    dataset = open_sets(images, labels=str(file))
    assert dataset.classes == CLASSES
    assert sets_of(dataset, images) == {f"images/{i}.png": x for i, x in SETS.items()}


def test_words_between_spaces_are_labels_where_a_person_says_so(images):
    (images / "train.csv").write_text("image_name,tags\n1,haze primary\n2,clear\n3,clear primary\n")
    assert "choose with --config.data.label_separator=space or '|'" in refusal(
        images, labels=f"{images}/train.csv"
    )
    words = open_sets(images, labels=f"{images}/train.csv", label_separator="space")
    assert words.classes == ["clear", "haze", "primary"]
    whole = open_sets(images, labels=f"{images}/train.csv", label_separator="|", min_images=0)
    assert whole.classes == ["clear", "clear primary", "haze primary"]


def test_numbers_are_classes_from_0(images):
    (images / "a.json").write_text(json.dumps({"1.png": [0, 2], "2.png": [], "3.png": [2, 1]}))
    dataset = open_sets(images, labels=f"{images}/a.json", min_images=0)
    assert dataset.classes == ["0", "1", "2"]
    assert sets_of(dataset, images)["images/1.png"] == ["0", "2"]


def test_classes_may_be_given_and_parts_are_those_of_a_column(images):
    (images / "classes.txt").write_text("sea dog\nox\neel\ncat")
    rows = [f"{i},{'|'.join(x)},{'val' if i > 4 else 'train'}" for i, x in SETS.items()]
    (images / "a.csv").write_text("\n".join(["id,label,split", *rows]))
    dataset = open_sets(images, labels=f"{images}/a.csv", classes=f"{images}/classes.txt")
    assert dataset.classes == ["sea dog", "ox", "eel", "cat"]
    assert (len(dataset.train), len(dataset.eval)) == (4, 2)
    assert dataset.train.labels.tolist() == [[0, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]]


def test_a_part_is_held_out_by_the_images_own_names(images):
    rows = {f"{i}.png": x for i, x in SETS.items()}
    (images / "a.json").write_text(json.dumps(rows))
    dataset = open_sets(images, labels=f"{images}/a.json", eval_fraction=0.34)
    held = set(names(dataset.eval, images))
    assert len(held) == 2
    assert dataset.reading.eval == "34% of the images, held out"
    # Other labels and another order move none; a file less moves one at most.
    (images / "b.json").write_text(json.dumps({k: ["eel", "ox"] for k in reversed(rows)}))
    other = open_sets(images, labels=f"{images}/b.json", eval_fraction=0.34)
    assert set(names(other.eval, images)) == held


def test_a_small_class_is_left_out_and_its_images_stay(images):
    (images / "a.json").write_text(json.dumps({f"{i}.png": x for i, x in SETS.items()}))
    given = {"labels": f"{images}/a.json", "eval_fraction": 0.2}
    assert open_sets(images, **given).train.labels.sum(0).tolist() == [2, 1, 3]
    some = open_sets(images, **given, min_images=3)
    assert some.classes == ["sea dog"]
    assert len(some.train) + len(some.eval) == 6
    assert some.reading.left_out["classes of fewer than 3 training images"] == 2
    both = np.concatenate([some.train.labels, some.eval.labels])
    assert both.shape == (6, 1)
    assert both.sum() == 3


def test_the_card_counts_an_image_in_each_of_its_classes(images):
    (images / "a.json").write_text(json.dumps({f"{i}.png": x for i, x in SETS.items()}))
    dataset = open_sets(images, labels=f"{images}/a.json")
    facts = card.make(dataset, "folder", whole=True)
    both = np.add(facts["per_class"]["train"], facts["per_class"]["eval"])
    assert both.tolist() == [2, 2, 3]
    several = facts["several_labels"]
    assert sum(part["without"] for part in several.values()) == 1
    assert sum(part["labels"] for part in several.values()) == 7
    assert any("several labels an image" in line for line in card.lines(facts))
    assert any(f"{several['train']['without']} training images have none" in line
               for line in card.lines(facts))  # fmt: skip


def test_a_subset_has_the_labels_of_its_images(images):
    (images / "a.json").write_text(json.dumps({f"{i}.png": x for i, x in SETS.items()}))
    whole = open_sets(images, labels=f"{images}/a.json").train
    part = Subset(whole, np.array([2, 0]))
    assert np.array_equal(part.labels, whole.labels[[2, 0]])
    assert np.array_equal(part[1]["label"], whole.labels[0])


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ("path,label\n1,a|b\n2,a;b", {}, "labels stand between | elsewhere; choose with"),
        ("path,cat,dog\n1,1,0\n2,0,2", {}, "column 'dog' holds '2'; without a column of labels"),
        ("path,cat,dog\n1,1,0\n2,0,", {}, "column 'dog' holds ''"),
        ("path,cat,dog,cat\n1,1,0,0", {}, "column 'cat' has no name of its own"),
        ("path,cat,dog\n1,1,0\n2,1,0", {}, "no training images of class 'dog'"),
        ("path,label,split\n1,a,train\n1,b,val", {}, "is of split 'val' here and 'train' before"),
        ("path,label\n1,\n2,", {}, "not one image has a label"),
        ("path,label\n1,0|77\n2,1", {}, "label 77 of 1 is out of range"),
        ("path,label\n1,0|07\n2,1", {}, "is out of range"),
        ("path,label\n9,a", {}, "1 of 1 images are not in"),
        ("path,label\n1,a|b\n2,c", {"classes": "ab.txt"}, "c, a label of 2, is no class of"),
        ("path,label\n1,a\n2,b", {"label_separator": "/"}, "choose one of"),
    ],
)
def test_what_cannot_be_understood_is_one_line(images, content, fields, message):
    (images / "a.csv").write_text(content)
    (images / "ab.txt").write_text("a\nb")
    fields = {k: f"{images}/{v}" if k == "classes" else v for k, v in fields.items()}
    assert message in refusal(images, labels=f"{images}/a.csv", **fields)


def test_tables_of_columns_must_have_the_same_classes(images):
    (images / "train.csv").write_text("path,cat,dog\n1,1,0\n2,0,1")
    (images / "val.csv").write_text("path,dog,cat\n3,1,0")
    files = f"{images}/train.csv,{images}/val.csv"
    dataset = open_sets(images, labels=files)
    assert dataset.eval.labels.tolist() == [[0, 1]]
    (images / "val.csv").write_text("path,dog\n3,1")
    assert "val.csv:2: other columns of classes than" in refusal(images, labels=files)


def test_several_labels_without_the_field_are_told_of_it(images):
    remedy = "for several labels an image set --config.data.multi_label=True"
    for name, content in {
        "a.csv": "path,label\n1,a\n1,b",
        "b.csv": "path,cat,dog\n1,0,1",
        "c.json": '{"1.png": ["a", "b"]}',
    }.items():
        (images / name).write_text(content)
        assert remedy in error_of(f"folder:{images}", labels=f"{images}/{name}")
    (images / "d.csv").write_text("path,label\n1,a|b\n2,a\n3,a\n4,a|b")
    dataset = open_data(f"folder:{images}", labels=f"{images}/d.csv")
    assert dataset.reading.notes == (
        "a|b: one class each; --config.data.multi_label=True takes them apart",
    )


@pytest.mark.parametrize("sign", ["|", ";", ","])
def test_cells_of_several_labels_are_never_classes(images, sign):
    """Not without the field, nor with another sign than is there; but where they are names."""
    rows = ["a", "b", f'"a{sign}b"', f'"a{sign} c"', f'"c{sign}b"', "a"]
    file = images / "cells.csv"
    file.write_text("path,label\n" + "\n".join(f"{i},{x}" for i, x in enumerate(rows, 1)))
    line = error_of(f"folder:{images}", labels=str(file))
    assert line.startswith(f"{file}:4: 'a{sign}b' looks like several labels (3 such); ")
    assert "set --config.data.multi_label=True; if it is the name of one" in line
    other = "|" if sign != "|" else ";"
    line = refusal(images, labels=str(file), label_separator=other)
    assert f"'a{sign}b' looks like several labels" in line
    assert "--config.data.label_separator" in line
    rows, listed = 2 * ["a", "b", f'"a{sign}b"'], images / "classes.json"
    file.write_text("path,label\n" + "\n".join(f"{i},{x}" for i, x in enumerate(rows, 1)))
    listed.write_text(json.dumps(["a", "b", f"a{sign}b"]))
    dataset = open_data(f"folder:{images}", labels=str(file), classes=str(listed))
    assert dataset.classes == ["a", "b", f"a{sign}b"]
    assert sorted([*dataset.train.labels, *dataset.eval.labels]) == [0, 0, 1, 1, 2, 2]


def test_lists_in_cells_are_no_classes_without_the_field(images):
    file = images / "cells.csv"
    file.write_text("path,label\n1,\"['a', 'b']\"\n2,['a']\n")
    assert "looks like several labels (2 such)" in error_of(f"folder:{images}", labels=str(file))


def test_labels_that_are_absent_are_none(images):
    """Open Images notes what people have looked for in vain."""
    head = "ImageID,Source,LabelName,Confidence"
    rows = ["1,verification,cat,1", "1,verification,dog,0", "2,verification,dog,1"]
    rows += ["3,verification,cat,0", "2,verification,cat,1.0", "4,verification,cat,1"]
    file = images / "open.csv"
    file.write_text("\n".join([head, *rows]))
    dataset = open_sets(images, labels=str(file))
    assert sets_of(dataset, images) == {
        "images/1.png": ["cat"],
        "images/2.png": ["cat", "dog"],
        "images/3.png": [],
        "images/4.png": ["cat"],
    }
    assert dataset.reading.notes == ("2 rows whose confidence is 0: labels that an image has not",)
    line = error_of(f"folder:{images}", labels=str(file))
    assert f"{file}:3: a label whose confidence is 0; for several labels an image set" in line
    file.write_text("\n".join([head, *rows, "5,machine,cat,0.7"]))
    line = refusal(images, labels=str(file))
    assert f"{file}:8: a label whose confidence is 0.7; leave out the rows" in line


def test_sources_of_one_label_refuse_the_field(images):
    assert "config.data.source=digits has one label an image" in error_of(
        "digits", multi_label=True
    )
    assert "name a table with --config.data.labels=FILE" in refusal(images)
    (images / "a.csv").write_text("path,label\n1,a\n2,b")
    line = error_of(f"folder:{images}", labels=f"{images}/a.csv", label_separator="|")
    assert "an image has one label; set --config.data.multi_label=True" in line


def test_old_rules_know_no_tables(images):
    (images / "a.csv").write_text("path,label\n1,a\n2,b")
    assert "config.data.rules=1 knows class folders only" in refusal(
        images, labels=f"{images}/a.csv", rules=1
    )

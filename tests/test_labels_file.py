"""Check labels and lists of classes from files, and what is refused in them."""

import json

import numpy as np
import pytest

from deit_jax.data.classes import align, imagenet_list, read_classes
from deit_jax.errors import UserError
from tests.test_sources import error_of, names, open_data

ROWS = [("images/1.png", "cat"), ("images/2.png", "dog"), ("images/3.png", "cat")]
ROWS += [("images/4.png", "dog"), ("images/5.png", "eel 10"), ("images/6.png", "eel 9")]
CLASSES = ["cat", "dog", "eel 9", "eel 10"]


def table(rows, head="path,label"):
    return "\n".join([head, *(",".join(row) for row in rows)])


FORMS = {
    "a.csv": table(ROWS),
    "b.csv": table([(label, path) for path, label in ROWS], "Category,File_Name"),
    "c.csv": table(ROWS[1:], ",".join(ROWS[0])),  # no head
    "d.tsv": table(ROWS, "image,class").replace(",", "\t"),
    "e.csv": table([(p[7:-4], label) for p, label in ROWS], "id,breed"),  # as Kaggle's
    "f.json": json.dumps(dict(ROWS)),
    "g.json": json.dumps([{"file_name": path, "label": label} for path, label in ROWS]),
    "h.json": json.dumps({"labels": [[path, CLASSES.index(label)] for path, label in ROWS]}),
    "i.txt": "\n".join(f"{path} {CLASSES.index(label)}" for path, label in ROWS),
    "j.txt": "\n".join(f"{path},{label}" for path, label in ROWS),
    "k.csv": "\ufeff" + table(ROWS) + "\n",
    "l.csv": "\ufeff" + table(ROWS, "file,label").replace(",", ";"),  # as Excel in Europe
    "m.csv": table([(p[7:-4], label) for p, label in ROWS], "id_code,diagnosis"),
    "n.csv": table(ROWS, "Image Name,dx"),
}


@pytest.fixture
def images(folder):
    return folder(*(f"images/{i}.png" for i in range(1, 8)))


def answers(dataset, root):
    found = {}
    for part in (dataset.train, dataset.eval):
        for i, name in enumerate(names(part, root)):
            assert part[i]["label"] == part.labels[i]
            found[name] = dataset.classes[part.labels[i]]
    return found


def test_a_table_may_lie_beside_its_images(folder):
    root = folder(*(f"{part}/{i}.png" for part in ("train", "val") for i in range(4)))
    for part, labels in (("train", "aabb"), ("val", "abab")):
        rows = [(f"{i}.png", label) for i, label in enumerate(labels)]
        (root / part / f"{part}.csv").write_text(table(rows))
    files = f"{root}/train/train.csv,{root}/val/val.csv"
    dataset = open_data(f"folder:{root}", labels=files)
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert dataset.eval.labels.tolist() == [0, 1, 0, 1]
    (root / "all.csv").write_text(table([("1.png", "a"), ("2.png", "b")]))
    line = error_of(f"folder:{root}", labels=f"{root}/all.csv")
    assert line.endswith("1.png could be any of train/1.png, val/1.png; write its folder too")


def test_an_unknown_head_is_told_how_to_name_its_columns(images):
    remedy = "--config.data.image_column=NAME and --config.data.label_column=NAME"
    for head, rows in (("photo,what", ROWS), ("photo,what,age", [(*row, "7") for row in ROWS])):
        (images / "x.csv").write_text(table(rows, head))
        assert remedy in error_of(f"folder:{images}", labels=f"{images}/x.csv")


@pytest.mark.parametrize("name", FORMS)
def test_labels_in_any_usual_form(images, tmp_path_factory, name):
    file = tmp_path_factory.mktemp("labels") / name
    file.write_text(FORMS[name])
    (file.parent / "classes.txt").write_text("\n".join(CLASSES))
    numbers = name in ("h.json", "i.txt")
    given = {"classes": str(file.parent / "classes.txt")} if numbers else {}
    line = error_of(f"folder:{images}", labels=str(file), **given)
    assert "6.png: the only image of its class" in line or "5.png: the only" in line
    dataset = open_data(f"folder:{images}", labels=str(file), min_images=2, **given)
    assert dataset.classes == CLASSES[:2]
    assert answers(dataset, images) == dict(ROWS[:4])
    assert dataset.reading.left_out["images that data.labels does not name"] == 1


def test_splits_come_from_a_column_from_file_names_or_from_folders(folder):
    root = folder(*(f"{s}/{i}.png" for s in ("Train", "val") for i in range(4)))
    rows = [(f"{s}/{i}.png", "ab"[i % 2]) for s in ("Train", "val") for i in range(4)]
    (root / "by_folder.csv").write_text(table(rows))
    (root / "my_train.csv").write_text(table(rows[:4]))
    (root / "my_valid.csv").write_text(table(rows[4:]))
    split = [(*row, "dev" if row[0].startswith("val") else "training") for row in rows]
    (root / "column.csv").write_text(table(split, "path,label,Split"))
    for labels in ("by_folder.csv", "column.csv", "my_train.csv,my_valid.csv"):
        files = ",".join(str(root / name) for name in labels.split(","))
        dataset = open_data(f"folder:{root}", labels=files)
        assert names(dataset.train, root) == [f"Train/{i}.png" for i in range(4)]
        assert names(dataset.eval, root) == [f"val/{i}.png" for i in range(4)]
        assert dataset.eval.labels.tolist() == [0, 1, 0, 1]
        line = error_of(f"folder:{root}", labels=files, eval_split="test")
        assert "config.data.eval_split=test: data.labels has no such split; there are " in line


MISTAKES = {
    "missing": (
        table([*ROWS, ("images/9.png", "cat"), ("x.png", "cat")]),
        "2 of 8 images are not in .*, the first is images/9.png .*:8",
    ),
    "two": (
        "path,label,class\nimages/1.png,a,b\n",
        "label, class could each be the label; choose with --config.data.label_column=NAME",
    ),
    "none": ("path,size\nimages/1.png,3\n", "no column of labels; choose with "),
    "twice": (
        table([*ROWS, ("images/1.png", "dog")]),
        "images/1.png is dog here and cat before",
    ),
    "empty": (table([*ROWS, ("images/7.png", "")]), ":8: no label \\(1 such"),
    "short": ("path,label\nimages/1.png\n", "line 2 has 1 cells"),
    "nothing": ("path,label\n", "no images in it"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_in_a_table_is_one_line(images, name):
    text, message = MISTAKES[name]
    (images / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        open_data(f"folder:{images}", labels=str(images / "labels.csv"))


def test_a_column_is_chosen_by_its_name(images):
    rows = [(p, "x", c) for p, c in ROWS[:4]]
    (images / "l.csv").write_text(table(rows, "image,class,what"))
    fields = {"labels": str(images / "l.csv"), "eval_fraction": 0.5}
    dataset = open_data(f"folder:{images}", label_column="what", **fields)
    assert answers(dataset, images) == dict(ROWS[:4])
    line = error_of(f"folder:{images}", label_column="wot", **fields)
    assert "no column of labels called wot" in line
    assert "\n" not in error_of(f"folder:{images}", labels="/none.csv")


def test_labels_out_of_range_and_unknown_classes_are_counted(images):
    (images / "c.json").write_text(json.dumps({"0": "cat", "1": "dog"}))
    (images / "l.txt").write_text("images/1.png 0\nimages/2.png 2\nimages/3.png 7\n")
    fields = {"labels": str(images / "l.txt"), "classes": str(images / "c.json")}
    line = error_of(f"folder:{images}", **fields)
    assert "l.txt:2: label 2 of images/2.png is out of range, there are 2 classes (2 such" in line
    (images / "l.txt").write_text("images/1.png cat\nimages/2.png ape\n")
    assert "class 'ape' of images/2.png is none of config.data.classes" in error_of(
        f"folder:{images}", **fields
    )


CLASS_FILES = {
    "a.txt": "cat\ndog\neel\n\n",
    "b.json": '["cat", "dog", "eel"]',
    "c.json": '{"1": "dog", "0": "cat", "2": "eel"}',
    "d.json": '{"0": ["n01", "x"], "1": ["n02", "y"], "2": ["n03", "z"]}',
    "e.json": '{"eel": 2, "cat": 0, "dog": 1}',
    "f.csv": "name,number\ndog,1\ncat,0\neel,2\n",
    "g.csv": "0,cat\n2,eel\n1,dog\n",
    "h.txt": "n01440764 tench, Tinca tinca\nn01443537 goldfish\n",
}


@pytest.mark.parametrize("name", CLASS_FILES)
def test_lists_of_classes_in_any_usual_form(tmp_path, name):
    (tmp_path / name).write_text(CLASS_FILES[name])
    expected = {
        "d.json": ["n01", "n02", "n03"],
        "h.txt": ["n01440764", "n01443537"],
    }.get(name, ["cat", "dog", "eel"])
    assert read_classes(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    "text", ['{"0": "cat", "2": "dog"}', "3", '["cat", "cat"]', '[["cat"], [1]]', '["cat"]', "{"]
)
def test_what_is_no_list_of_classes_is_one_line(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=r"config.data.classes=.*c.json: ") as error:
        read_classes(str(tmp_path / "c.json"))
    assert "\n" not in str(error.value)


def test_a_list_of_classes_numbers_the_folders(folder):
    root = folder(*(f"{s}/{c}/{i}.png" for s in ("train", "val") for c in "ab" for i in range(2)))
    (root / "c.txt").write_text("b\nz\na\n")
    dataset = open_data(f"folder:{root}", classes=str(root / "c.txt"))
    assert dataset.classes == ["b", "z", "a"]
    assert dataset.train.labels.tolist() == [2, 2, 0, 0]
    folder("train/x/1.png", "train/y/1.png")
    line = error_of(f"folder:{root}", classes=str(root / "c.txt"))
    assert "train/x: no class of this name in config.data.classes=" in line
    assert "(2 such folders)" in line


def test_imagenets_flat_validation_images_get_their_published_labels(folder):
    """TFDS's list: the first images are of classes 65, 970 and 230 (val.txt of caffe)."""
    wnids = imagenet_list("labels")
    assert (len(wnids), wnids[0], wnids[-1]) == (1000, "n01440764", "n15075141")
    truth = imagenet_list("validation_labels")
    assert [wnids.index(w) for w in truth[:5]] == [65, 970, 230, 809, 516]
    root = folder(
        *(f"train/{w}/{w}_1.JPEG" for w in ("n01751748", "n09193705", "n01440764")),
        *(f"val/ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3)),
    )
    dataset = open_data(f"folder:{root}")
    found = {
        n[-8:-5]: dataset.classes[y]
        for n, y in zip(names(dataset.eval, root), dataset.eval.labels, strict=True)
    }
    assert found == {"001": "n01751748", "002": "n09193705"}
    assert dataset.reading.left_out == {"validation images of classes that are not trained": 1}


def test_the_same_names_in_another_order_are_mapped():
    have, want = ["cat", "dog", "Sea_Eel"], ["sea eel", "cat", "dog"]
    order, note = align(have, want, "the teacher", "folder:x")
    assert order.tolist() == [2, 0, 1]
    assert "cat, dog, Sea_Eel" in note
    assert "sea eel, cat, dog" in note
    logits = np.array([10.0, 20.0, 30.0])  # of cat, dog, eel
    assert logits[order].tolist() == [30.0, 10.0, 20.0]
    assert align(want, want, "", "") == (None, "")


@pytest.mark.parametrize("names", [["class 0", "class 1"], ["0", "1"], ["LABEL_0", "LABEL_1"]])
def test_names_of_which_one_side_knows_none_are_not_compared(names):
    for have, want in ((names, ["cat", "dog"]), (["cat", "dog"], names)):
        assert align(have, want, "a", "b") == (None, "")
    with pytest.raises(UserError, match="a knows 2 classes, b has 3"):
        align(names, ["x", "y", "z"], "a", "b")


def test_names_that_differ_are_told_or_refused():
    with pytest.raises(UserError, match=r"not known there: ape .*cat, dog.* ape, cat") as error:
        align(["cat", "dog"], ["ape", "cat"], "weights", "folder:x")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not known there: eel"):
        align(["cat", "dog"], ["cat", "dog", "eel"], "weights", "folder:x")
    with pytest.raises(UserError, match="stand twice cannot be mapped: crane"):
        align(["crane", "crane", "ape"], ["ape", "crane", "crane"], "weights", "folder:x")
    order, note = align(["tench", "goldfish"], ["n01440764", "n01443537"], "weights", "imagenet")
    assert order is None
    assert "other names of classes, taken in their order: from 0 on tench, goldfish" in note

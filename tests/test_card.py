"""Check the data card: counts and twins that were put there, and that no others are found."""

import io
import itertools
import json
import shutil

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage import data as photographs

from deit_jax import __main__ as program
from deit_jax.configs import quickstart
from deit_jax.data import card
from deit_jax.data.decode import Reading
from deit_jax.data.sources.base import ArraySource, Dataset
from tests.test_sources import open_data

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "cat")


def crops():
    """Return forty different parts of photographs, 96 x 80."""
    found = []
    for name in PHOTOS[:4]:
        image = Image.fromarray(getattr(photographs, name)())
        for i in range(10):
            left, top = 37 * i % (image.width - 160), 53 * i % (image.height - 130)
            found.append(image.crop((left, top, left + 160, top + 130)).resize((96, 80)))
    return found


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """Return a folder of which it is known what is wrong with it."""
    root, images = tmp_path_factory.mktemp("leaky"), crops()
    for number, image in enumerate(images):
        split = "valid" if number % 5 == 4 else "train"
        folder = root / split / ("left" if number % 2 else "right")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.jpg", quality=95)
    train, held = root / "train", root / "valid"
    shutil.copy(train / "left" / "1.jpg", train / "right" / "copy.jpg")  # of another class
    shutil.copy(train / "left" / "3.jpg", held / "left" / "leak.jpg")
    again = Image.open(train / "right" / "2.jpg")
    again.resize((120, 100), Image.Resampling.BICUBIC).save(held / "right" / "again.png")
    Image.new("L", (64, 64), 7).save(train / "left" / "plain.png")
    Image.new("L", (64, 64), 9).save(held / "left" / "plain2.png")
    (train / "left" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (train / "left" / "notes.txt").write_text("")
    return root


def test_what_was_put_there_is_found_and_nothing_else(leaky):
    dataset = open_data(f"folder:{leaky}")
    found = card.make(dataset, f"folder:{leaky}", whole=False)
    assert found["images"] == {"train": 35, "eval": 11}
    assert found["per_class"] == {"train": [18, 17], "eval": [6, 5]}
    assert found["classes"] == ["left", "right"]
    assert found["reading"]["left_out"] == {"files .txt": 1}
    twins = found["twins"]
    assert twins["train"] == {
        "count": 1,
        "shown": [["left/1.jpg", "right/copy.jpg"]],
        "of_other_class": 1,
    }
    assert twins["between"] == {
        "count": 1,
        "shown": [["left/3.jpg", "left/leak.jpg"]],
        "of_other_class": 0,
    }
    assert twins["near"] == {
        "count": 1,
        "shown": [["right/2.jpg", "right/again.png"]],
        "of_other_class": 0,
    }
    assert len(found["unreadable"]) == 1
    assert "left/broken.jpg" in found["unreadable"][0]
    assert found["sizes"]["shorter"] == [64, 80, 100]
    assert found["sizes"]["longer"] == [64, 96, 120]
    assert found["modes"] == {"RGB": 43, "L": 2}
    assert found["formats"] == {"JPEG": 42, "PNG": 3}
    text = card.lines(found)
    assert len(text) == 5
    assert text[0].endswith("35 images to train on (train/), 11 to evaluate on (valid/)")
    assert text[1] == "2 classes: left, right; 17 (right) to 18 (left) images"
    assert text[4].startswith("1 of the 11 images to evaluate on are trained on too, 1 look like")
    json.dumps(found)


def test_a_training_tells_of_equal_images_before_it_begins(leaky):
    found = card.quick(open_data(f"folder:{leaky}"), "x")
    assert found["twins"]["between"]["count"] == 1
    assert found["twins"]["train"]["count"] == 1
    assert "1 of the 11 images to evaluate on are trained on too" in card.lines(found)[-1]


def test_large_sets_are_read_in_part_and_say_so(leaky, monkeypatch):
    monkeypatch.setattr(card, "MANY", 10)
    monkeypatch.setattr(card, "SAMPLE", 5)
    dataset = open_data(f"folder:{leaky}")
    found = card.make(dataset, "x", whole=False)
    assert (found["read"], found["twins"]) == ({"train": 5, "eval": 5}, None)
    assert "`deit inspect --check` does" in card.lines(found)[-1]
    assert card.make(dataset, "x", whole=True)["read"] == {"train": 35, "eval": 11}
    assert "twins" not in card.quick(dataset, "x")


def test_looks_survive_scaling_and_compression_and_tell_photographs_apart():
    """Every crop is found again among all others after three changes, and only it."""
    images = crops()
    labels = np.zeros(len(images), np.int32)
    for change in ("smaller", "jpeg", "brighter"):
        changed = []
        for image in images:
            if change == "smaller":
                image = image.resize((60, 50), Image.Resampling.LANCZOS)
            elif change == "jpeg":
                file = io.BytesIO()
                image.save(file, "jpeg", quality=40)
                image = Image.open(file)
            else:
                image = Image.fromarray((np.asarray(image) * 0.8 + 40).astype(np.uint8))
            changed.append(np.asarray(image))
        ours = ArraySource("ours", np.stack([np.asarray(i) for i in images]), labels)
        dataset = Dataset(ours, ArraySource("theirs", np.stack(changed), labels), ["x"])
        near = card.make(dataset, "x", whole=True)["twins"]["near"]["shown"]
        pairs = card.near_twins(card.survey(ours, ""), card.survey(dataset.eval, ""), dataset)
        assert len(pairs) >= 34, change  # of 40; what is nearly plain may be missed
        assert all(a == b for a, b in pairs), change
        assert near[0] == ["ours example 0", "theirs example 0"]


def test_few_images_and_classes_without_are_said():
    found = {
        "source": "x",
        "reading": {"train": "", "eval": "", "left_out": {}, "notes": []},
        "images": {"train": 12, "eval": 4},
        "classes": ["a", "b"],
        "per_class": {"train": [9, 3]},
    }
    assert "2 classes: a, b; 3 (b) to 9 (a) images; 2 classes have fewer than 10" in card.lines(
        found
    )


def test_classes_that_differ_in_capitals_are_told():
    labels = np.repeat(np.arange(3, dtype=np.int32), 4)
    source = ArraySource("x", np.zeros((12, 8, 8, 3), np.uint8), labels)
    found = card.facts(Dataset(source, source, ["Big", "other", "big"]), "x")
    assert any("; Big and big differ in capitals alone" in line for line in card.lines(found))


def test_images_are_seen_as_a_run_reads_them(tmp_path):
    """Turned by EXIF two files are the same picture; of 12 bits, one of 16 cannot be read."""
    photo, turned = Image.fromarray(photographs.chelsea()), Image.Exif()
    turned[0x0112] = 6
    for part, number in itertools.product(("train", "val"), range(2)):
        folder = tmp_path / part / str(number)
        folder.mkdir(parents=True)
        image = photo.rotate(37 * number + 5) if part == "train" else photo.rotate(90 * number)
        image.save(folder / f"{part}{number}.jpg")
    photo.save(tmp_path / "train" / "0" / "upright.jpg")
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "val" / "0" / "t.jpg", exif=turned)
    deep = photographs.camera().astype(np.uint16) << 8
    Image.fromarray(deep).save(tmp_path / "train" / "1" / "deep.png")
    dataset = open_data(f"folder:{tmp_path}")
    plain = card.make(dataset, "x", whole=True)
    assert plain["unreadable"] == []
    found = card.make(dataset, "x", whole=True, reading=Reading(exif=True, bits=12))
    assert len(found["unreadable"]) == 1
    assert "deep.png" in found["unreadable"][0]
    assert "config.data.bits=12" in found["unreadable"][0]
    assert ["0/upright.jpg", "0/t.jpg"] in found["twins"]["near"]["shown"]
    assert ["0/upright.jpg", "0/t.jpg"] not in plain["twins"]["near"]["shown"]


def test_pixels_that_pillow_does_not_know_are_told_of(tmp_path):
    for number in range(8):
        folder = tmp_path / str(number % 2)
        folder.mkdir(exist_ok=True)
        tifffile.imwrite(folder / f"{number}.tif", np.full((9, 7), number / 10))
    found = card.make(open_data(f"folder:{tmp_path}"), "x", whole=True)
    assert found["unreadable"] == []
    assert (found["modes"], found["formats"]) == ({"floats": 8}, {"TIFF": 8})
    assert (found["sizes"]["shorter"], found["sizes"]["longer"]) == ([7, 7, 7], [9, 9, 9])


def test_files_without_an_image_are_no_twins(tmp_path):
    for part, number in itertools.product(("train", "val"), range(4)):
        folder = tmp_path / part / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 10 * number + len(part), np.uint8)).save(
            folder / f"{number}.png"
        )
        (folder / "empty.png").write_bytes(b"")
    dataset = open_data(f"folder:{tmp_path}")
    found = card.quick(dataset, "x")
    assert found["twins"]["between"]["count"] == found["twins"]["train"]["count"] == 0
    assert card.lines(found)[-1] == "no two files are the same"


def test_the_command_prints_and_writes_it(leaky, tmp_path, capsys):
    words = ["inspect", f"--config={quickstart.__file__}", f"--config.data.source=folder:{leaky}"]
    assert program.main([*words, f"--card={tmp_path / 'card.json'}"]) == 0
    said = capsys.readouterr().out
    assert "1 of the 11 images to evaluate on are trained on too" in said
    assert "1 images cannot be read, the first: " in said
    found = json.loads((tmp_path / "card.json").read_text())
    assert found["twins"]["between"]["shown"] == [["left/3.jpg", "left/leak.jpg"]]
    assert program.main([*words, "--json", "--check"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert program.main([*words, "--card=/dev/null/card.json"]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert program.main(["inspect"]) == 2
    assert "give either --config=FILE or --workdir=DIR" in capsys.readouterr().err

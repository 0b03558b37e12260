"""Broken files in the evaluation data: left out and counted, by every command; or named."""

import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps
from skimage import data

from deit_jax import __main__ as program
from deit_jax.analysis import figures
from deit_jax.analysis.evaluate import open_evaluation
from deit_jax.data.batches import EvalBatches
from deit_jax.data.sources.folder import FolderSource
from deit_jax.data.view import EvalView
from deit_jax.errors import UserError
from deit_jax.parallel import sharding
from deit_jax.storage import read_json, read_lines
from deit_jax.train import evaluator as evaluator_lib
from deit_jax.train.run import train
from deit_jax.weights.load import open_model
from tests.tiny import make_tiny_config

BROKEN = ("a/4.jpg", "b/1.jpg", "b/3.jpg")  # of twelve
FILL = (124, 116, 104)


def photographs(folder, count, broken=()):
    """Write photographs of many shapes in two classes, each turned by its EXIF."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        left, top = (int(x) for x in rng.integers(200, size=2))
        part = data.chelsea()[top : top + 60, left : left + 50 + 10 * number]
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(part).save(path, exif=exif, quality=95)
        if str(path.relative_to(folder)) in broken:
            path.write_bytes(path.read_bytes()[:700])
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    photographs(folder / "train", 8)
    photographs(folder / "val", 12, BROKEN)
    return folder


def config_of(images):
    c = make_tiny_config()
    c.data.source, c.data.skip_unreadable = f"folder:{images}", True
    c.data.train_split, c.data.eval_split = "train", "val"
    c.data.resize, c.data.exif = "pad", True
    c.distill.kind, c.epochs, c.batch_size, c.train.eval_batch_size = "none", 2.0, 8, 8
    c.augment.repeats, c.model.depth = 1, 1
    return c


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """Train on them to the end, the picture too; return the workdir and what was warned of."""
    workdir, warned = tmp_path_factory.mktemp("runs") / "run", []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("deit_jax").addHandler(handler)
    try:
        train(config_of(images), workdir)
    finally:
        logging.getLogger("deit_jax").removeHandler(handler)
    return workdir, warned


def view(path):
    """Return an image as the run evaluates it, with Pillow alone."""
    image = ImageOps.exif_transpose(Image.open(path).convert("RGB"))
    image = ImageOps.contain(image, (16, 16), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (16, 16), FILL)
    square.paste(image, ((16 - image.width) // 2, (16 - image.height) // 2))
    return np.asarray(square)


@pytest.fixture(scope="module")
def answers(run, images):
    """Return files, labels and the heads' logits of the images that can be read."""
    files = sorted(str(path) for path in (images / "val").rglob("*.jpg"))
    files = [f for f in files if str(Path(f).relative_to(images / "val")) not in BROKEN]
    opened = open_model(run[0])
    pixels = np.stack([view(f) for f in files]) / 255
    inputs = ((pixels - opened.mean) / opened.std).astype(np.float32)
    heads = jax.jit(lambda v, x: opened.model.apply(v, x, train=False))(opened.variables, inputs)
    return files, np.array(["/b/" in f for f in files]).astype(int), heads


def test_results_are_of_the_readable_images(run, answers):
    workdir, warned = run
    _, labels, heads = answers
    results = read_json(workdir / "results.json")
    assert (results["examples"], results["unreadable"]) == (9, 3)
    right = np.mean(np.asarray(heads.cls).argmax(1) == labels)
    assert results["cls"]["top1"] == pytest.approx(100 * right)
    assert results["cls"]["top5"] == 100
    named = [text for text in warned if "left out of the evaluation" in text]
    for name in BROKEN:  # by three evaluations and the picture
        assert sum(f"/val/{name} (example" in text for text in named) == 1
    assert (workdir / "picture.png").stat().st_size > 10_000
    for record in read_lines(workdir / "metrics.jsonl"):
        assert not {"eval/unreadable", "eval/examples"} & record.keys()


def test_eval_says_so(run, capsys):
    workdir, _ = run
    assert program.main(["eval", f"--workdir={workdir}", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said.pop("input")["resize"] == "pad"
    assert said == read_json(workdir / "results.json")
    assert program.main(["eval", f"--workdir={workdir}"]) == 0
    assert "9 examples, besides 3 that cannot be read\n" in capsys.readouterr().out


def test_a_run_is_evaluated_as_it_was_trained_whatever_a_config_says(run, images, caplog):
    workdir, _ = run
    c = config_of(images)
    c.data.resize, c.data.exif = "crop", False
    results = open_evaluation(c, str(workdir)).results()
    assert results["cls"] == read_json(workdir / "results.json")["cls"]
    assert "data.resize=pad, as the run was trained, not crop" in caplog.text
    assert c.data.resize == "crop"


def test_reports_are_of_the_readable_images(run, answers, images):
    workdir, _ = run
    files, labels, heads = answers
    found = figures.analyze([workdir])
    own = found.figures["runs"][0]
    assert not own["notes"]
    seen = own["evaluation"]
    assert (seen["images"], seen["of"], seen["unreadable"]) == (9, 12, 3)
    right = np.mean(np.asarray(heads.cls).argmax(1) == labels)
    assert seen["top1"]["cls"] == pytest.approx(100 * right)
    assert sum(c["examples"] for c in seen["classes"]) == 9
    everything = sorted(str(path) for path in (images / "val").rglob("*.jpg"))
    assert found.pictures[0]
    for number, pixels in found.pictures[0].items():
        assert everything[number] in files
        assert np.array_equal(pixels, view(everything[number]))


def test_the_report_page_is_made(run, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert program.main(["report", f"--workdir={run[0]}", f"--out={out}"]) == 0
    assert "9 of 12 images (3 more cannot be read)" in out.read_text()


def test_predict_shows_the_model_what_it_was_trained_on(run, answers, capsys):
    files, _, heads = answers
    logits = np.asarray(heads.fused())
    assert program.main(["predict", f"--weights={run[0]}", "--json", *files]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    powers = np.exp(logits - logits.max(1, keepdims=True))
    for result, row in zip(results, powers / powers.sum(1, keepdims=True), strict=True):
        assert result["predictions"][0]["probability"] == pytest.approx(row.max(), abs=2e-3)


def test_rows_of_broken_images_are_black_and_not_valid(images, caplog):
    files = sorted(str(path) for path in (images / "val").rglob("*.jpg"))
    source = FolderSource(images / "val", files, np.arange(12))
    good = [all(not f.endswith(name) for name in BROKEN) for f in files]
    batches = EvalBatches(source, 16, EvalView(16, 1.0), range(16), True)
    with caplog.at_level(logging.WARNING, logger="deit_jax"):
        batch, again = batches(0), batches(0)
    assert batch["valid"].tolist() == [*good, *(4 * [False])]
    assert not batch["image"][~batch["valid"]].any()
    assert batch["label"].tolist() == [i * g for i, g in enumerate(good)] + 4 * [0]
    assert all(np.array_equal(batch[k], again[k]) for k in batch)
    assert len(batches.unreadable) == len(caplog.records) == 3
    for rows in (range(8), range(8, 16)):  # two processes: each knows of its own
        part = EvalBatches(source, 16, EvalView(16, 1.0), rows, True)
        assert np.array_equal(part(0)["valid"], batch["valid"][rows])
        assert len(part.unreadable) == sum(not good[row] for row in rows if row < 12)


def test_without_leave_a_broken_image_is_named_with_the_field(images):
    source = FolderSource(images, [str(images / "val" / BROKEN[0])], np.zeros(1, int))
    batches = EvalBatches(source, 4, EvalView(16, 1.0), range(4))
    with pytest.raises(UserError, match=r"a/4\.jpg \(example 0\): not a readable") as error:
        batches(0)
    assert str(error.value).endswith("; --config.data.skip_unreadable=True leaves such images out")
    assert "\n" not in str(error.value)


def test_nothing_readable_is_no_accuracy(images, run):
    c = config_of(images)
    opened, mesh = open_model(run[0]), sharding.make_mesh(c.mesh)
    files = [str(images / "val" / name) for name in BROKEN]
    source = FolderSource(images, files, np.zeros(3, int))
    evaluator = evaluator_lib.Evaluator(source, c.data, 8, 16, mesh)
    with pytest.raises(UserError, match=r"config\.data\.source=.*: none of its 3 images"):
        evaluator.model(opened.model, opened.variables)


def test_readable_data_says_nothing_of_unreadable_images(run, answers, images):
    c, files = config_of(images), answers[0]
    opened, mesh = open_model(run[0]), sharding.make_mesh(c.mesh)
    evaluator = evaluator_lib.Evaluator(
        FolderSource(images, files, answers[1]), c.data, 8, 16, mesh
    )
    evaluator.model(opened.model, opened.variables)
    assert evaluator.examples() == {"examples": 9}

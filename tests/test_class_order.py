"""Check that a run, its weights and its data agree on which class is which, and on the images."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from deit_jax.analysis.evaluate import open_evaluation
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.run import train
from deit_jax.train.teacher_spec import teacher_spec
from deit_jax.weights import convert
from deit_jax.weights.fit import in_order
from deit_jax.weights.load import open_model
from deit_jax.workdir import held_out
from tests.tiny import make_tiny_config

NAMES = ("ape", "bee", "cat")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train on folders of three digits; return (config, workdir, folder of the images)."""
    root = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for name, digit in zip(NAMES, (0, 1, 4), strict=True):
        (root / name).mkdir()
        for i, image in enumerate(digits.images[digits.target == digit][:40]):
            Image.fromarray((image * 15).astype(np.uint8)).save(root / name / f"{i}.png")
    config = make_tiny_config()
    config.data.source, config.data.eval_fraction = f"folder:{root}", 0.5
    config.distill.kind, config.epochs = "none", 60.0
    config.augment.repeats, config.optim.lr = 1, 3e-3
    config.augment.auto, config.augment.crop, config.augment.flip_prob = "", "simple", 0.0
    config.augment.color_jitter, config.mixing.prob, config.augment.erase_prob = 0.0, 0.0, 0.0
    config.train.eval_every_epochs = config.train.save_every_epochs = 60.0
    train(config, root.parent / "run")
    return config, root.parent / "run", root


def reversed_names(run):
    config, _, root = run
    path = root.parent / "reversed.txt"
    path.write_text("\n".join(reversed(NAMES)))
    config = config.copy_and_resolve_references()
    config.data.classes = str(path)
    return config


def test_an_evaluation_maps_classes_by_their_names(run, caplog):
    config, workdir, _ = run
    plain = open_evaluation(config, str(workdir)).results()
    assert plain["fused"]["top1"] > 50  # or the order would not matter
    caplog.clear()
    assert open_evaluation(reversed_names(run), str(workdir)).results() == plain
    assert "another order of classes, mapped by their names: from 0 on ape, bee" in caplog.text


def test_a_teacher_answers_in_the_order_of_its_student(run):
    """Also one with batch norm: its logits are those of before, in another order."""
    config, workdir, _ = run
    config = config.copy_and_resolve_references()
    config.distill.kind, config.teacher.weights = "hard", str(workdir)
    spec = teacher_spec(config)
    images = jax.random.normal(jax.random.key(0), (5, 16, 16, 3))
    answers = []
    for classes in (NAMES, NAMES[::-1]):
        teacher, params = load_teacher(spec, str(workdir), list(classes))
        answers.append(np.asarray(teacher.logits(params, images)))
    np.testing.assert_array_equal(answers[0][:, ::-1], answers[1])
    assert np.ptp(answers[0]) > 0
    with pytest.raises(UserError, match=r"the teacher knows 3 classes, .*not known there: dog"):
        load_teacher(spec, str(workdir), ["ape", "bee", "dog"])


@pytest.mark.parametrize("to", ["timm", "huggingface", "deit_jax"])
def test_a_teacher_of_any_format_that_names_its_classes_answers_by_them(to, run, tmp_path):
    config, workdir, _ = run
    config = config.copy_and_resolve_references()
    path = tmp_path / ("w.safetensors" if to == "timm" else "w")
    convert.convert(open_model(workdir), path, to)
    config.distill.kind, config.teacher.weights = "hard", str(path)
    config.teacher.image_size = 16
    spec = teacher_spec(config)
    images = jax.random.normal(jax.random.key(0), (5, 16, 16, 3))
    teacher, params = load_teacher(spec, str(path), list(NAMES[::-1]))
    ours = open_model(workdir)
    expected = jax.jit(ours.model.apply)(ours.variables, images).fused()
    np.testing.assert_allclose(
        np.asarray(teacher.logits(params, images))[:, ::-1], expected, atol=1e-5
    )
    with pytest.raises(UserError, match=r"the teacher knows 3 classes, .*not known there: dog"):
        load_teacher(spec, str(path), ["ape", "bee", "dog"])


def test_a_teacher_that_names_no_classes_is_taken_as_it_comes(run, tmp_path):
    config, workdir, _ = run
    config = config.copy_and_resolve_references()
    path = tmp_path / "w.pth"
    convert.convert(open_model(workdir), path, "deit")
    config.distill.kind, config.teacher.weights = "hard", str(path)
    config.teacher.image_size, config.teacher.model = 16, config.model
    images = jax.random.normal(jax.random.key(0), (5, 16, 16, 3))
    answers = []
    for names in (NAMES, NAMES[::-1]):
        teacher, params = load_teacher(teacher_spec(config), str(path), list(names))
        answers.append(np.asarray(teacher.logits(params, images)))
    np.testing.assert_array_equal(*answers)


def test_every_head_and_the_average_are_put_in_order(run):
    _, workdir, _ = run
    opened = open_model(workdir)
    turned, note = in_order(opened, list(NAMES[::-1]), "the run", "the data")
    assert note
    assert turned.classes == list(NAMES[::-1])
    images = jax.random.normal(jax.random.key(0), (5, 16, 16, 3))
    pairs = (opened.variables, turned.variables), (opened.run.ema, turned.run.ema)
    for before, after in pairs:
        variables = jax.device_put((before, after))
        old, new = (opened.model.apply(v, images, train=False) for v in variables)
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            np.testing.assert_array_equal(np.asarray(a)[:, ::-1], np.asarray(b))


def test_a_run_that_goes_on_has_its_classes_or_says_so(run):
    config, workdir, root = run
    with pytest.raises(UserError, match=r"data.classes: .*reversed.txt"):
        train(reversed_names(run), workdir)
    with pytest.raises(UserError, match=r"the classes in another order .* cat, bee, ape instead"):
        train(reversed_names(run), workdir, allowed=["data.classes"])
    (root / "cat").rename(root / "dog")
    try:
        with pytest.raises(UserError, match="not known there: dog"):
            train(config, workdir)
    finally:
        (root / "dog").rename(root / "cat")


def test_a_run_notes_what_it_held_out_and_tells_of_other_data(run, caplog):
    config, workdir, root = run
    noted = json.loads((workdir / "data.json").read_text())
    assert (noted["train"]["images"], noted["eval"]["images"], noted["held_out"]) == (60, 60, True)
    names = (workdir / "held_out.txt").read_text().splitlines()
    dataset = open_dataset(config.data)
    assert names == [dataset.eval.key(i) for i in range(60)]
    assert held_out.changes(workdir, dataset) == []
    for i in range(2):
        Image.new("L", (8, 8)).save(root / "ape" / f"new{i}.png")
    try:
        caplog.clear()
        open_evaluation(config, str(workdir)).results()
        assert "other training images than this run began with: 60 then, 61 now" in caplog.text
        assert "other evaluation images than this run began with: 60 then, 61 now" in caplog.text
        assert " were not held out: they are new, or trained on" in caplog.text
    finally:
        for i in range(2):
            (root / "ape" / f"new{i}.png").unlink()

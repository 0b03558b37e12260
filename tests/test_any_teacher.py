"""Teachers that are not ours, and several: what the step learns of them, on any mesh."""

import dataclasses
import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from deit_jax.analysis import evaluate
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.parallel import sharding
from deit_jax.step.committee import Committee
from deit_jax.step.teacher import Foreign, FrozenTeacher
from deit_jax.storage import read_json, read_lines
from deit_jax.teachers.folder import write_teacher
from deit_jax.teachers.open import open_teacher
from deit_jax.teachers.teacher import Teacher
from deit_jax.train import experiment as experiment_lib
from deit_jax.train.experiment import prepare
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.run import train
from deit_jax.train.teacher_spec import teacher_config
from tests.tiny import train_without_picture

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
RNG = np.random.default_rng(0)
DIGITS = ("nought", *["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
MORE = ("ten", *reversed(DIGITS), "eleven", "twelve")


def make(name="linear", classes=DIGITS, **conventions):
    """Return a teacher that is a product with all pixels of 8 x 8."""
    matrix = np.random.default_rng(len(classes)).normal(size=(8 * 8 * 3, len(classes)))

    def apply(params, images):
        return images.reshape(images.shape[0], -1) @ params["matrix"] + params["bias"]

    params = {"matrix": jnp.array(matrix, jnp.float32), "bias": jnp.arange(len(classes)) / 7.0}
    known = {"mean": HALF, "std": (0.25, 0.3, 0.35), "image_size": 8, "name": name}
    made = {"apply": apply, "params": params, "classes": classes, **known}
    return Teacher(**(made | conventions))


def linear():
    return make()


def knows_more():
    return make(classes=MORE)


def other_digits():
    return make(classes=(*DIGITS[:7], "x", "y", "z"))


def named_otherwise():
    return make(classes=tuple(f"n{i:04}x" for i in range(12)), also_called=(*DIGITS, "a", "b"))


def answers_several():
    return make(multi_label=True)


def counts_wrong():
    return make(apply=lambda params, images: {"logits": jnp.zeros((images.shape[0], 3))})


def is_grey():
    def apply(params, images):
        return jnp.arange(10.0) + images.mean((1, 2, 3))[:, None]

    return make(apply=apply, channels=1, mean=(0.5,), std=(0.5,))


@pytest.fixture
def config(tiny_config, monkeypatch):
    """The digits by names of more than their numbers, and a teacher of them."""

    def named(data):
        return dataclasses.replace(open_dataset(data), classes=list(DIGITS))

    monkeypatch.setattr(experiment_lib, "open_dataset", named)
    monkeypatch.setattr(evaluate, "open_dataset", named)
    c = tiny_config
    c.epochs, c.teacher.epochs = 0.4, 0.0
    c.teacher.weights = f"python:{__name__}:linear"
    return c


def load_whole(config, devices=None):
    experiment, dataset = prepare(config, devices=devices)
    teacher = load_teacher(experiment.teacher, config.teacher.weights, dataset.classes)
    return experiment, dataset, *teacher


def images_of(experiment, dataset):
    """Return a batch as the student is given it: normalised by MEAN and STD, 16 px."""
    pixels = experiment.batches(dataset)(0)["image"]
    return jnp.array((pixels / np.float32(255) - np.float32(MEAN)) / np.float32(STD))


def formula(images, classes):
    """Return what `make` says, in numpy but for the resampling."""
    pixels = np.asarray(images) * np.float32(STD) + np.float32(MEAN)
    own = (pixels - np.float32(HALF)) / np.float32((0.25, 0.3, 0.35))
    small = np.asarray(jax.image.resize(own, (len(own), 8, 8, 3), "cubic"))
    matrix = np.random.default_rng(len(classes)).normal(size=(192, len(classes)))
    return small.reshape(len(small), -1) @ matrix + np.arange(len(classes)) / 7.0


def test_a_function_teaches_in_its_own_normalisation_and_resolution(config):
    experiment, dataset, teacher, params = load_whole(config)
    images = images_of(experiment, dataset)
    expected = formula(images, DIGITS)
    np.testing.assert_allclose(teacher.logits(params, images), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", ["knows_more", "named_otherwise"])
def test_of_a_teacher_that_knows_more_the_classes_asked_for_are_taken(config, name):
    config.teacher.weights = f"python:{__name__}:{name}"
    experiment, dataset, teacher, params = load_whole(config)
    images = images_of(experiment, dataset)
    classes = MORE if name == "knows_more" else (*DIGITS, "a", "b")
    logits = formula(images, classes)
    unasked = [i for i, c in enumerate(classes) if c not in DIGITS]
    masked = logits.copy()
    masked[:, unasked] = -np.inf
    ours = np.asarray(teacher.logits(params, images))
    asked = [classes.index(c) for c in dataset.classes]
    np.testing.assert_allclose(softmax(ours, axis=1), softmax(masked, axis=1)[:, asked], atol=1e-2)
    np.testing.assert_array_equal(np.argmax(ours, 1), [asked.index(i) for i in masked.argmax(1)])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("other_digits", r"knows 10 classes.*not known there: seven, eight, nine"),
        ("answers_several", "answers any number of classes an image"),
        ("counts_wrong", "returns 3 logits, and `classes` has 10 names"),
        ("is_grey", r"takes images of 1 channels, and config.data.channels=3"),
        ("missing", "has no missing"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_one_line(config, name, reason):
    config.teacher.weights = f"python:{__name__}:{name}"
    with pytest.raises(UserError, match=reason) as refused:
        load_whole(config)
    assert "\n" not in str(refused.value)
    assert f"config.teacher.weights=python:{__name__}:{name}" in str(refused.value)


def test_a_size_that_it_does_not_take_is_refused(config):
    config.teacher.image_size = 16
    with pytest.raises(UserError, match=r"teacher.image_size=16: .* takes 8 px"):
        load_whole(config)


def answering(logits, size=None):
    """Return a teacher that answers with its parameters plus the mean of the images it is shown."""

    def apply(params, images):
        assert size in (None, images.shape[1])
        return params + images.mean((1, 2, 3))[:, None]

    return FrozenTeacher(Foreign(apply, "known"), HALF, HALF, MEAN, STD, size), jnp.array(logits)


def test_several_teachers_average_or_vote():
    images = jnp.array(RNG.normal(size=(6, 4, 4, 3)), jnp.float32)
    each = RNG.normal(0, 3, (3, 6, 5)).astype(np.float32)
    each[:, 0] = np.eye(5)[[0, 1, 2]] * (3.0, 2.0, 4.0, 0, 0)  # all differ: by shares
    shares = (0.4, 0.35, 0.25)
    members, params = zip(
        *(answering(x, s) for x, s in zip(each, (None, 8, 2), strict=True)), strict=True
    )
    shown = [np.asarray(m.shown(images)).mean((1, 2, 3))[:, None] for m in members]
    own = [x + s for x, s in zip(each, shown, strict=True)]
    mean = sum(s * x for s, x in zip(shares, own, strict=True))
    averaged = Committee(members, shares).logits(params, images)
    np.testing.assert_allclose(averaged, mean, rtol=1e-4, atol=1e-4)
    votes = sum(s * np.eye(5)[x.argmax(1)] for s, x in zip(shares, own, strict=True))
    voted = np.asarray(Committee(members, shares, votes=True).logits(params, images))
    np.testing.assert_array_equal(voted.argmax(1), votes.argmax(1))
    assert voted[0].argmax() == 0  # the teacher that counts most


def test_a_tie_of_votes_goes_to_the_higher_probability():
    images = jnp.zeros((1, 2, 2, 3))
    members, params = zip(*(answering([x]) for x in ([5.0, 0, 0], [0, 9.0, 0])), strict=True)
    voted = Committee(members, (0.5, 0.5), votes=True).logits(params, images)
    assert np.argmax(voted) == 1


def one_step(config, devices, **changes):
    """Return a step's metrics and the tape's labels of it on so many devices."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    experiment, dataset, teacher, params = load_whole(config, jax.devices()[:devices])
    state, params = experiment.new_state(), experiment.place_teacher(teacher, params)
    batch = experiment.on_devices(experiment.batches(dataset)(0))
    return jax.device_get(experiment.jit_step(teacher)(state, params, batch))


@pytest.mark.eight_devices
def test_an_exported_program_takes_the_same_step_on_eight_devices(config, tmp_path):
    """Beside one of ours, so that both kinds are in one committee; on any mesh, in parts."""
    write_teacher(make(), tmp_path / "folder")
    write_teacher(knows_more(), tmp_path / "more")
    config.teacher.weights = f"{tmp_path}/folder,{tmp_path}/more"
    config.teacher.shares = "2,1"
    config.distill.kind, config.distill.tau = "soft", 2.0
    state, metrics = one_step(config, 1)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    for changes in ({"train.micro_batch": 2}, {"mesh.fsdp": 4, "mesh.tensor": 2}):
        other, others = one_step(config, 8, **changes)
        jax.tree.map(close, state, other)
        assert metrics["loss_teacher"] == pytest.approx(others["loss_teacher"], rel=1e-4)


@pytest.mark.slow
def test_a_run_of_several_teachers_is_recorded_replayed_and_evaluated(
    config, tmp_path, monkeypatch
):
    """One is trained before, ours. On one device, where sums have one order."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda n, **_: make_mesh(n, jax.devices()[:1]))
    train_without_picture(teacher_config(first_teacher(config)), tmp_path / "ours")
    write_teacher(make(), tmp_path / "folder")
    config.teacher.weights = f"{tmp_path}/ours,{tmp_path}/folder"
    config.teacher.combine, config.teacher.tape = "votes", "record"
    results = train_without_picture(config, tmp_path / "run")
    assert 0 <= results["teacher"]["top1"] <= 100
    evaluation = evaluate.open_evaluation(config, str(tmp_path / "run"))
    assert evaluation.results()["teacher"] == results["teacher"]
    said = read_json(tmp_path / "run/tape/tape.json")["fingerprint"]
    assert said["teacher.shares"] == [0.5, 0.5]
    assert said["teacher.votes"] is True
    assert [name.split()[0] for name in said["teacher.model"]] == ["RegNetY", "linear"]

    config.teacher.tape, config.teacher.tape_path = "replay", str(tmp_path / "run/tape")
    train_without_picture(config, tmp_path / "again")
    first, again = (read_lines(tmp_path / n / "metrics.jsonl") for n in ("run", "again"))
    losses = [[r["loss"] for r in lines if "loss" in r] for lines in (first, again)]
    assert losses[0] == losses[1]
    config.teacher.shares = "1,3"
    with pytest.raises(UserError, match=r"teacher.shares: \[0.5, 0.5\] there, \[0.25, 0.75\] here"):
        train(config, tmp_path / "third")


def first_teacher(config):
    c = config.copy_and_resolve_references()
    c.teacher.weights, c.teacher.epochs = "", 0.4
    return c


def test_the_function_in_the_docs_teaches_and_becomes_a_folder(tiny_config, tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs/teachers.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "my_teachers.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    tiny_config.teacher.weights = asked = "python:my_teachers:brightness"
    tiny_config.distill.kind, tiny_config.teacher.epochs = "hard+feature", 0.0
    _, _, teacher, params = load_whole(tiny_config)
    images = jnp.array(RNG.normal(size=(3, 16, 16, 3)), jnp.float32)
    said = teacher.outputs(params, images, features=True)
    shown = np.asarray(teacher.shown(images)).reshape(3, -1)
    features = np.tanh(shown @ np.asarray(params["first"]))
    np.testing.assert_allclose(said.features, features, rtol=1e-3, atol=1e-4)
    logits = features @ np.asarray(params["last"])
    np.testing.assert_allclose(said.heads.cls, logits, rtol=1e-3, atol=1e-3)
    write_teacher(open_teacher(asked, "float32"), tmp_path / "folder")
    again = open_teacher(str(tmp_path / "folder"), "float32")
    own = teacher.shown(images)
    np.testing.assert_allclose(again.apply(again.params, own)["logits"], logits, atol=1e-3)
    del sys.modules["my_teachers"]

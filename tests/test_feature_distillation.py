"""Feature distillation: its losses against PyTorch, its runs. test_trajectory.py has timm's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from deit_jax import tape as outside
from deit_jax.analysis.evaluate import open_evaluation
from deit_jax.analysis.features import features
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.models.registry import create_model
from deit_jax.step.distill.feature import FEATURE_LOSSES
from deit_jax.step.state import EXTRAS
from deit_jax.step.teacher import apply_with_features
from deit_jax.step.train_step import model_inputs
from deit_jax.storage import read_json, read_lines
from deit_jax.teachers.teacher import Teacher
from deit_jax.train.experiment import prepare
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.tape import tape
from deit_jax.weights.load import load
from tests.tiny import make_tiny_config, save_weights, train_without_picture

RNG = np.random.default_rng(0)
B, D = 5, 12
STUDENT, TEACHER = RNG.normal(1, 3, (2, B, D)).astype(np.float32)


def torch_losses(torch):
    functional = torch.nn.functional
    return {
        "cosine": lambda s, t: functional.cosine_embedding_loss(s, t, torch.ones(len(s))),
        "smooth_l1": lambda s, t: functional.smooth_l1_loss(
            s, functional.layer_norm(t, t.shape[1:], eps=1e-6)
        ),
        "mse": functional.mse_loss,
    }


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_losses_and_their_gradients_are_pytorchs(torch, kind):
    student = torch.tensor(STUDENT, requires_grad=True)
    expected = torch_losses(torch)[kind](student, torch.tensor(TEACHER))
    expected.backward()
    ours, grad = jax.value_and_grad(FEATURE_LOSSES[kind])(jnp.array(STUDENT), jnp.array(TEACHER))
    np.testing.assert_allclose(ours, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(grad, student.grad.numpy(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("distilled", [True, False])
def test_a_students_features_are_those_that_deit_embed_gives(distilled):
    model = create_model("deit_tiny_patch16_224", 3, image_size=16, patch_size=4, width=24, depth=2)
    model = model.clone(distilled=distilled)
    images = jnp.array(RNG.normal(size=(2, 16, 16, 3)).astype(np.float32))
    variables = model.init(jax.random.key(0), images)
    tokens = np.asarray(features(model, variables["params"], images, layers=-1))
    prefix = 1 + distilled
    expected = {
        "token": tokens[:, prefix - 1],
        "cls": tokens[:, 0],
        "patches": tokens[:, prefix:].mean(1),
    }
    for which, values in expected.items():
        outputs, _ = apply_with_features(model, variables, images, which)
        np.testing.assert_allclose(outputs.features, values, rtol=1e-5, atol=1e-5)


def tiny_teacher():
    """Return a teacher of four features: mean colours and brightness, seen through a matrix."""
    matrix = jnp.array(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)

    def apply(params, images):
        return {"features": jnp.tanh(images.mean((1, 2)) @ params["matrix"])}

    return Teacher(apply=apply, params={"matrix": matrix}, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture
def config(tiny_config):
    c = tiny_config
    c.epochs, c.distill.kind = 0.4, "feature"
    c.teacher.weights, c.teacher.epochs = f"python:{__name__}:tiny_teacher", 0.0
    c.model.drop_path = 0.1
    return c


def load_whole(config):
    experiment, dataset = prepare(config)
    return load_teacher(experiment.teacher, config.teacher.weights, dataset.classes)


def first_step(config, devices, **changes):
    """Return the state after one step, and its metrics, on so many devices."""
    config = config.copy_and_resolve_references()
    for key, value in changes.items():
        config[key.partition("__")[0]][key.partition("__")[2]] = value
    experiment, dataset = prepare(config, devices=jax.devices()[:devices])
    teacher, params = load_teacher(experiment.teacher, config.teacher.weights, dataset.classes)
    state, params = experiment.new_state(), experiment.place_teacher(teacher, params)
    batch = experiment.on_devices(experiment.batches(dataset)(0))
    return jax.device_get(experiment.jit_step(teacher)(state, params, batch))


@pytest.mark.eight_devices
def test_eight_devices_and_micro_batches_take_the_step_of_one(config):
    config.distill.schedule = "alpha=linear:0.9"
    one, metrics = first_step(config, 1)
    for changes in ({}, {"train__micro_batch": 2}, {"mesh__fsdp": 4}):
        many, others = first_step(config, 8, **changes)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), one, many)
        assert metrics["loss_teacher"] == pytest.approx(others["loss_teacher"], rel=1e-5)
    assert metrics["alpha"] == 0.5


@pytest.mark.slow
def test_features_are_learned_beside_labels_and_recorded(config, tmp_path):
    """A run of hard + feature; its tape, whose features are float16, and a replay of it."""
    config.teacher.weights, config.teacher.epochs = "", 0.2
    config.distill.kind, config.teacher.tape = "hard+feature", "record"
    config.distill.feature_weight = 0.25
    train_without_picture(config, tmp_path / "run")
    first = read_lines(tmp_path / "run/metrics.jsonl")[0]
    parts = 0.5 * first["loss_label"] + 0.5 * first["loss_teacher"] + 0.25 * first["loss_feature"]
    assert first["loss"] == pytest.approx(parts, rel=1e-5)
    recorded = tape.Tape.open(tmp_path / "run/tape")
    experiment, dataset = prepare(config, tmp_path / "run")
    weights = str(tmp_path / "run/teacher")
    network, params = load_teacher(experiment.teacher, weights, dataset.classes)
    images, *_ = model_inputs(0, experiment.batches(dataset)(0), experiment.settings)
    headless = network.model.clone(num_classes=0)
    features = np.asarray(headless.apply({"params": params}, images, train=False).cls)
    known = recorded.target(0, range(config.batch_size))
    scale = np.abs(features).max(-1, keepdims=True)
    np.testing.assert_allclose(known["feature"], features, atol=1e-3 * scale.max())
    logits = network.model.apply({"params": params}, images, train=False).cls
    np.testing.assert_array_equal(known["teacher"], np.argmax(logits, -1))

    config.teacher.tape, config.teacher.tape_path = "replay", str(tmp_path / "run/tape")
    config.teacher.epochs = 0.0
    train_without_picture(config, tmp_path / "replayed")
    again = read_lines(tmp_path / "replayed/metrics.jsonl")[0]
    assert again["loss_feature"] == pytest.approx(first["loss_feature"], rel=1e-3)
    assert again["loss_teacher"] == pytest.approx(first["loss_teacher"], rel=1e-5)


def test_a_backbone_without_a_head_gives_features(config, tmp_path):
    """What its class token is after the last norm, of its own number of features."""
    shape = {"patch_size": 4, "width": 36, "depth": 1, "num_heads": 3, "image_size": 16}
    model = create_model("deit_tiny_patch16_224", 0, **shape)
    variables = model.init(jax.random.key(3), jnp.zeros((1, 16, 16, 3)))
    convention = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "classes": [], "crop_ratio": 1.0}
    name = "deit_tiny_patch16_224"
    weights = save_weights(tmp_path / "w.safetensors", name, model, variables, **convention)
    config.teacher.weights = str(weights)
    experiment, dataset = prepare(config)
    teacher, params = load_teacher(experiment.teacher, config.teacher.weights, dataset.classes)
    assert experiment.abstract_state.params[EXTRAS]["projection"]["kernel"].shape == (24, 36)
    images = jnp.array(RNG.normal(size=(2, 16, 16, 3)), jnp.float32)
    tokens = features(model, variables["params"], teacher.shown(images), layers=-1)
    said = teacher.outputs(params, images, features=True).features
    np.testing.assert_allclose(said, tokens[:, 0], rtol=1e-4, atol=1e-5)


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / f"photographs/{i % 3}/deeper/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    return tmp_path / "photographs"


def test_every_image_below_a_folder_is_taken_once(config, photographs):
    (photographs / "again.png").symlink_to(photographs / "0/deeper/0.png")
    (photographs / "of_another.png").symlink_to(photographs.parent / "nowhere.png")
    config.data.source = f"images:{photographs}"
    dataset = open_dataset(config.data)
    keys = [dataset.train.key(i) for i in range(len(dataset.train))]
    assert sorted(keys) == sorted(f"{i % 3}/deeper/{i}.png" for i in range(12))
    assert dataset.reading.left_out["links to images that are there"] == 1
    assert (len(dataset.eval), dataset.classes) == (0, [])
    with pytest.raises(UserError, match="its images have no labels to compare answers with"):
        open_evaluation(config, "anything", "deit_tiny_patch16_224")
    config.data.eval_split = "test"
    with pytest.raises(UserError, match=r"data.eval_split=test: .* has no parts; leave it out"):
        open_dataset(config.data)


def test_a_function_is_called_once_for_its_shapes_and_its_numbers(config, monkeypatch):
    calls = []
    monkeypatch.setitem(globals(), "counted", lambda: calls.append(1) or tiny_teacher())
    config.teacher.weights = f"python:{__name__}:counted"
    load_whole(config)
    assert len(calls) == 1
    load_whole(config)  # another run may find another function
    assert len(calls) == 2


@pytest.mark.slow
def test_images_without_labels_train_a_backbone_that_others_start_from(
    config, photographs, tmp_path
):
    config.data.source, config.epochs = f"images:{photographs}", 3.0
    results = train_without_picture(config, tmp_path / "run")
    assert results == {"step": 3}
    assert read_json(tmp_path / "run/classes.json", list) == []
    lines = [r for r in read_lines(tmp_path / "run/metrics.jsonl") if "loss" in r]
    assert all(r["loss"] == pytest.approx(r["loss_teacher"]) for r in lines)
    assert "loss_label" not in lines[0]
    model, params = load(str(tmp_path / "run"), num_classes=0)
    assert model.num_classes == 0
    assert not {"head", "head_dist", EXTRAS} & set(params)

    tuned = make_tiny_config()
    tuned.init.weights, tuned.init.head = str(tmp_path / "run"), "drop"
    tuned.distill.kind, tuned.epochs = "none", 0.2
    train_without_picture(tuned, tmp_path / "tuned")
    assert "dropped" in str(read_lines(tmp_path / "tuned/history.jsonl")) or "anew" in str(
        read_lines(tmp_path / "tuned/history.jsonl")
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"distill.kind": "hard"}, r"data.source=.*has no labels; learn a teacher's features"),
        ({"teacher.weights": "", "teacher.epochs": 1.0}, "no teacher can be trained on images"),
        ({"distill.label_weight": 0.5}, r"distill.label_weight=0.5: there are no labels"),
        ({"distill.schedule": "alpha=linear:1"}, "alpha shares the loss with labels, and there"),
        ({"train.patience_epochs": 1.0}, r"train.patience_epochs=1.0: nothing is evaluated"),
        ({"data.source": "images:nowhere"}, "nowhere"),
    ],
)
def test_what_needs_labels_is_refused_without(config, photographs, changes, reason):
    config.data.source = f"images:{photographs}"
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=reason):
        prepare(config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"distill.kind": "hard"}, r"the teacher gives features alone, no classes"),
        ({"distill.kind": "none"}, r"distill.feature_loss='mse': there is no distillation"),
        ({"distill.feature_weight": 2.0}, r"feature_weight=2.0: is for features beside"),
        ({"distill.schedule": "tau=linear:1"}, r"schedule=.*tau is for soft distillation"),
        ({"distill.schedule": "feature_weight=linear:1"}, "beside soft or hard"),
        ({"distill.schedule": "label_weight=linear:1"}, "has no beginning"),
        ({"distill.schedule": "alpha=linear:2"}, "end of alpha must be between 0 and 1"),
        ({"distill.schedule": "alpha=steps:1"}, "choose one of linear, cosine"),
        ({"distill.schedule": "alpha:1"}, "is not NAME=SHAPE:END"),
        ({"teacher.combine": "votes"}, "is for several teachers"),
        ({"teacher.shares": "1,2"}, "give a positive number for each"),
        ({"model.name": "regnety_002"}, "student_features='patches': a convnet has no tokens"),
    ],
)
def test_what_contradicts_itself_is_refused(config, changes, reason):
    if "model.name" in changes:
        config.model = type(config.model)(dict.fromkeys(config.model) | {"name": "regnety_002"})
        changes = {"distill.student_features": "patches"}
    elif changes == {"distill.kind": "none"}:
        config.distill.feature_loss = "mse"
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=reason):
        load_whole(config)


@pytest.mark.slow
def test_features_from_another_program_lie_on_a_tape(config, photographs, tmp_path):
    """Of images without labels: views, a Writer, a training that replays them, and the check."""
    config.data.source, config.epochs = f"images:{photographs}", 2.0
    teacher = tiny_teacher()
    spec, config.teacher.weights = config.teacher.weights, ""
    path = tmp_path / "tape"
    with pytest.raises(UserError, match="features=0: feature students learn features: give their"):
        outside.Writer(config, path, "colours")
    with outside.Writer(config, path, "colours", features=4) as writer:
        with pytest.raises(UserError, match="step 0: the students do not learn logits"):
            writer.write(0, np.zeros((32, 10), np.float32), np.zeros((32, 4), np.float32))
        with pytest.raises(UserError, match=r"got \[32, 3\], not features of 32 images and 4"):
            writer.write(0, features=np.zeros((32, 3), np.float32))
        for view in writer.views():
            own = (view.images * np.float32(view.std) + np.float32(view.mean) - 0.5) / 0.25
            writer.write(view.step, features=teacher.apply(teacher.params, own)["features"])
    checked = config.copy_and_resolve_references()
    checked.teacher.weights = spec
    assert outside.check(path, checked)["passed"]
    config.teacher.tape, config.teacher.tape_path = "replay", str(path)
    train_without_picture(config, tmp_path / "replayed")
    config.teacher.weights, config.teacher.tape, config.teacher.tape_path = spec, "off", ""
    train_without_picture(config, tmp_path / "live")
    losses = [
        [r["loss"] for r in read_lines(tmp_path / n / "metrics.jsonl") if "loss" in r]
        for n in ("replayed", "live")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-3)

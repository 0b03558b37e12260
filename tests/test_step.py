"""The fused step: the same on any number of devices, no gradient for the teacher."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from deit_jax.models.build import build_model
from deit_jax.models.heads import Heads
from deit_jax.models.preprocess import normalise
from deit_jax.parallel import sharding
from deit_jax.step import eval_step, losses
from deit_jax.step.committee import shardings
from deit_jax.step.compile import placing
from deit_jax.step.objective import objective
from deit_jax.step.optimizer import make_optimizer, make_schedule
from deit_jax.step.state import init_state
from deit_jax.step.teacher import FrozenTeacher
from deit_jax.step.train_step import model_inputs, teacher_targets, train_step
from deit_jax.train.experiment import settings_of
from tests.tiny import make_tiny_config

K, B, SIZE = 10, 32, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_batch(n=B):
    rng = np.random.default_rng(0)
    colours, noise = rng.normal(size=(n, 1, 1, 3)), rng.normal(size=(n, SIZE, SIZE, 3))
    return {
        "image": np.clip(128 + 60 * colours + 30 * noise, 0, 255).astype(np.uint8),
        "label": rng.integers(0, K, n).astype(np.int32),
    }


def make_teacher():
    """Return a small convnet with random weights, and its parameters."""
    model = build_model(make_tiny_config().teacher.model, K).clone(folded=True)
    params = jax.jit(model.init)(jax.random.key(7), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    return FrozenTeacher(model, MEAN, STD, MEAN, STD), params


def build(config, devices=None, teacher=make_teacher):
    """Return (jitted step, state, teacher's params, mesh) as train/experiment.py builds them.

    `teacher()` returns the one of a student that is distilled, and its parameters.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    model = build_model(config.model, K, "float32")
    tx = make_optimizer(config.optim, make_schedule(config.optim, config.epochs, 5))
    init = functools.partial(
        init_state, model=model, image_size=SIZE, tx=tx, ema_decay=config.optim.ema_decay
    )
    key = jax.random.key(config.seed)
    places = sharding.state_shardings(mesh, jax.eval_shape(init, key), model)
    state = jax.jit(init, out_shardings=places)(key)
    teacher, teacher_params = teacher() if config.distill.kind != "none" else (None, None)
    teacher_params = jax.device_put(teacher_params, shardings(teacher, mesh, teacher_params))
    function = functools.partial(
        train_step,
        model=model,
        teacher=teacher,
        tx=tx,
        settings=settings_of(config, K),
    )
    function = placing(function, mesh)
    jitted = jax.jit(function, out_shardings=(places, sharding.replicated(mesh)))
    return jitted, state, teacher_params, mesh


def run(config, devices=None, steps=2):
    jitted, state, teacher_params, mesh = build(config, devices)
    for _ in range(steps):
        state, metrics = jitted(state, teacher_params, sharding.to_devices(make_batch(), mesh, B))
    return jax.device_get((state, metrics))


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-5), a, b)


def everything_on(kind):
    """Return a config with drop-path, mixing, erasing and distillation: all that is random."""
    c = make_tiny_config()
    c.model.drop_path, c.model.width, c.model.num_heads, c.distill.kind = 0.2, 32, 4, kind
    c.optim.eps = 1e-4  # AdamW's first steps are signs of gradients: tame rounding at 0
    return c


@functools.cache
def run_on_one(kind):
    return run(everything_on(kind), jax.devices()[:1])


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ((2, 2, 2), "hard"),
        pytest.param((8, 1, 1), "hard", marks=pytest.mark.slow),
        pytest.param((1, 8, 1), "hard", marks=pytest.mark.slow),
        pytest.param((1, 4, 2), "hard", marks=pytest.mark.slow),
        pytest.param((2, 4, 1), "soft", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_take_the_step_of_one(sizes, kind, monkeypatch):
    one, metrics_one = run_on_one(kind)
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    config = everything_on(kind)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
    eight, metrics_eight = run(config)
    assert_close(one.params, eight.params, 1e-5)
    assert_close(one.ema, eight.ema, 1e-5)
    assert_close(metrics_one, metrics_eight, 1e-5)


@pytest.mark.eight_devices
def test_fsdp_splits_weights_moments_and_average(tiny_config, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    tiny_config.mesh.fsdp = 4
    _, state, _, _ = build(tiny_config)
    kernel = ("blocks_0", "mlp", "fc1", "kernel")
    adam = next(
        s
        for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
        if hasattr(s, "mu")
    )
    for tree in (state.params, state.ema["params"], adam.mu):
        leaf = functools.reduce(lambda t, k: t[k], kernel, tree)
        assert leaf.addressable_shards[0].data.size == leaf.size // 4


@pytest.mark.slow
def test_accumulated_micro_batches_give_the_whole_batchs_gradient(tiny_config):
    tiny_config.model.drop_path = 0.3  # drawn for the whole batch, however it is cut
    whole, metrics_whole = run(tiny_config)
    tiny_config.optim.accum_steps = 4
    parts, metrics_parts = run(tiny_config)
    assert_close(metrics_whole, metrics_parts, 1e-5)
    assert_close(whole.opt_state, parts.opt_state, 1e-6)


@pytest.mark.eight_devices
def test_micro_batches_move_no_image_between_devices(tiny_config):
    tiny_config.optim.accum_steps, tiny_config.distill.kind = 4, "none"
    tiny_config.mixing.prob, tiny_config.augment.erase_prob = 0.0, 0.0
    jitted, state, teacher_params, mesh = build(tiny_config)
    batch = sharding.to_devices(make_batch(), mesh, B)
    hlo = jitted.lower(state, teacher_params, batch).compile().as_text()
    for collective in ("all-gather(", "all-to-all(", "collective-permute("):
        assert collective not in hlo, collective


@functools.cache
def sgd_step():
    """Return (config, state, teacher's params, new state, metrics) of a step of plain SGD."""
    c = make_tiny_config()
    c.model.drop_path = 0.0
    c.mixing.prob, c.augment.erase_prob, c.loss.smoothing = 0.0, 0.0, 0.0
    c.optim.name, c.optim.b1, c.optim.weight_decay, c.optim.warmup_epochs = "sgd", 0.0, 0.0, 0.0
    jitted, state, teacher_params, mesh = build(c)
    new, metrics = jitted(state, teacher_params, sharding.to_devices(make_batch(), mesh, B))
    return c, state, teacher_params, new, metrics


def test_step_is_the_gradient_of_the_written_out_objective():
    """Rebuild one step from its formula: no augmentation, hard distillation, plain SGD."""
    c, state, teacher_params, new, _ = sgd_step()
    batch = make_batch()
    images = (batch["image"] / 255.0 - np.array(MEAN)) / np.array(STD)
    teacher, _ = make_teacher()
    apply = jax.jit(teacher.model.apply)
    said = apply({"params": teacher_params}, jnp.float32(images)).cls.argmax(-1)
    assert len(np.unique(said)) > 1
    model = build_model(c.model, K)

    def objective(params):
        heads = model.apply({"params": params}, jnp.float32(images))
        rows = np.arange(B)
        own = -jax.nn.log_softmax(heads.cls)[rows, batch["label"]].mean()
        taught = -jax.nn.log_softmax(heads.dist)[rows, said].mean()
        return (own + taught) / 2

    gradient = jax.jit(jax.grad(objective))(state.params)
    expected = jax.tree.map(lambda p, g: p - c.optim.lr * g, state.params, gradient)
    assert_close(jax.device_get(new.params), jax.device_get(expected), 1e-6)


def test_teacher_has_no_state_and_gets_no_gradient(tiny_config):
    """The teacher's parameters enter the step, and nothing of their size leaves it."""
    jitted, state, teacher_params, _ = build(tiny_config)
    out = jax.eval_shape(jitted, state, teacher_params, make_batch())
    assert jax.tree.structure(out[0]) == jax.tree.structure(state)
    assert all(x.shape == () for x in jax.tree.leaves(out[1]))
    teacher, _ = make_teacher()

    config = make_tiny_config()

    def loss(params):
        images = normalise(jnp.asarray(make_batch()["image"]), MEAN, STD)
        target = teacher_targets(teacher, params, images, settings_of(config, K))
        logits = jnp.ones((B, K)) * jnp.arange(K)
        targets = losses.smooth_one_hot(jnp.zeros(B, jnp.int32), K, 0.1)
        return objective(Heads(logits), targets, target, config.distill)[0]

    for kind in ("hard", "soft"):
        config.distill.kind = kind
        grads = jax.jit(jax.grad(loss))(teacher_params)
        assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_teacher_sees_its_own_normalisation():
    teacher, params = make_teacher()
    batch = make_batch(4)["image"]
    other = FrozenTeacher(teacher.model, (0.5,) * 3, (0.5,) * 3, MEAN, STD)
    own = teacher.model.apply({"params": params}, jnp.float32(batch / 255.0 * 2 - 1)).cls
    handed = other.logits(params, normalise(jnp.asarray(batch), MEAN, STD))
    np.testing.assert_allclose(handed, own, atol=1e-4)


def test_teacher_sees_its_own_resolution():
    teacher, params = make_teacher()
    images = normalise(jnp.asarray(make_batch(4)["image"]), MEAN, STD)
    at_32 = FrozenTeacher(teacher.model, MEAN, STD, MEAN, STD, image_size=32)
    resized = np.stack(
        [
            np.stack(
                [
                    np.asarray(Image.fromarray(channel).resize((32, 32), Image.Resampling.BICUBIC))
                    for channel in np.moveaxis(np.asarray(image), -1, 0)
                ],
                axis=-1,
            )
            for image in images
        ]
    )
    expected = teacher.logits(params, jnp.asarray(resized))
    np.testing.assert_allclose(at_32.logits(params, images), expected, atol=1e-4)


def test_ema_averages_parameters():
    config, state, _, new, _ = sgd_step()
    d = config.optim.ema_decay
    expected = jax.tree.map(lambda e, p: d * e + (1 - d) * p, state.ema["params"], new.params)
    assert_close(new.ema["params"], expected, 1e-7)
    assert int(new.step) == 1


def test_batch_norm_statistics_move_only_in_training(tiny_config):
    c = tiny_config
    c.model = c.teacher.model
    c.distill.kind = "none"
    state, _ = run(c, steps=1)
    start = build(c)[1]
    moved = jax.tree.map(lambda a, b: np.any(a != b), state.batch_stats, start.batch_stats)
    assert all(jax.tree.leaves(moved))


def test_gradient_norm_is_of_the_gradient():
    config, state, _, new, metrics = sgd_step()
    change = optax.tree.norm(jax.tree.map(lambda a, b: a - b, new.params, state.params))
    np.testing.assert_allclose(metrics["grad_norm"], change / config.optim.lr, rtol=1e-4)


def test_counts_are_numpys_ranks_and_padding_is_not_counted():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(40, K)).round(1).astype(np.float32)  # rounded: some are equal
    labels = rng.integers(0, K, 40).astype(np.int32)
    valid = rng.random(40) < 0.7
    order = np.argsort(-logits, axis=1, kind="stable")
    got = eval_step.count_correct(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(valid))
    for k in (1, 5):
        right = (order[:, :k] == labels[:, None]).any(1) & valid
        assert int(got[f"top{k}"]) == right.sum()


def test_nan_logits_are_never_right():
    logits = jnp.full((3, K), jnp.nan)
    counts = eval_step.count_correct(logits, jnp.zeros(3, jnp.int32), jnp.ones(3, bool))
    assert jax.tree.leaves(counts) == [0, 0]


@pytest.mark.eight_devices
@pytest.mark.parametrize("kind", ["hard", pytest.param("soft", marks=pytest.mark.slow)])
def test_a_recorded_signal_takes_the_teachers_place_to_the_bit(tiny_config, kind):
    """What a step recorded, in the order of the batch, makes the same step without a teacher."""
    tiny_config.model.drop_path, tiny_config.optim.accum_steps = 0.2, 2
    tiny_config.distill.kind = kind
    function, state, teacher_params, mesh = build(tiny_config)
    parts = dict(function.__wrapped__.keywords)
    parts["settings"] = dataclasses.replace(parts["settings"], record=True)
    places = jax.tree.map(lambda x: x.sharding, state)
    places = {"out_shardings": (places, sharding.replicated(mesh))}
    recording = jax.jit(functools.partial(train_step, **parts), **places)
    parts["teacher"] = None
    replaying = jax.jit(functools.partial(train_step, **parts), **places)
    batch = sharding.to_devices(make_batch(), mesh, B)
    fused, told = recording(state, teacher_params, batch)
    inputs = jax.jit(functools.partial(model_inputs, settings=parts["settings"]))
    images, *_ = inputs(state.step, batch)
    teacher, params = make_teacher()
    logits = np.asarray(jax.jit(teacher.logits)(params, images))
    expected = logits.argmax(-1) if kind == "hard" else logits
    np.testing.assert_allclose(told["teacher_target"], expected, atol=1e-5)
    target = {"teacher_target": np.asarray(told["teacher_target"])}
    batch |= sharding.to_devices(target, mesh, B)
    replayed, _ = replaying(state, None, batch)
    jax.tree.map(np.testing.assert_array_equal, fused, replayed)

"""Every shipped config: built, and its step traced at full size on abstract values."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from deit_jax.config.serialize import flatten, from_json, to_json
from deit_jax.configs import base
from deit_jax.data.decode import Reading
from deit_jax.data.view import reading_of
from deit_jax.errors import UserError
from deit_jax.models.build import build_model
from deit_jax.train.experiment import resolve
from deit_jax.train.validate import validate
from deit_jax.workdir.directory import changes

CONFIGS = [
    ("base", None),
    ("quickstart", None),
    ("deit", ""),
    ("deit", "variant=tiny"),
    ("deit", "variant=small,distilled=True"),
    ("deit", "variant=base,distilled=True,epochs=1000"),
    ("deit", "variant=base,kind=soft"),
    ("teacher", "variant=160"),
    ("deit_finetune384", ""),
    ("deit_finetune384", "variant=small,distilled=False"),
    *(("deit_transfer", f"dataset={d}") for d in ("cifar10", "cifar100", "flowers102", "cars")),
    *(("deit_transfer", f"dataset={d},distilled=True") for d in ("inat18", "inat19")),
    *(("deit3", f"size={s}") for s in ("small", "medium", "base", "large", "huge")),
    ("deit3", "size=large,stage=finetune224"),
    ("deit3", "size=base,stage=finetune384"),
]


def load(name, text):
    module = importlib.import_module(f"deit_jax.configs.{name}")
    return module.get_config() if text is None else module.get_config(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        case if case in CONFIGS[:5] else pytest.param(*case, marks=pytest.mark.slow)
        for case in CONFIGS
    ],
)
def test_config_is_valid_and_its_step_traces_at_full_size(name, text):
    config = load(name, text)
    build_model(config.model, 1000)
    if config.distill.kind != "none":
        config.teacher.weights = "somewhere"
    config.init.weights = "somewhere" if config.init.required else ""
    validate(config, num_devices=8)
    config.dtype = "bfloat16"
    experiment = resolve(config, 1000, 1_281_167)
    teacher, teacher_params = experiment.abstract_teacher() or (None, None)
    size = experiment.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    state = experiment.abstract_state
    step = experiment.jit_step(teacher)
    new_state, metrics = jax.eval_shape(step, state, teacher_params, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert set(metrics) >= {"loss", "grad_norm"}


def test_base_holds_the_papers_recipe():
    """DeiT table 9 and the reference's defaults."""
    c = load("deit", "variant=base,distilled=True")
    flat = flatten(c)
    expected = {
        "batch_size": 1024,
        "epochs": 300.0,
        "optim.name": "adamw",
        "optim.lr": 1e-3,
        "optim.weight_decay": 0.05,
        "optim.warmup_epochs": 5.0,
        "optim.warmup_lr": 1e-6,
        "optim.min_lr": 1e-5,
        "optim.ema_decay": 0.99996,
        "optim.clip_norm": 0.0,
        "loss.smoothing": 0.1,
        "model.drop_path": 0.1,
        "augment.repeats": 3,
        "augment.auto": "rand-m9-mstd0.5-inc1",
        "augment.erase_prob": 0.25,
        "mixing.mixup_alpha": 0.8,
        "mixing.cutmix_alpha": 1.0,
        "mixing.prob": 1.0,
        "mixing.switch_prob": 0.5,
        "mixing.group_size": 64,
        "distill.kind": "hard",
        "distill.alpha": 0.5,
        "teacher.model.name": "regnety_160",
    }
    assert {k: flat[k] for k in expected} == expected


def test_json_form_round_trips(tiny_config):
    values = to_json(tiny_config)
    again = from_json(values)
    assert changes(values, to_json(again)) == {}
    assert again.teacher.model.widths == (8, 16)


def test_a_field_newer_than_a_run_means_what_was_done_before(tiny_config):
    old = to_json(tiny_config)
    for field in ("exif", "resize", "bits", "skip_unreadable"):
        del old["data"][field]
    again = from_json(old)
    validate(again, 8)
    assert reading_of(again.data) == Reading("crop", False, 0, (124, 116, 104))
    assert again.data.skip_unreadable is False
    assert changes(old, to_json(tiny_config)) == {}
    tiny_config.data.exif, tiny_config.data.resize, tiny_config.data.bits = True, "pad", 12
    assert set(changes(old, to_json(tiny_config))) == {"data.exif", "data.resize", "data.bits"}
    assert "data" not in from_json({"seed": 0})


@pytest.mark.parametrize(
    ("field", "value"), [("bits", 1), ("bits", 8), ("bits", 33), ("resize", "x")]
)
def test_how_images_are_read_is_checked(tiny_config, field, value):
    tiny_config.data[field] = value
    with pytest.raises(UserError, match=rf"config\.data\.{field}={value!r}: (must be|choose one)"):
        validate(tiny_config, 8)
    tiny_config.data.bits, tiny_config.data.resize = 9, "squash"
    validate(tiny_config, 8)


def test_differences_name_what_matters_and_only_that(tiny_config):
    old = to_json(tiny_config)
    tiny_config.train.log_every_steps = 77
    tiny_config.mixing.prob = 0.3
    changed = changes(old, to_json(tiny_config))
    assert changed == {"mixing.prob": "mixing.prob: 1.0 -> 0.3"}


def test_both_heads_learn_labels_in_a_distilled_model_without_a_teacher(tiny_config):
    tiny_config.loss.heads = "both"
    with pytest.raises(UserError, match=r"loss\.heads='both': .*set config\.distill\.kind=none"):
        validate(tiny_config, 8)
    tiny_config.distill.kind = "none"
    validate(tiny_config, 8)
    tiny_config.model.name = "deit_tiny_patch16_224"
    with pytest.raises(UserError, match=r"no distillation head; take a distilled model"):
        validate(tiny_config, 8)


@pytest.mark.parametrize("text", ["variant=huge", "variants=tiny", "distilled=yes", "epochs=x"])
def test_a_wrong_argument_of_a_config_is_refused(text):
    with pytest.raises(ValueError, match=r"variant|distilled|invalid literal"):
        load("deit", text)


def test_arguments_take_the_type_of_their_default():
    args = base.parse_args("a=3,b=True,c=x", a=1, b=False, c="", d=2.0)
    assert (args.a, args.b, args.c, args.d) == (3, True, "x", 2.0)

"""A config is refused in one line before anything is written, or else it can be trained."""

import functools
import math
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deit_jax import __main__ as program
from deit_jax.config.schema import OPTIONAL, RANGES
from deit_jax.config.serialize import flatten
from deit_jax.configs import base
from deit_jax.errors import UserError
from deit_jax.train.experiment import prepare
from deit_jax.weights import convert
from deit_jax.weights.exporters import run
from deit_jax.workdir import directory
from tests.test_convert import DISTILLED, SMALL, opened
from tests.tiny import make_tiny_config

ROOT = Path(__file__).parent.parent
CONFIGS = {
    "quickstart.py": [],
    "deit.py:variant=small,distilled=True": ["--config.teacher.epochs=1"],
    "deit3.py:size=small": [],
    "teacher.py:variant=160": [],
}
FLAT = flatten(base.get_config())
# What no field of a model may be; 0 is a fine dropout.
WRONG_IN_MODEL = {
    "image_size": (0, -16, 10**30),
    "patch_size": (0, -8, 7, 64, 10**30),
    "width": (0, -96, 97, 10**30),
    "depth": (0, -1, 1001, 10**30),
    "num_heads": (0, -3, 5, 10**30),
    "drop_path": (1.0, -0.1, math.nan, math.inf),
    "dropout": (1.0, -0.1, math.nan, -math.inf),
    "layer_scale": (math.nan, math.inf, -1.0),
    "name": ("deit_tinny", "", "None", "regnety_161"),
}
WRONG_IN_TEACHER = {
    "widths": ((), (2, 64), (8, 0), (65, 64), (32, 64, 128)),
    "depths": ((), (0, 1), (1,), (1, 1000)),
    "group_width": (0, -64, 7),
    "stem_width": (0, 2, -16),
    "stem_stride": (0, -1, 99),
    "drop_path": (1.0, math.nan),
    "image_size": (0, 64),
    "name": ("regnety_161", "", "None"),
    "width": (64,),
}


class FirstStepError(BaseException):
    """All checks have been passed."""


@pytest.fixture
def deit(capsys, monkeypatch, tmp_path):
    """Return a function that calls `deit train` up to where it would write its first file."""

    def begin(*_):
        raise FirstStepError

    monkeypatch.setattr(directory, "locked", begin)
    workdir = tmp_path / "run"

    def call(*words, config="quickstart.py"):
        capsys.readouterr()
        argv = ["train", f"--config={ROOT}/configs/{config}", f"--workdir={workdir}"]
        code = program.main([*argv, *CONFIGS.get(config, []), *map(str, words)])
        out, err = capsys.readouterr()
        assert not out
        assert not workdir.exists()
        assert code in (1, 2)
        assert err.startswith("deit train: ")
        assert len(err.splitlines()) == 1, err
        assert "(--debug" not in err, err  # it was nobody's mistake but ours
        return err

    return call


def word(key, value):
    text = str(value).replace(" ", "") if isinstance(value, tuple) else value
    return f"--config.{key}={text}"


def outside(key):
    """Return values next to and far from the range of a field."""
    allowed = RANGES[key]
    whole = isinstance(FLAT[key], int) or key in OPTIONAL
    near = 1 if whole else 1e-3
    low = allowed.low if allowed.above else allowed.low - near
    high = allowed.high if allowed.below else allowed.high + near
    values = st.sampled_from([low, high, 10**30, -(10**30)])
    if not whole:
        values |= st.floats(max_value=low) | st.floats(min_value=high)
        values |= st.sampled_from([math.nan, math.inf, -math.inf])
    if allowed.length:
        fine = (allowed.low + allowed.high) / 2
        places = st.integers(0, allowed.length - 1)
        broken = st.tuples(values, places).map(
            lambda x: tuple(x[0] if i == x[1] else fine for i in range(allowed.length))
        )
        lengths = st.sampled_from([(), (fine,) * (allowed.length + 1)])
        values = broken | lengths
    return values


# None by default, and numbers of this type where they are given.
FLOATS = ("distill.label_weight", "distill.teacher_weight")
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def test_every_number_has_a_range_and_every_range_a_number():
    """Those of a model are checked where the model is."""
    numbers = {
        key
        for key, value in FLAT.items()
        if isinstance(value, int | float | tuple) and not isinstance(value, bool)
    }
    own = {key for key in numbers if "model." not in key} - {"train.trackers"}  # words
    assert own | set(OPTIONAL) == set(RANGES)
    for key in own:
        assert RANGES[key].holds(FLAT[key]), key


@settings(SETTINGS, max_examples=60)
@given(
    st.sampled_from(sorted(RANGES)).flatmap(lambda k: st.tuples(st.just(k), outside(k))),
    st.sampled_from(sorted(CONFIGS)),
)
def test_a_number_out_of_range_is_named_with_its_value(deit, wrong, config):
    key, value = wrong
    err = deit(word(key, value), config=config)
    assert f"{key}=" in err
    written = key in FLOATS or isinstance(FLAT[key], float)  # 10**30 as 1e+30
    shown = value if isinstance(value, int) and not written else None
    assert shown is None or f"{key}={shown}" in err
    assert "must be" in err or "mesh" in key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((f"model.{k}", v) for k, values in WRONG_IN_MODEL.items() for v in values),
        *((f"teacher.model.{k}", v) for k, values in WRONG_IN_TEACHER.items() for v in values),
    ],
)
def test_a_wrong_model_is_refused_before_anything_is_trained(deit, key, value):
    err = deit(word(key, value))
    assert key.rpartition(".")[2] in err
    if not isinstance(value, tuple | float) and key != "teacher.model.name":
        assert str(value) in err
    if key.startswith("teacher."):
        assert "config.teacher.model." in err


KINDS = {int: "1.5", float: "fast", bool: "maybe"}


@settings(SETTINGS, max_examples=40)
@given(st.sampled_from(sorted(k for k, v in FLAT.items() if type(v) in KINDS)), st.data())
def test_a_value_of_another_type_is_refused(deit, key, data):
    kind = type(FLAT[key])
    letters = st.text("abcxyz.-_ ", min_size=1).filter(lambda t: t.strip() not in ("y", "t", "f"))
    value = data.draw(st.sampled_from([KINDS[kind], "", "None", "[1]"]) | letters)
    err = deit(word(key, value))
    assert f"--config.{key}={value}" in err
    assert "give" in err


@settings(SETTINGS, max_examples=40)
@given(st.sampled_from(sorted(FLAT)), st.randoms(use_true_random=False))
def test_a_misspelt_field_is_named_and_the_right_one_too(deit, key, random):
    parents, _, name = key.rpartition(".")
    place = random.randrange(len(name) + 1)
    wrong = name[:place] + random.choice("qxz") + name[place:]
    path = f"{parents}.{wrong}" if parents else wrong
    err = deit(f"--config.{path}=1")
    assert f"--config.{path}: no such field" in err
    if len(name) > 4:
        assert name in err.partition("did you mean ")[2].partition("?")[0]
    assert "did you mean teacher.epochs or" in deit("--config.teecher.epochs=1")
    assert "--config.zzz: no such field; configs/base.py" in deit("--config.zzz=1")


CONTRADICTIONS = [
    (
        ["data.eval_split=."],
        "data.eval_split='.': evaluates all of a folder, also what is trained on",
    ),
    (["mesh.data=3"], "mesh.data=3"),
    (["mesh.data=4", "mesh.fsdp=4"], "mesh.fsdp=4"),
    (["mesh.fsdp=-2"], "mesh.fsdp=-2"),
    (["batch_size=8", "optim.accum_steps=3"], "batch_size=8"),
    (["mixing.group_size=34"], "mixing.group_size=34"),
    (["mixing.group_size=4", "augment.repeats=3"], "mixing.group_size=4"),
    (["mixing.mixup_alpha=1e-9"], "mixing.mixup_alpha=1e-09"),
    (["augment.crop_scale=(0.5,0.2)"], "augment.crop_scale=(0.5, 0.2)"),
    (["augment.crop_ratio=(2,1)"], "augment.crop_ratio=(2, 1)"),
    (["augment.auto=rand-n101"], "rand-n101"),
    (["augment.auto=rand-m" + "9" * 5000], "unknown token"),
    (["loss.kind=binary"], "loss.smoothing=0.1"),
    (["init.required=True"], "init.weights=''"),
    (["teacher.epochs=0"], "teacher.weights=''"),
    (["teacher.image_size=0"], "teacher.image_size=0"),
    (["teacher.weights=no\nwhere"], "teacher.weights=no where"),
    (["init.weights=/no/where"], "init.weights=/no/where"),
    (["init.weights=hf-hub:"], "init.weights=hf-hub:"),
    (["data.source=no"], "data.source='no'"),
    (["data.source=wds:/no/where"], "/no/where"),
    (["data.eval_fraction=1"], "data.eval_fraction=1.0"),
    (["epochs=1e6", "batch_size=8", "mixing.group_size=8", "mesh.data=8"], None),
    (["dtype=float16"], "dtype='float16'"),
    (["model.attention=flash"], "model.attention='flash': choose one of auto, cudnn, xla"),
    (["model.attention=cudnn"], "model.attention='cudnn': it needs an NVIDIA GPU"),
    (["train.micro_batch=20", "batch_size=888", "mixing.prob=0"], "take 37"),  # 3 x 37 a device
    (["data.decoder=best"], "data.decoder='best'"),
    (["train.on_divergence=cry"], "train.on_divergence='cry'"),
    (["model.name=regnety_002"], "model.depth=4"),
    (["optim=3"], "--config.optim=3"),
    (["optim.lr.x=3"], "--config.optim.lr.x"),
]


@pytest.mark.parametrize(
    ("words", "part"), CONTRADICTIONS, ids=[c[0][0][:30] for c in CONTRADICTIONS]
)
def test_what_contradicts_itself_is_refused(deit, words, part):
    words = [f"--config.{w}" for w in words]
    if part is None:
        with pytest.raises(FirstStepError):
            deit(*words)
    else:
        assert part in deit(*words)


def test_a_teacher_that_takes_other_images_is_refused_before_it_is_trained(deit):
    quickstart = base.get_config()
    quickstart.teacher.model.name = "deit_tiny_patch16_224"
    quickstart.distill.kind, quickstart.teacher.epochs = "soft", 1.0
    quickstart.model.image_size, quickstart.data.source = 32, "digits"
    quickstart.teacher.image_size = 64
    with pytest.raises(UserError, match=r"teacher\.image_size=64.*32 pixels"):
        prepare(quickstart, Path("/nowhere"))


def test_weights_of_other_classes_are_refused(deit, tmp_path):
    """A run of three classes as the teacher, a file of three to start from; digits has ten."""
    tiny = make_tiny_config().teacher.model
    sizes = {k: tiny[k] for k in ("widths", "depths", "stem_width")}
    run.write(opened("regnety_002", sizes), tmp_path / "teacher")
    err = deit(f"--config.teacher.weights={tmp_path}/teacher")
    assert f"config.teacher.weights={tmp_path}/teacher" in err
    assert "knows 3 classes, digits has 10" in err
    path = tmp_path / "start.safetensors"
    convert.convert(opened(DISTILLED, SMALL), path)
    err = deit(f"--config.init.weights={path}")
    assert f"config.init.weights={path}" in err
    assert "know 3 classes, the model 10" in err
    classes, path = tuple("0123456789"), tmp_path / "ten.safetensors"
    convert.convert(opened(DISTILLED, SMALL, classes), path)
    err = deit(f"--config.teacher.weights={path}", "--config.teacher.image_size=64")
    assert "takes 32 px images, not 64" in err
    assert "--config.teacher.image_size=32" in err
    (tmp_path / "teacher" / "config.json").write_text("[]")
    assert "config.json: holds no dict" in deit(f"--config.teacher.weights={tmp_path}/teacher")


# Values at the edge of what is accepted and a little beyond it, small where they cost time.
DRAWN = {
    "seed": (0, 2**32 - 1, -1),
    "epochs": (1e-300, 0.01, 1.0, 1e6, 0.0),
    "batch_size": (8, 16, 24, 33, 0),
    "dtype": ("float32", "bfloat16", "auto"),
    "model.name": ("deit_tiny_patch16_224", "deit3_small_patch16_224", "regnety_002"),
    "model.image_size": (8, 12, 20, 1, 15),
    "model.patch_size": (1, 2, 4, 20, 3),
    "model.width": (3, 6, 24, 25),
    "model.depth": (1, 2, 0),
    "model.num_heads": (1, 3, 6, 7),
    "model.drop_path": (0.0, 0.999, 1.0),
    "model.dropout": (0.0, 0.999, 1.0),
    "model.layer_scale": (0.0, 1e-30, 999.0, math.nan),
    "model.remat": (True,),
    "model.dist_head": (False,),
    "teacher.epochs": (1e-300, 1e6),
    "teacher.image_size": (1, 7, 32),
    "teacher.model.name": ("regnety_040", "efficientnet_lite0"),
    "teacher.model.widths": ((3, 4), (8, 16), (8, 12), (8,)),
    "teacher.model.depths": ((1, 2), (1, 0)),
    "teacher.model.group_width": (1, 3, 4, 8),
    "teacher.model.stem_width": (3, 4, 2),
    "teacher.model.stem_stride": (1, 16),
    "data.mean": ((0.0, 0.0, 1.0),),
    "data.std": ((0.001, 1.0, 1.0), (0.0, 1.0, 1.0)),
    "data.eval_crop_ratio": (0.1, 1.0),
    "data.eval_fraction": (0.001, 0.999, 1.0),
    "data.decoder": ("pillow", "portable"),
    "augment.crop": ("simple",),
    "augment.crop_scale": ((1e-300, 1e-300), (1.0, 1.0)),
    "augment.crop_ratio": ((0.001, 0.001), (1000.0, 1000.0), (0.001, 1000.0)),
    "augment.auto": ("", "3aug", "rand-n0", "rand-m100-n100-mstd101", "rand-p2"),
    "augment.color_jitter": (0.0, 10.0),
    "augment.flip_prob": (0.0, 1.0),
    "augment.repeats": (1, 4, 2**24),
    "augment.erase_prob": (0.0, 1.0),
    "mixing.prob": (0.0, 1e-300),
    "mixing.mixup_alpha": (0.0, 0.001, 1000.0),
    "mixing.cutmix_alpha": (0.0, 0.001, 1000.0),
    "mixing.group_size": (2, 6, 8, 32),
    "loss.kind": ("binary",),
    "loss.smoothing": (0.0, 1.0),
    "distill.kind": ("none", "soft"),
    "distill.tau": (0.001, 1000.0),
    "distill.reduction": ("numel",),
    "optim.name": ("sgd", "lamb"),
    "optim.lr": (0.0, 1e6),
    "optim.warmup_lr": (0.0, 1e6),
    "optim.min_lr": (0.0, 1e6),
    "optim.warmup_epochs": (0.0, 1e-300, 1e6),
    "optim.weight_decay": (0.0, 1e6),
    "optim.b1": (0.0, 1.0),
    "optim.b2": (0.0, 0.9999999999),
    "optim.eps": (1e-30, 1.0, 0.0),
    "optim.clip_norm": (1e-300, 1e6),
    "optim.accum_steps": (2, 3),
    "optim.ema_decay": (0.0, 0.9999999999, 1.0),
    "mesh.data": (-1, 2, 8),
    "mesh.fsdp": (2, 4, 3, -1),
    "mesh.tensor": (2, 4, 8),
    "mesh.slices": (1, 2),
    "train.eval_batch_size": (8, 1),
}


@settings(SETTINGS, max_examples=25)
@given(
    st.lists(st.sampled_from(sorted(DRAWN)), min_size=1, max_size=6, unique=True).flatmap(
        lambda keys: st.fixed_dictionaries({k: st.sampled_from(DRAWN[k]) for k in keys})
    )
)
def test_what_is_accepted_can_be_trained(tmp_path, values):
    """Refused with the name of a field, or data, schedule, model, teacher and step all build."""
    config = make_tiny_config()
    config.batch_size, config.model.depth, config.augment.repeats = 16, 1, 1
    for key, value in values.items():
        *parents, name = key.split(".")
        functools.reduce(lambda c, k: c[k], parents, config)[name] = value
    refusal = None
    try:
        experiment, dataset = prepare(config, tmp_path / "run")
    except UserError as error:
        refusal = str(error)
    if refusal is None:
        build(experiment, dataset)
    else:
        assert refusal.startswith("config.")
        assert len(refusal.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def build(experiment, dataset):
    """Make all that a run needs for its first step, and trace that step; nothing is compiled."""
    total, size = experiment.total_steps, experiment.image_size
    steps = np.unique([0, 1, total // 2, total - 1, total])
    rates = np.array([experiment.schedule(jnp.int32(s)) for s in steps])
    assert np.isfinite(rates).all()
    assert rates.min() >= 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert experiment.batches(dataset, range(4))(0)["image"].shape == (4, size, size, 3)
    batch = {
        "image": jax.ShapeDtypeStruct((experiment.batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((experiment.batch_size,), jnp.int32),
    }
    teacher, params = experiment.abstract_teacher() or (None, None)
    state = experiment.abstract_state
    new, _ = jax.eval_shape(experiment.jit_step(teacher), state, params, batch)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)

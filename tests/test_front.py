"""Help and usage errors without JAX, and what is suggested for a name that there is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deit_jax import __main__ as program
from deit_jax.analysis import choices, probe
from deit_jax.cli import suggest
from deit_jax.cli.flags import Command, UsageError
from deit_jax.config.serialize import default_fields

ROOT = Path(__file__).parent.parent
QUICKSTART = f"--config={ROOT}/configs/quickstart.py"
FIELDS = default_fields()
# What takes long to import, and no help and no mistake in a flag needs.
HEAVY = (
    *("jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "tensorflow", "torch", "numpy"),
    *("grain", "cv2", "sklearn", "matplotlib", "jaxtyping", "einops", "tqdm", "safetensors", "PIL"),
    "gradio",
)
PROGRAM = """
import contextlib, io, json, sys
HEAVY, CASES = json.loads(sys.stdin.read())

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            asked.append(name)
            raise ModuleNotFoundError(f"{name} is heavy", name=name)

sys.meta_path.insert(0, Refuse())
from deit_jax.__main__ import main
said = []
for words in CASES:
    asked, out, err = [], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    said.append([code, out.getvalue(), err.getvalue(), asked])
assert not set(HEAVY) & set(sys.modules)
print(json.dumps(said))
"""
TRAIN = ["train", QUICKSTART, "--workdir=runs/x"]
MISTAKES = [  # (words, what the line must hold)
    ([*TRAIN, "--wrkdir=x"], "--wrkdir: no such flag; did you mean --workdir?"),
    ([*TRAIN, "--zzz"], "--zzz: no such flag; --help lists them all"),
    ([*TRAIN, "stray"], "unexpected argument 'stray'"),
    (
        [*TRAIN, "--config.bach_size=3"],
        "--config.bach_size: no such field; did you mean batch_size?",
    ),
    ([*TRAIN, "--config.batch_size=big"], "--config.batch_size=big: not a whole number"),
    ([*TRAIN, "--config.optim.lr=fast"], "--config.optim.lr=fast: not a number"),
    ([*TRAIN, "--config.data.exif=maybe"], "--config.data.exif=maybe: give true or false"),
    ([*TRAIN, "--replay_step=x"], "replay_step"),
    ([*TRAIN, "--reproduce=runs/y"], "--reproduce takes the config from the run"),
    ([*TRAIN, "--config.data.mean[0]=1"], "set all of --config.data.mean at once"),
    (["train", QUICKSTART], "--workdir=… is missing"),
    (["train", "--workdir=x"], "--config=… is missing"),
    (["train", "--config=nowhere.py", "--config.lr=1", "--workdir=x"], "nowhere.py: no such file"),
    (["train", "--config", "nowhere.py", "--workdir=x"], "nowhere.py: no such file"),
    (["train", "--config=configs/deit.py:variant=x", "--workdir=x"], "choose tiny, small or base"),
    (["train", "--config.lr=1", "--workdir=x"], "--config.lr: a field of a config; name the"),
    (["train", "--config.epochs=1", QUICKSTART], "--config.epochs: write --config=FILE before"),
    (["train", "--workdir=s3://b/x", QUICKSTART], "Orbax has no driver for it; take gs://"),
    (["eval", "--probe=kn", "--workdir=x"], "--probe=kn"),
    (["eval"], "give either --workdir=DIR or --weights=W"),
    (["eval", "--checkpoint=last", "--workdir=x"], "checkpoint=last"),
    (["report", "--images=0", "--workdir=x"], "--images=0"),
    (["analyze"], "--workdir=… is missing"),
    (["predict", "--weights=x"], "no image given"),
    (["predict", "--weights=x", "--format=xml", "a.jpg"], "--format=xml"),
    (["predict", "--weights=x", "--out=a.xml", "a.jpg"], "--out=a.xml: give it one of .csv"),
    (
        ["predict", "--weights=x", "--top_k=3", "a.jpg"],
        "--top_k: no such flag; did you mean --topk?",
    ),
    (["demo"], "--weights=… is missing"),
    (["demo", "--weights=x", "--examples=-1"], "--examples=-1"),
    (["demo", "--weights=x", "--space=d", "--share"], "leave --share out"),
    (["embed", "--weights=x"], "--out=… is missing"),
    (["embed", "--weights=x", "--features=cl", "--out=x.npy", "i"], "--features=cl"),
    (["convert", "a"], "give SRC and DST"),
    (["convert", "a", "b", "--to=onnx"], "--to=onnx"),
    (["convert", "a", "b", "--head=keep"], "--head=keep"),
    (["prepare", "a"], "give SRC and DST"),
    (["inspect"], "give either --config=FILE or --workdir=DIR"),
    (["bench", QUICKSTART, "--input-only", "--compare"], "--compare is of the training step"),
    (["tape"], "give record, join, check, info"),
    (["tape", "info", "x", "--steps=1:2"], "--steps: `deit tape info` does not take it"),
    (["tape", "join", "x"], "give deit tape join DST SRC…"),
    (["plan", QUICKSTART], "--topology=… is missing"),
    (["tain"], "unknown command 'tain'; did you mean 'train'?"),
]
HELPS = [[name, word] for name in program.COMMANDS for word in ("--help", "-h")]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Return what one process that cannot import anything heavy says to each command line."""
    cases = [*HELPS, *(words for words, _ in MISTAKES)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([HEAVY, cases]),
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("here"),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return {tuple(words): said for words, said in zip(cases, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_imports_nothing_that_takes_long(answers, words):
    code, out, err, asked = answers[tuple(words)]
    assert (code, err, asked) == (0, "", [])
    assert f"usage: deit {words[0]}" in out
    assert "Flags:" in out


@pytest.mark.parametrize(("words", "part"), MISTAKES, ids=[" ".join(w) for w, _ in MISTAKES])
def test_a_usage_error_is_told_without_any_either(answers, words, part):
    code, out, err, asked = answers[tuple(words)]
    assert (code, out, asked) == (1 if "a.xml" in part else 2, "", [])
    assert part in err
    assert len(err.splitlines()) == 1


def test_choices_are_those_of_the_functions():
    assert probe._SCORES.keys() == choices.PROBES.keys()


# The command lines of facebookresearch/deit's main.py and timm's train.py, and what others write.
USUAL = {
    **{"learning_rate": "optim.lr", "blr": "optim.lr", "wd": "optim.weight_decay"},
    **{"batch": "batch_size", "per_device_train_batch_size": "batch_size", "b": "batch_size"},
    **{"num_train_epochs": "epochs", "train.epochs": "epochs", "input_size": "model.image_size"},
    **{
        "img_size": "model.image_size",
        "image_size": "model.image_size",
        "in_chans": "model.in_channels",
    },
    **{"resolution": "model.image_size", "drop": "model.dropout", "dropout": "model.dropout"},
    **{"drop_path": "model.drop_path", "drop_path_rate": "model.drop_path", "model": "model.name"},
    **{
        "model_ema": "optim.ema_decay",
        "model_ema_decay": "optim.ema_decay",
        "ema": "optim.ema_decay",
    },
    **{"opt": "optim.name", "optimizer": "optim.name", "opt_eps": "optim.eps"},
    **{"opt_betas": "optim.b1", "clip_grad": "optim.clip_norm", "momentum": "optim.b1"},
    **{"weight_decay": "optim.weight_decay", "warmup_lr": "optim.warmup_lr"},
    **{
        "min_lr": "optim.min_lr",
        "warmup_epochs": "optim.warmup_epochs",
        "warmup": "optim.warmup_epochs",
    },
    **{"color_jitter": "augment.color_jitter", "aa": "augment.auto", "smoothing": "loss.smoothing"},
    **{"label_smoothing": "loss.smoothing", "bce_loss": "loss.kind", "src": "augment.crop"},
    **{"repeated_aug": "augment.repeats", "aug_repeats": "augment.repeats"},
    **{
        "ThreeAugment": "augment.auto",
        "reprob": "augment.erase_prob",
        "mixup": "mixing.mixup_alpha",
    },
    **{"mixup_alpha": "mixing.mixup_alpha", "cutmix": "mixing.cutmix_alpha"},
    **{"mixup_prob": "mixing.prob", "mixup_switch_prob": "mixing.switch_prob"},
    **{"teacher_model": "teacher.model.name", "teacher_path": "teacher.weights"},
    **{"distillation_type": "distill.kind", "distillation_alpha": "distill.alpha"},
    **{"distillation_tau": "distill.tau", "alpha": "distill.alpha", "tau": "distill.tau"},
    **{"temperature": "distill.tau", "finetune": "init.weights", "attn_only": "optim.tune"},
    **{"data_path": "data.source", "data_set": "data.source", "dataset": "data.source"},
    **{"data_dir": "data.dir", "seed": "seed", "eval_crop_ratio": "data.eval_crop_ratio"},
    **{
        "crop_pct": "data.eval_crop_ratio",
        "num_workers": "data.threads",
        "workers": "data.threads",
    },
    **{"num_classes": "data.classes", "nb_classes": "data.classes", "val_split": "data.eval_split"},
    **{"train_split": "data.train_split", "mean": "data.mean", "std": "data.std", "amp": "dtype"},
    **{"precision": "dtype", "dtype": "dtype", "bf16": "dtype", "accum_iter": "optim.accum_steps"},
    **{"grad_accum_steps": "optim.accum_steps", "grad_checkpointing": "model.remat"},
    **{"validation_batch_size": "train.eval_batch_size", "layer_decay": "optim.layer_decay"},
    **{"log_interval": "train.log_every_steps", "checkpoint_hist": "train.keep_checkpoints"},
    **{"scale": "augment.crop_scale", "ratio": "augment.crop_ratio", "hflip": "augment.flip_prob"},
    **{"save_freq": "train.save_every_epochs", "patience": "train.patience_epochs"},
    # Another group, dashes, capitals, letters too many or too few.
    **{"optim.learning_rate": "optim.lr", "optimizer.weight_decay": "optim.weight_decay"},
    **{
        "train.batch_size": "batch_size",
        "model.ema_decay": "optim.ema_decay",
        "mixup.alpha": "mixing.mixup_alpha",
    },
    **{
        "teacher.learning_rate": "teacher.lr",
        "teacher.model.drop_path_rate": "teacher.model.drop_path",
    },
    **{"optim.clip-norm": "optim.clip_norm", "batch-size": "batch_size", "Optim.LR": "optim.lr"},
    **{
        "bach_size": "batch_size",
        "learnng_rate": "optim.lr",
        "optim.wieght_decay": "optim.weight_decay",
    },
    **{"teacher.image_sise": "teacher.image_size", "data.num_workers": "data.threads"},
    **{
        "distil.alpha": "distill.alpha",
        "distill.tua": "distill.tau",
        "loss.label_smoothing": "loss.smoothing",
    },
}


@pytest.mark.parametrize(("wrong", "right"), USUAL.items(), ids=USUAL)
def test_the_field_that_is_meant_is_named(wrong, right):
    found = suggest.fields(wrong, FIELDS)
    assert found[0] == right
    assert set(found) <= FIELDS.keys()


def test_the_right_name_in_another_group_names_every_group_that_has_it():
    assert suggest.fields("train.lr", FIELDS) == ["optim.lr", "teacher.lr"]
    assert set(suggest.fields("name", FIELDS)) == {"model.name", "optim.name", "teacher.model.name"}
    assert suggest.fields("qqqq", FIELDS) == []
    assert suggest.fields("model.foo.bar", FIELDS) == []


def test_synonyms_are_of_fields_that_there_are_and_of_one_each():
    assert set(suggest.SYNONYMS) <= FIELDS.keys()
    names = [name for names in suggest.SYNONYMS.values() for name in names]
    assert len(names) == len(set(names))
    assert not set(names) & FIELDS.keys()
    assert all(name == name.lower().replace("-", "_").replace(".", "_") for name in names)
    for name in names:
        assert set(suggest.fields(name, FIELDS)) <= FIELDS.keys()
    assert suggest.fields("learning_rate", ["rate", "mine.speed"]) == []  # of another config


def line(*words, config=True):
    command = Command("x", "")
    command.string("workdir", "", "")
    command.string("out", "", "")
    if config:
        command.add_config(list(words))
    with pytest.raises(UsageError) as error:
        command.parse(list(words))
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--config.learning_rate=1"],
            "--config.learning_rate: no such field; did you mean optim.lr? ",
        ),
        (
            ["--config.train.lr", "1"],
            "--config.train.lr: no such field; did you mean optim.lr or teacher.lr? ",
        ),
        (
            ["--config.optim.clip-norm=1"],
            "--config.optim.clip-norm: no such field; did you mean optim.clip_norm? ",
        ),
        (
            ["--noconfig.data.exiff"],
            "--noconfig.data.exiff: no such field; did you mean data.exif? ",
        ),
        (["--config.zzzzzz=1"], "--config.zzzzzz: no such field; "),
        (["--config.optim.lr.x=1"], "--config.optim.lr.x: no such field; did you mean optim.lr? "),
        (
            ["--config.model=deit"],
            "--config.model=deit: a group of fields; did you mean model.name? set one of them, ",
        ),
        (["--config.mesh=1"], "--config.mesh=1: a group of fields; set one of them, "),
    ],
)
def test_a_mistaken_field_is_one_line(words, expected):
    assert line(QUICKSTART, *words) == f"{expected}configs/base.py lists them all"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lr=1"], "--lr: no such flag; did you mean --config.optim.lr?"),
        (["--batch-size", "64"], "--batch_size: no such flag; did you mean --config.batch_size?"),
        (["--output_dir=x"], "--output_dir: no such flag; did you mean --workdir?"),
        (["--smothing=0"], "--smothing: no such flag; did you mean --config.loss.smoothing?"),
        (["--workdri=x"], "--workdri: no such flag; did you mean --workdir?"),
    ],
)
def test_a_field_or_flag_of_other_programs_is_named_with_ours(words, expected):
    assert line(QUICKSTART, *words) == expected
    assert line(*words) == expected


def test_a_command_without_a_config_suggests_no_fields():
    assert line("--lr=1", config=False) == "--lr: no such flag; --help lists them all"
    assert line("--oot=1", config=False) == "--oot: no such flag; did you mean --out?"


def test_fields_of_ones_own_config_are_suggested(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'mine': {'speed': 1.0}})\n"
    )
    words = [f"--config={tmp_path}/mine.py", "--config.mine.sped=1"]
    assert "did you mean mine.speed?" in line(*words)
    assert "did you mean mine.speed?" in line(words[0], "--config.speed=1")
    assert "did you mean" not in line(words[0], "--config.learning_rate=1")

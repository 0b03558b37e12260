"""What CONTRIBUTING promises: a new member of each registry is one file and one line."""

import importlib
import sys

import jax
import numpy as np
import pytest

import deit_jax
from deit_jax import __main__ as program
from deit_jax import cli
from deit_jax.data.sources import registry as sources
from deit_jax.models import registry as models
from deit_jax.step import objective
from deit_jax.storage import read_lines
from deit_jax.train.experiment import prepare
from deit_jax.train.run import train
from deit_jax.weights.convert import convert
from deit_jax.weights.load import open_model
from deit_jax.workdir.checkpoints import Checkpointer

FAMILY = '''
"""A convolution and a linear layer."""

import jax.numpy as jnp
from flax import linen as nn

from deit_jax.models.family import Family, ModelSpec
from deit_jax.models.heads import Heads


class Toy(nn.Module):
    num_classes: int
    width: int = 8
    dtype: object = jnp.float32

    feature_layer = "stem"

    @nn.compact
    def __call__(self, images, train: bool = False) -> Heads:
        x = nn.relu(nn.Conv(self.width, (3, 3), dtype=self.dtype, name="stem")(images))
        x = x.mean((1, 2))
        if self.num_classes:
            x = nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x)
        return Heads(x.astype(jnp.float32))


FAMILY = Family(
    cls=Toy,
    specs={"toy": ModelSpec(Toy, {}, image_size=16)},
    heads=("fc",),
    aliases=(("stem", "theirs.convolution"),),
    block=r"(stem)\\.",
    count_blocks=lambda model: 1,
)
'''
SOURCE = '''
"""Noise that is brighter in one class than in the other."""

import numpy as np

from deit_jax.data.sources.assemble import assemble
from deit_jax.data.sources.base import ArraySource


def open_source(rest, data):
    labels = np.arange(int(rest)) % 2
    noise = np.random.default_rng(0).integers(0, 128, (len(labels), 16, 16, 3), np.uint8)
    images = noise + 100 * labels[:, None, None, None].astype(np.uint8)
    source = ArraySource("toy", images, labels)
    return assemble(source, None, ["dark", "bright"], data)
'''
DISTILLATION = '''
"""The student's features, projected, shall be the teacher's (FitNets, arXiv 1412.6550)."""

import jax
import jax.numpy as jnp

from deit_jax.step.distill.base import Distillation


def target(outputs):
    return outputs.features


def loss(outputs, target, settings, extras):
    student = outputs.features @ extras["projection"]
    return jnp.mean(jnp.square(student - target))


def init(key, student, target):
    shape = (student.features.shape[-1], target.shape[-1])
    return {"projection": 0.02 * jax.random.normal(key, shape)}


FEATURES = Distillation(target, loss, features=True, init=init)
'''
COMMAND = '''
"""`deit toy`: say hello."""

from deit_jax.cli.flags import Command, no_words


def main(argv):
    """Run `deit toy`."""
    no_words(Command("toy", "usage: deit toy").parse(argv))
    print("hello")
'''


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Add one file and one line to each registry."""
    folder = tmp_path / "toys"
    folder.mkdir()
    texts = {"toy_family": FAMILY, "toy_source": SOURCE, "toy_features": DISTILLATION}
    for name, text in (texts | {"toy": COMMAND}).items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(folder)])
    found = {name: importlib.import_module(name) for name in texts}
    monkeypatch.setitem(models.FAMILIES, "toy", found["toy_family"].FAMILY)
    monkeypatch.setitem(sources.SOURCES, "toy", sources.Entry("toy_source", "toy:IMAGES"))
    monkeypatch.setitem(objective.DISTILLATIONS, "features", found["toy_features"].FEATURES)
    monkeypatch.setitem(cli.COMMANDS, "toy", cli.Entry("say hello"))
    yield folder
    for name in (*texts, "deit_jax.cli.toy"):
        sys.modules.pop(name, None)


@pytest.fixture
def config(toys, tiny_config):
    """A transformer that learns a toy teacher's features on toy images."""
    c = tiny_config
    c.data.source, c.data.eval_fraction, c.epochs = "toy:80", 0.2, 1.0
    c.distill.kind = "features"
    c.model.name, c.model.depth = "deit_tiny_patch16_224", 1
    c.teacher.model = type(c.model)(dict.fromkeys(c.teacher.model) | {"name": "toy"})
    c.augment.repeats, c.mixing.prob = 1, 0.0
    return c


def test_all_four_train_together_and_leave_a_plain_student(config, tmp_path):
    results = train(config, tmp_path / "run")
    assert results["teacher"]["top1"] >= 50
    lines = [r for r in read_lines(tmp_path / "run/metrics.jsonl") if "loss" in r]
    assert all(np.isfinite(r["loss_teacher"]) and r["loss_teacher"] > 0 for r in lines)
    mean = (lines[0]["loss_label"] + lines[0]["loss_teacher"]) / 2
    assert lines[0]["loss"] == pytest.approx(mean, rel=1e-5)
    _, params = deit_jax.load(str(tmp_path / "run"))
    plain = deit_jax.create_model("deit_tiny_patch16_224", 2, depth=1, width=24, image_size=16)
    plain = plain.clone(patch_size=4)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    assert jax.tree.map(np.shape, dict(params)) == jax.tree.map(np.shape, dict(shapes["params"]))
    # What distillation trains besides is in the checkpoint, and has learned.
    experiment, _ = prepare(config, tmp_path / "run")
    saver = Checkpointer(tmp_path / "run", keep=1, read_only=True)
    trained = saver.restore(experiment.abstract_state).params["distill"]["projection"]
    saver.close()
    begun = experiment.new_state().params["distill"]["projection"]
    assert trained.shape == begun.shape == (24, 8)
    assert np.abs(np.asarray(trained) - np.asarray(begun)).max() > 1e-5


def test_a_kind_without_a_form_on_tape_is_refused_there(config, tmp_path):
    config.teacher.tape = "record"
    with pytest.raises(deit_jax.errors.UserError, match=r"teacher.tape='record': .*kind=features"):
        train(config, tmp_path / "run")


def test_a_familys_weights_go_out_and_come_in_under_any_name(toys, tmp_path):
    model = deit_jax.create_model("toy", 5)
    variables = model.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    loaded = deit_jax.load("toy", num_classes=5)[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, variables["params"])
    from safetensors.numpy import load_file, save_file

    from deit_jax.weights.torch_names import to_torch

    flat = to_torch(variables)
    assert flat["fc.weight"].shape == (5, 8)
    theirs = {k.replace("stem", "theirs.convolution"): v for k, v in flat.items()}
    save_file(theirs, tmp_path / "theirs.safetensors")
    opened = open_model(tmp_path / "theirs.safetensors", "toy")
    convert(opened, tmp_path / "ours.safetensors")
    again = open_model(tmp_path / "ours.safetensors")
    assert again.name == "toy"
    assert len(again.classes) == 5
    assert load_file(tmp_path / "ours.safetensors").keys() == flat.keys()
    jax.tree.map(np.testing.assert_array_equal, again.variables["params"], variables["params"])


def test_a_command_is_run_and_listed(toys, capsys):
    assert program.main(["toy"]) == 0
    assert capsys.readouterr().out == "hello\n"
    assert program.main(["--help"]) == 0
    assert "  toy       say hello\n" in capsys.readouterr().out
    assert program.main(["toy", "word"]) == 2

"""Check `deit inspect`: the sheet shows the very tensors that the training step is given."""

import builtins
import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from deit_jax import __main__ as program
from deit_jax.analysis import input_sheet
from deit_jax.configs import quickstart
from deit_jax.data.batches import TrainBatches
from deit_jax.data.order import EpochOrder
from deit_jax.data.sources.registry import open_dataset
from deit_jax.models.heads import Heads
from deit_jax.step.state import TrainState
from deit_jax.step.train_step import train_step
from deit_jax.train.experiment import settings_of
from tests.tiny import resolved


def run(capsys, *words):
    code = program.main(["inspect", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip()


class Spy:
    """A model that keeps the images that train_step gives it."""

    def __init__(self):
        self.seen = []

    def apply(self, variables, images, train, rngs, mutable):
        jax.debug.callback(self.seen.append, images)
        return Heads(images.mean((1, 2)) * variables["params"], None), {}


def what_the_step_sees(config, dataset, number):
    """Return the images that the model in step.train_step is called with."""
    import optax

    order = EpochOrder(len(dataset.train), config.batch_size, config.augment.repeats, config.seed)
    batches = TrainBatches(dataset.train, order, config.augment, 16, range(config.batch_size))
    batch, spy, tx = batches(number), Spy(), optax.sgd(0.1)
    params = jax.numpy.ones(3)
    state = TrainState(jax.numpy.int32(number), params, {}, tx.init(params), None)
    settings = settings_of(config, 3)
    batch = {"image": jax.numpy.asarray(batch["image"]), "label": batch["label"] % 3}
    batch["label"] = jax.numpy.asarray(batch["label"])
    step = functools.partial(train_step, model=spy, teacher=None, tx=tx, settings=settings)
    jax.jit(step)(state, None, batch)
    jax.effects_barrier()
    images = np.asarray(spy.seen[0]) * np.array(settings.std) + np.array(settings.mean)
    return np.clip(255 * images, 0, 255)


@pytest.mark.parametrize("number", [0, 7])
def test_the_images_are_those_that_the_training_step_sees(tiny_config, number):
    tiny_config.distill.kind = "none"
    tiny_config.augment.erase_prob = 0.5
    dataset = open_dataset(tiny_config.data)
    expected = what_the_step_sees(tiny_config, dataset, number)
    for count in (5, 8, 32):  # part of a mixing group, a whole one, all of the batch
        images, targets = input_sheet.model_inputs(
            resolved(tiny_config, dataset), dataset, number, count
        )
        assert images.shape == (count, 16, 16, 3)
        assert np.abs(images - expected[:count]).max() <= 0.51  # rounded to whole pixels
        assert np.allclose(targets.sum(1), 1, atol=1e-6)


def test_targets_are_the_labels_of_the_batch_and_the_partners(tiny_config):
    dataset = open_dataset(tiny_config.data)
    batch = resolved(tiny_config, dataset).batches(dataset, range(32))(3)
    _, targets = input_sheet.model_inputs(resolved(tiny_config, dataset), dataset, 3, 32)
    partners = np.roll(batch["label"].reshape(4, 8), 4, axis=1).ravel()
    for target, own, other in zip(targets, batch["label"], partners, strict=True):
        assert set(np.flatnonzero(target > 1e-6)) <= {own, other}


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ([0, 1, 0], "dog"),
        ([0.7, 0.3, 0], "cat 0.70 + dog 0.30"),
        ([0.2, 0, 0.8], "eel 0.80 + cat 0.20"),
        ([0.999, 0.001, 0], "cat"),
    ],
)
def test_labels_tell_the_mixture(target, text):
    assert input_sheet.label_text(np.array(target), ["cat", "dog", "eel"]) == text


def test_the_command_writes_a_sheet_and_the_labels(capsys, tmp_path):
    out = tmp_path / "sheet.png"
    config = f"--config={quickstart.__file__}"
    code, text, err = run(capsys, config, f"--out={out}", "--step=2", "--json")
    assert code == 0, err
    result = json.loads(text)
    assert (result["out"], result["step"], len(result["labels"])) == (str(out), 2, 64)
    with Image.open(out) as sheet:
        assert sheet.size == (1600, 1750)
        assert np.asarray(sheet.convert("L")).std() > 20


def test_each_mistake_is_one_line(capsys, tmp_path, monkeypatch):
    config, out = f"--config={quickstart.__file__}", f"--out={tmp_path}/sheet.png"

    def error(*words):
        code, _, err = run(capsys, *words)
        assert len(err.splitlines()) == 1, err
        return code, err

    assert error()[0] == error(config, f"--workdir={tmp_path}")[0] == 2
    assert "no such folder" in error(config, out, "--config.data.source=folder:/nowhere")[1]
    assert "cannot be written (No such file" in error(config, "--out=/nowhere/a.png")[1]
    assert "cannot be written" in error(config, f"--out={tmp_path}/sheet.xyz")[1]
    assert "--step" in error(config, out, "--step=-1")[1]
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "matplotlib is missing; pip install 'deit_jax[viz]'" in error(config, out)[1]

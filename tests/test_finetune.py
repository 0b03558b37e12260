"""configs/finetune.py on a folder of images, from a run with other classes."""

import json

import numpy as np
import pytest
from PIL import Image

from deit_jax.configs import finetune
from deit_jax.errors import UserError
from deit_jax.train.run import train
from deit_jax.workdir.saved_run import load_run
from tests.tiny import make_tiny_config, train_without_picture

pytestmark = pytest.mark.eight_devices


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    c = make_tiny_config()
    c.distill.kind, c.epochs, c.optim.ema_decay = "none", 1.0, 0.0
    train_without_picture(c, workdir)
    return workdir


@pytest.fixture
def photographs(tmp_path):
    """Write 100 images of three classes that differ in brightness."""
    rng = np.random.default_rng(0)
    for number in range(100):
        place = tmp_path / "images" / "abc"[number % 3] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 80, (20, 20, 3)) + 80 * (number % 3)
        Image.fromarray(pixels.astype(np.uint8)).save(place)
    return tmp_path / "images"


def small(c, pretrained):
    c.model.image_size, c.model.patch_size, c.model.width, c.model.depth = 16, 4, 24, 2
    c.init.weights, c.epochs = str(pretrained), 2.0
    c.optim.warmup_epochs, c.data.threads = 1.0, 2
    return c


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["all", "linear_probe"])
def test_a_folder_is_learned_from_a_run_of_other_classes(pretrained, photographs, tmp_path, tune):
    c = small(finetune.get_config(f"data={photographs},variant=tiny,distilled=True"), pretrained)
    c.optim.tune = tune
    results = train(c, tmp_path / "run")
    run, start = load_run(tmp_path / "run", checkpoint="best"), load_run(pretrained)
    assert run.classes == ["a", "b", "c"]
    assert run.variables["params"]["head"]["kernel"].shape == (24, 3)
    backbone = [r.variables["params"]["blocks_0"]["mlp"]["fc1"]["kernel"] for r in (run, start)]
    assert np.array_equal(*backbone) == (tune == "linear_probe")
    assert {"cls", "dist", "fused"} <= results.keys()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["loss"]["heads"] == "both"  # or the fused prediction would average noise
    assert config["data"]["source"] == f"folder:{photographs}"


def test_what_it_cannot_do_without_is_asked_for():
    c = finetune.get_config("data=digits")
    assert (c.data.source, c.loss.heads) == ("digits", "cls")
    with pytest.raises(UserError, match=r"init\.weights"):
        train(c, "/nowhere")
    c.init.weights, c.data.source = "x", finetune.get_config().data.source
    with pytest.raises(UserError, match=r"source=.folder:.: give digits"):
        train(c, "/nowhere")

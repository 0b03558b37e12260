"""The picture of README: both tokens' attention, drawn from any distilled model's weights."""

import importlib.util
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from PIL import Image

import deit_jax

FRONT = Path(__file__).parent.parent / "docs/figures/front.py"


@pytest.fixture(scope="module")
def front():
    spec = importlib.util.spec_from_file_location("front", FRONT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_weights(path, name):
    _, params = deit_jax.load(name)
    path.write_bytes(msgpack_serialize(jax.tree.map(np.asarray, dict(params))))
    return path


def test_a_picture_is_lit_where_a_token_reads_it(front):
    picture = np.full((32, 48, 3), 100, np.uint8)
    grid = np.zeros((2, 3), np.float32)
    grid[1, 2] = 0.5
    lit = front.lit(picture, grid, (255, 128, 0)).astype(int)
    assert lit.shape == picture.shape
    assert lit[24, 44, 0] > 150 > 2 * lit[24, 44, 2]
    assert len(set(lit[4, 4])) == 1  # grey
    assert lit[4, 4, 0] < 50


def test_a_photograph_and_any_distilled_weights_become_a_png(front, tmp_path, monkeypatch):
    weights = write_weights(tmp_path / "w.msgpack", "deit_tiny_distilled_patch16_224")
    names = []
    for i, shape in enumerate([(300, 400, 3), (256, 256, 3)]):
        noise = np.random.default_rng(i).integers(0, 256, shape, np.uint8)
        names.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(noise).save(names[-1])
    words = [f"--weights={weights}", *(f"--image={n}" for n in names), f"--out={tmp_path}/o.png"]
    monkeypatch.setattr(sys, "argv", ["front.py", *words])
    front.main()
    with Image.open(tmp_path / "o.png") as drawn:
        assert drawn.mode == "RGBA"  # on a light page and on a dark one
        assert drawn.width > 300
        colours = np.asarray(drawn)
    assert not colours[0, 0, 3]
    monkeypatch.setattr(sys, "argv", ["front.py", words[0], "--out=x.png"])
    with pytest.raises(SystemExit, match=r"no run with data of its own; give --image=FILE"):
        front.main()


def test_a_model_of_one_token_is_refused(front, monkeypatch):
    plain = types.SimpleNamespace(
        model=deit_jax.create_model("deit_tiny_patch16_224"), name="deit_tiny_patch16_224"
    )
    monkeypatch.setattr(front, "open_classifier", lambda source: plain)
    with pytest.raises(SystemExit, match=r"patch16_224 has no distillation token and head"):
        front.opened_images("w.pth", [], "")

"""SavedModels answer in TensorFlow, which knows nothing of this code, and become LiteRT files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import erf

from deit_jax.export import savedmodel
from deit_jax.weights.convert import convert
from tests.test_convert import DISTILLED, SMALL
from tests.test_export import close, heads, noise, normalised, of

TENSORFLOW = Path(sys.prefix) / "tensorflow"  # the Makefile puts it there, out of the others' way
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TENSORFLOW.is_dir(), reason="make .venv/installed-tensorflow"),
]
# Programs of people who have TensorFlow alone.
ANSWER = """
import sys, numpy as np, tensorflow as tf
folder, images, out = sys.argv[1:]
module = tf.saved_model.load(folder)
said = module.signatures["serving_default"](images=tf.constant(np.load(images)))
np.savez(out, **{k: v.numpy() for k, v in said.items()})
assert "deit_jax" not in sys.modules
"""
LITE = """
import sys, numpy as np, tensorflow as tf
folder, images, out = sys.argv[1:]
content = tf.lite.TFLiteConverter.from_saved_model(folder).convert()
run = tf.lite.Interpreter(model_content=content).get_signature_runner()
np.savez(out, **run(images=np.load(images)))
"""


def python(*words):
    environment = dict(os.environ, PYTHONPATH=str(TENSORFLOW), TF_CPP_MIN_LOG_LEVEL="2")
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def answers(program, folder, images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    python("-c", program, str(folder), str(tmp_path / "images.npy"), str(tmp_path / "out.npz"))
    return dict(np.load(tmp_path / "out.npz"))


EXPORT = """
import sys
from deit_jax import __main__
source, whole, fixed = sys.argv[1:]
words = ["export", source, "--to=savedmodel", "--json"]
assert __main__.main([*words, whole, "--heads=apart", "--preprocess"]) == 0
assert __main__.main([*words, fixed, "--batch=1", "--platforms=cpu"]) == 0
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return weights, and a folder with `whole`, of whole images, and `fixed`, of a batch of 1."""
    folder = tmp_path_factory.mktemp("exported")
    weights = of(DISTILLED, SMALL, crop_ratio=0.8)
    convert(weights, folder / "w.safetensors")
    paths = [str(folder / name) for name in ("w.safetensors", "whole", "fixed")]
    for line in python("-c", EXPORT, *paths).splitlines():
        assert json.loads(line)["verified"]["difference"] <= 1e-5
    return weights, folder


def test_tensorflow_answers_as_the_model_does(exported, tmp_path):
    weights, folder = exported
    about = json.loads((folder / "whole" / "assets" / "metadata.json").read_text())
    assert about["classes"] == ["cat", "dog", "owl"]
    image = np.random.default_rng(3).integers(0, 256, (2, 41, 60, 3)).astype(np.uint8)
    views = np.stack([weights.view(x, "image") for x in image])
    found = answers(ANSWER, folder / "whole", image, tmp_path)
    for head, logits in heads(weights, normalised(views)).items():
        assert np.abs(found[head] - logits).max() < 0.02 * np.abs(logits).max()


def test_a_fixed_batch_becomes_a_litert_file(exported, tmp_path):
    weights, folder = exported
    images = normalised(noise(1, 32))
    both = heads(weights, images)
    found = answers(LITE, folder / "fixed", images, tmp_path)["logits"]
    assert close(found, (both["cls"] + both["dist"]) / 2)


def test_the_error_function_is_scipys():
    x = np.linspace(-6, 6, 100_001).astype(np.float32)
    assert np.abs(np.asarray(savedmodel.erf(savedmodel.jnp.asarray(x))) - erf(x)).max() < 5e-7

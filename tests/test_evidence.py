"""The study of the paper's claims, at toy size, against scikit-learn, scipy and its own runs."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score

from tests.test_sources import open_data

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "benchmarks" / "evidence"


@pytest.fixture
def evidence(monkeypatch):
    """Import a script of the study, which find each other as scripts do."""
    monkeypatch.syspath_prepend(str(EVIDENCE))
    return importlib.import_module


def run(table, folder, *more):
    command = [sys.executable, EVIDENCE / f"{table}.py", "--scale=toy", "--seeds=1"]
    command += [f"--runs={folder / 'runs'}", f"--out={folder}", f"--data={folder / 'idx'}", *more]
    # One device, and programs that are quick to compile.
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=500, env=env
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Run table 4 on digits for clothes: a convnet, a student with it and one without."""
    folder = tmp_path_factory.mktemp("evidence")
    sys.path.insert(0, str(EVIDENCE))
    study = importlib.import_module("study")
    sys.path.remove(str(EVIDENCE))
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) * 15.9
    (folder / "idx").mkdir()
    for part, chosen in (("train", slice(1000)), ("t10k", slice(1000, 1500))):
        study.write_idx(folder / "idx" / f"{part}-images-idx3-ubyte.gz", images[chosen])
        study.write_idx(folder / "idx" / f"{part}-labels-idx1-ubyte.gz", labels[chosen])
    done = run("table4", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_subset_has_as_many_images_of_every_class(toy):
    dataset = open_data("fashion_mnist", dir=str(toy / "runs" / "toy" / "data"))
    assert np.bincount(dataset.train.labels).tolist() == [20] * 10
    assert len(dataset.eval) == 500
    everything = open_data("fashion_mnist", dir=str(toy / "idx"))
    every = (everything.train[i] for i in range(1000))
    known = {example["image"].tobytes(): example["label"] for example in every}
    for i in range(200):
        assert known[dataset.train[i]["image"].tobytes()] == dataset.train[i]["label"]


@pytest.mark.slow
def test_the_disagreement_with_the_labels_is_the_error(toy):
    arms = json.loads((toy / "table4-toy.json").read_text())["arms"]
    token, none = arms["token"]["seeds"]["0"], arms["none"]["seeds"]["0"]
    assert token["classifiers"] == ["truth", "convnet", "none", "cls", "dist", "fused"]
    errors = [token["teacher"], none["fused"], token["cls"], token["dist"], token["fused"]]
    shares = np.array(token["disagreement"])
    np.testing.assert_allclose(shares[0, 1:], 1 - np.array(errors) / 100, atol=1e-9)
    np.testing.assert_array_equal(shares, shares.T)


@pytest.mark.slow
def test_predictions_are_those_that_a_run_was_judged_by(toy, evidence):
    said = evidence("measures").predictions(toy / "runs" / "toy" / "token-0")
    results = json.loads((toy / "runs" / "toy" / "token-0" / "results.json").read_text())
    for head in ("cls", "dist", "fused"):
        assert 100 * accuracy_score(said["truth"], said[head]) == pytest.approx(
            results[head]["top1"]
        )


@pytest.mark.slow
def test_what_is_finished_is_not_trained_again(toy):
    before = (toy / "table4-toy.json").read_text()
    history = (toy / "runs" / "toy" / "token-0" / "history.jsonl").read_text()
    done = run("table4", toy)
    assert done.returncode == 0, done.stderr
    assert "== " not in done.stdout
    assert json.loads((toy / "table4-toy.json").read_text()) == json.loads(before)
    assert (toy / "runs" / "toy" / "token-0" / "history.jsonl").read_text() == history


def test_spread_is_mean_and_standard_error(evidence):
    spread, values = evidence("render").spread, [81.2, 83.0, 80.5, 82.25]
    assert spread(values, 2) == f"{np.mean(values):.2f} ± {stats.sem(values):.2f}"
    assert spread(values[:1], 1, sign=True) == "+81.2"
    assert spread([], 2) == "owed"


def test_differences_are_between_runs_of_the_same_seed(evidence, monkeypatch, tmp_path):
    render = evidence("render")
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    own, other = [80.0, 82.0, 85.0], [79.0, 82.5, 83.0, 50.0]
    arms = {
        name: {"seeds": {str(i): {"fused": v} for i, v in enumerate(values)}}
        for name, values in (("own", own), ("other", other))
    }
    (tmp_path / "t-cpu.json").write_text(json.dumps({"arms": arms, "scale": {"seeds": 4}}))
    found, paired = render.Found("t", "cpu"), np.subtract(own, other[:3])
    assert found.difference("own", "fused", "other", "fused") == (
        f"{paired.mean():+.2f} ± {stats.sem(paired):.2f}"
    )
    assert found.cell("own", "fused").endswith("(n=3)")
    assert found.cell("none", "fused") == "owed"


def test_the_docs_hold_what_was_measured(evidence):
    render = evidence("render")
    text = "\n".join(render.section(*which, "cpu") for which in render.SECTIONS)
    assert text.strip() in (ROOT / "docs" / "results.md").read_text()

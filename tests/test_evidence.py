"""The study of the paper's claims, at toy size, against scikit-learn, scipy and its own runs."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score

from deit_jax.train.experiment import resolve
from deit_jax.weights.load import open_model
from tests import timm_reference
from tests.test_sources import open_data

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "benchmarks" / "evidence"
TOKENS = ("cls_token", "dist_token")


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


@pytest.fixture(scope="module")
def timm_side():
    """Return the study's part in timm and PyTorch, which a test may go without."""
    timm_reference.import_timm()
    sys.path.insert(0, str(EVIDENCE))
    module = importlib.import_module("timm_side")
    sys.path.remove(str(EVIDENCE))
    return module


@pytest.fixture
def recipe(toy, evidence):
    """Return the toy study's config of a student, its data and the workdir of its teacher."""
    study = evidence("study")
    runs = toy / "runs" / "toy"
    config = study.student_config(study.SCALES["toy"], runs / "data")
    return study.finish(config, 200, 0), study.open_dataset(config.data), runs / "teacher-convnet-0"


@pytest.mark.slow
def test_the_teacher_says_the_same_in_timm(timm_side, recipe, evidence):
    config, dataset, workdir = recipe
    study = evidence("study")
    sizes = study.teacher_config("convnet", study.SCALES["toy"], "").model
    network = timm_side.teacher(workdir, sizes, 10)
    images = next(iter(timm_side.eval_loader(config, dataset.eval)))[0][:64]
    opened = open_model(workdir)
    own = opened.model.apply(
        opened.variables, jax.numpy.asarray(images.permute(0, 2, 3, 1)), train=False
    )
    with timm_side.torch.inference_mode():
        theirs = network(images).numpy()
    np.testing.assert_allclose(own.fused(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_timm_is_given_the_recipe(timm_side, recipe, evidence):
    config, dataset, _ = recipe
    config.teacher.weights = "given"
    sizes = evidence("study").teacher_config("convnet", evidence("study").SCALES["toy"], "").model
    run = timm_side.Training(config, dataset, timm_side.Convnet(sizes, 10))
    ours = resolve(config, 10, len(dataset.train), whole=True)
    assert len(run.loader) * config.epochs == ours.total_steps
    labels = np.concatenate([labels for _, labels in run.loader])
    np.testing.assert_array_equal(labels[:180].reshape(-1, 3).std(1), 0)  # three copies in a row
    rates = []
    for _ in range(2):
        for images, labels in run.loader:
            rates.append(run.optimizer.param_groups[0]["lr"])
            run.update(images, labels)
    np.testing.assert_allclose(rates, [ours.schedule(i) for i in range(len(rates))], rtol=1e-5)
    leaves = jax.tree.leaves(jax.eval_shape(ours.new_state).params)
    sizes = sorted(np.prod(leaf.shape) for leaf in leaves)
    assert sizes == sorted(p.numel() for p in run.model.parameters())


def looks(images):
    """Return figures of each image [B H W 3] of bytes: light, contrast, slopes, black and white."""
    grey = images.mean(-1)
    return {
        "light": grey.mean((1, 2)),
        "contrast": grey.std((1, 2)),
        "slope along x": np.abs(np.diff(grey, axis=2)).mean((1, 2)),
        "slope along y": np.abs(np.diff(grey, axis=1)).mean((1, 2)),
        "left against right": (grey[:, :, :16] - grey[:, :, 16:]).mean((1, 2)),
        "top against bottom": (grey[:, :16] - grey[:, 16:]).mean((1, 2)),
        "black": (images < 1).mean((1, 2, 3)),
        "white": (images > 254).mean((1, 2, 3)),
    }


@pytest.mark.slow
def test_both_loaders_make_the_same_images_of_the_same_files(timm_side, recipe):
    """The same in distribution: of three copies of an image one is looked at."""
    config, dataset, _ = recipe
    config.augment.crop, config.augment.erase_prob = "random_resized", 0.0
    config.teacher.weights = "given"
    timm_side.start_process_group()
    timm_side.timm_utils.random_seed(0, 0)
    loader = timm_side.train_loader(config, dataset.train, 0)
    mean, std = np.array(config.data.mean), np.array(config.data.std)
    theirs = []
    for epoch in range(20):
        loader.sampler.set_epoch(epoch)
        theirs += [255 * (x.permute(0, 2, 3, 1).numpy() * std + mean) for x, _ in loader]
    ours = resolve(config, 10, len(dataset.train), whole=True)
    batches = ours.batches(dataset)
    own = [batches(step)["image"].astype(np.float32) for step in range(len(theirs))]
    own, theirs = (looks(np.round(np.concatenate(images))[::3]) for images in (own, theirs))
    for name, values in own.items():
        assert stats.ks_2samp(values, theirs[name]).pvalue > 0.001, name


@pytest.mark.slow
def test_timm_meets_the_images_in_our_order(timm_side, recipe):
    config, dataset, _ = recipe
    config.seed, config.teacher.weights = 3, "given"
    run = timm_side.Training(config, dataset, timm_side.torch.nn.Identity(), our_order=True)
    batches = resolve(config, 10, len(dataset.train), whole=True).batches(dataset)
    theirs = []
    for epoch in range(2):
        run.order.set_epoch(epoch)
        theirs += [labels.numpy() for _, labels in run.loader]
    assert len(np.unique(np.stack(theirs))) == 10
    for step, labels in enumerate(theirs):
        np.testing.assert_array_equal(batches(step)["label"], labels)


@pytest.mark.slow
def test_ours_starts_and_decays_its_tokens_as_timm_does(timm_side, recipe, evidence):
    config, dataset, _ = recipe
    frameworks = evidence("frameworks")
    config.teacher.weights = "given"
    theirs = timm_side.Training(config, dataset, timm_side.torch.nn.Identity())
    undecayed = {id(p) for p in theirs.optimizer.param_groups[0]["params"]}

    def start():
        ours = resolve(config, 10, len(dataset.train), whole=True)
        params = ours.new_state().params
        mask = frameworks.optimizer.decay_mask(params)
        return {name: (float(params[name].std()), mask[name]) for name in TOKENS}

    with frameworks.PARTS["recipe-ours-timms-tokens"]():
        as_timm = start()
    for name, (deviation, decayed) in as_timm.items():
        value = getattr(theirs.model, name)
        assert deviation == pytest.approx(value.std().item(), rel=0.7)
        assert decayed == (id(value) not in undecayed)
    assert start()["cls_token"][0] == pytest.approx(0.02, rel=0.7)
    assert start()["dist_token"][1]


@pytest.mark.slow
def test_timm_goes_on_from_its_last_epoch(
    timm_side, recipe, evidence, tmp_path, capsys, monkeypatch
):
    config, _, workdir = recipe
    sizes = evidence("study").teacher_config("convnet", evidence("study").SCALES["toy"], "").model
    first = timm_side.train_once(config, workdir, sizes, tmp_path / "run")
    epoch = timm_side.Training.epoch

    def stopped(self, number):
        if number:
            raise KeyboardInterrupt
        return epoch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(timm_side.Training, "epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            timm_side.train_once(config, workdir, sizes, tmp_path / "stopped")
    capsys.readouterr()
    assert timm_side.train_once(config, workdir, sizes, tmp_path / "stopped") == first
    assert "epoch 1" not in capsys.readouterr().out
    assert timm_side.train_once(config, workdir, sizes, tmp_path / "run") == first
    assert "epoch" not in capsys.readouterr().out
    ends = [
        timm_side.torch.load(tmp_path / name / "last.pt", weights_only=False)["model"]
        for name in ("run", "stopped")
    ]
    for name, value in ends[0].items():
        assert timm_side.torch.equal(value, ends[1][name]), name
    assert min(first["fused"], first["teacher"]) > 0


def test_spread_is_mean_and_standard_error(evidence):
    spread, values = evidence("found").spread, [81.2, 83.0, 80.5, 82.25]
    assert spread(values, 2) == f"{np.mean(values):.2f} ± {stats.sem(values):.2f}"
    assert spread(values[:1], 1, sign=True) == "+81.2"
    assert spread([], 2) == "owed"


def test_an_interval_holds_the_truth_in_19_of_20_studies(evidence):
    bounds, rng = evidence("found").bounds, np.random.default_rng(0)
    ends = np.array([bounds(rng.normal(0.4, 1.3, 5)) for _ in range(4000)])
    held = np.mean((ends[:, 1] < 0.4) & (ends[:, 2] > 0.4))
    assert abs(held - 0.95) < 0.012  # three and a half standard errors


def test_a_joint_interval_is_that_of_the_textbook(evidence):
    own, other = [61.0, 63.5, 62.2, 60.9, 64.0], [60.5, 62.0, 61.1]
    parts = [np.var(v, ddof=1) / len(v) for v in (own, other)]
    free = sum(parts) ** 2 / sum(
        p**2 / (len(v) - 1) for p, v in zip(parts, (own, other), strict=True)
    )
    mean, half = np.mean(own) - np.mean(other), stats.t.ppf(0.975, free) * sum(parts) ** 0.5
    assert evidence("found").joint(own, other) == (
        f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"
    )


def test_power_is_how_often_a_test_finds_the_difference(evidence):
    power, rng = evidence("power"), np.random.default_rng(0)
    for seeds, difference, deviation in ((5, 0.9, 0.5), (8, 0.5, 0.5), (11, 0.5, 0.52)):
        studies = rng.normal(difference, deviation, (20_000, seeds))
        found = np.mean(stats.ttest_1samp(studies, 0.0, axis=1).pvalue < 0.05)
        assert power.power(seeds, difference, deviation) == pytest.approx(found, abs=0.012)
    # Cohen (1988), table 2.4.1: about 33 pairs find a difference of half a deviation.
    assert abs(power.seeds_for(0.5, 1.0) - 34) <= 1


def test_deviations_are_pooled_about_their_own_means(evidence):
    groups = [[1.0, 2.0, 3.0], [10.0, 14.0]]
    deviation, free = evidence("power").pooled(groups)
    assert free == 3
    assert deviation == pytest.approx(np.sqrt((2 * np.var(groups[0], ddof=1) + 8.0) / 3))


def test_differences_are_between_runs_of_the_same_seed(evidence, monkeypatch, tmp_path):
    found = evidence("found")
    monkeypatch.setattr(found, "RESULTS", tmp_path)
    own, other = [80.0, 82.0, 85.0], [79.0, 82.5, 83.0, 50.0]
    arms = {
        name: {"seeds": {str(i): {"fused": v} for i, v in enumerate(values)}}
        for name, values in (("own", own), ("other", other))
    }
    (tmp_path / "t-cpu.json").write_text(json.dumps({"arms": arms, "scale": {"seeds": 4}}))
    table = found.Found("t", "cpu")
    result = stats.ttest_rel(own, other[:3])
    ends = result.confidence_interval(0.95)
    said = f"{np.mean(np.subtract(own, other[:3])):+.2f} ({ends.low:+.2f} to {ends.high:+.2f})"
    assert table.difference("own", "fused", "other", "fused") == said
    assert table.n("own", "fused") == "3"
    assert table.cell("none", "fused") == "owed"


def test_the_docs_hold_what_was_measured(evidence):
    render = evidence("render")
    text = "\n".join(render.section(*which, "cpu") for which in render.SECTIONS)
    assert text.strip() in (ROOT / "docs" / "results.md").read_text()
    assert evidence("short").short("cpu") in (ROOT / "README.md").read_text()

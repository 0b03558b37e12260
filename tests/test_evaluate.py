"""`deit eval` as published: the weights' own input, answers image by image, ReaL, probes."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import deit_jax
from deit_jax import __main__ as program
from deit_jax.analysis import probe
from deit_jax.data.classes import imagenet_list
from deit_jax.data.preprocess import InputSpec
from deit_jax.data.view import EvalView
from deit_jax.weights.fit import init_variables
from tests.tiny import save_weights

SIZE, COLOURS = 16, 6


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write images of six classes, coloured by their class, with ImageNet's names; the folder."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 7)):
        for label, name in enumerate(imagenet_list("labels")[:COLOURS]):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                colour = np.array([40 * label, 250 - 40 * label, 80 * (label % 3)])
                pixels = np.clip(colour + rng.normal(0, 40, (20, 24, 3)), 0, 255).astype(np.uint8)
                number = 1 + label * count + i
                path = folder / f"ILSVRC2012_val_{number:08}.JPEG"
                Image.fromarray(pixels).save(path, format="png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory, images):
    """Write a small distilled model to a file that says its input; return its path.

    Its blocks are random, its heads learned from the colours of every image and of every second.
    """
    name = "deit_tiny_distilled_patch16_224"
    fields = {"image_size": SIZE, "patch_size": 4, "width": 24, "depth": 2}
    model = deit_jax.create_model(name, num_classes=COLOURS, **fields)
    variables, mean, std = init_variables(model, 0), (0.3, 0.4, 0.5), (0.2, 0.3, 0.4)
    paths = [str(p) for p in sorted((images / "train").rglob("*.JPEG"))]
    spec = InputSpec(EvalView(SIZE, 0.7), mean, std)
    batch = jnp.asarray(deit_jax.preprocess(paths, spec))
    tokens = jax.jit(model.clone(num_classes=0).apply)(variables, batch)
    labels = np.arange(len(paths)) // 12
    for head, values, step in (("head", tokens.cls, 1), ("head_dist", tokens.dist, 2)):
        learned = LogisticRegression(C=1e4).fit(values[::step], labels[::step])
        variables["params"][head] = {
            "kernel": learned.coef_.T.astype(np.float32),
            "bias": learned.intercept_.astype(np.float32),
        }
    told = {"classes": imagenet_list("labels")[:COLOURS], "crop_ratio": 0.7}
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    return save_weights(path, name, model, variables, mean=mean, std=std, **told)


@pytest.fixture
def config(images, tmp_path):
    """Write a config of the images; return the file."""
    path = tmp_path / "config.py"
    path.write_text(
        "from deit_jax.configs import base\ndef get_config():\n    c = base.get_config()\n"
        f"    c.data.source = 'folder:{images}'\n    c.train.eval_batch_size = 16\n    return c\n"
    )
    return path


@pytest.fixture
def evaluate(config, weights, capsys):
    """Return a function that runs `deit eval` with some words: (code, stdout, stderr)."""

    def run(*words):
        words = ["eval", f"--config={config}", f"--weights={weights}", *words]
        return program.main(list(map(str, words))), *capsys.readouterr()

    return run


def answers_of(weights, paths, crop_ratio=0.7, mean=(0.3, 0.4, 0.5)):
    """Return each head's logits of image files, by the public functions."""
    model, params, spec = deit_jax.load(str(weights), return_spec=True)
    assert (spec.image_size, spec.crop_ratio, spec.mean) == (SIZE, 0.7, (0.3, 0.4, 0.5))
    view = dataclasses.replace(spec.view, crop_ratio=crop_ratio)
    spec = dataclasses.replace(spec, view=view, mean=mean)
    images = jnp.asarray(deit_jax.preprocess(paths, spec))
    heads = model.apply({"params": params}, images)
    return {"cls": heads.cls, "dist": heads.dist, "fused": heads.fused()}


def files(images):
    paths = sorted((images / "val").rglob("*.JPEG"))
    return [str(p) for p in paths], np.arange(len(paths)) // 7


def test_the_input_is_the_weights_own_unless_the_command_line_says_otherwise(
    evaluate, images, weights
):
    paths, labels = files(images)
    cases = [
        ((), {}),
        (("--config.data.eval_crop_ratio=1.0",), {"crop_ratio": 1.0}),
        (("--config.data.mean=(0.9,0.9,0.9)",), {"mean": (0.9,) * 3}),
    ]
    seen = []
    for words, changed in cases:
        code, out, err = evaluate("--json", *words)
        assert code == 0, err
        said = json.loads(out)
        for head, logits in answers_of(weights, paths, **changed).items():
            expected = 100 * float(np.mean(np.argmax(logits, 1) == labels))
            assert said[head]["top1"] == pytest.approx(expected)
        given = said["input"]
        assert given["crop_ratio"] == changed.get("crop_ratio", 0.7)
        assert given["mean"] == list(changed.get("mean", (0.3, 0.4, 0.5)))
        assert given["std"] == [0.2, 0.3, 0.4]
        seen.append(said["fused"])
    assert seen[0] != seen[2]  # or nothing would show
    _, out, _ = evaluate()
    assert out.splitlines()[0] == (
        "images of 16 x 16 pixels, crop 0.7, mean 0.3, 0.4, 0.5, std 0.2, 0.3, 0.4"
    )
    code, out, err = evaluate("--config.model.image_size=24")
    assert code == 0, err
    assert out.startswith("images of 24 x 24 pixels")


def test_answers_of_every_image(evaluate, images, weights, tmp_path):
    code, out, err = evaluate("--json", f"--out={tmp_path / 'a.csv'}")
    assert code == 0, err
    head, *body = csv.reader((tmp_path / "a.csv").read_text().splitlines())
    heads = ["cls", "dist", "fused"]
    assert head == ["path", "label", *(x for h in heads for x in (h, f"{h}_probability"))]
    paths, labels = files(images)
    names, logits = imagenet_list("labels"), answers_of(weights, paths)
    assert [row[:2] for row in body] == [
        [p, names[k]] for p, k in zip(paths, labels.tolist(), strict=True)
    ]
    for column, name in zip((2, 4, 6), heads, strict=True):
        best = np.argmax(logits[name], 1)
        share = np.exp(logits[name]) / np.exp(logits[name]).sum(1, keepdims=True)
        assert [row[column] for row in body] == [names[k] for k in best]
        said = [float(row[column + 1]) for row in body]
        np.testing.assert_allclose(said, share.max(1), atol=1e-4)
    _, plain, _ = evaluate("--json")
    assert json.loads(plain) == json.loads(out)  # looking changes no figure


@pytest.mark.parametrize("named", [False, True])
def test_real_labels(evaluate, images, weights, tmp_path, named):
    """An answer is right if it is one of the image's; those without any are not counted."""
    paths, _ = files(images)
    rng = np.random.default_rng(5)
    real = [rng.permutation(COLOURS)[: i % 4].tolist() for i in range(len(paths))]
    file = tmp_path / "real.json"
    keys = [p.rpartition("/")[2] for p in paths]
    file.write_text(json.dumps(dict(zip(keys, real, strict=True)) if named else real))
    code, out, err = evaluate("--json", f"--real_labels={file}")
    assert code == 0, err
    said = json.loads(out)["real_labels"]
    counted = [i for i, allowed in enumerate(real) if allowed]
    assert said["examples"] == len(counted)
    for head, logits in answers_of(weights, paths).items():
        best = np.argmax(logits, 1)
        right = np.mean([best[i] in real[i] for i in counted])
        assert said[head]["top1"] == pytest.approx(100 * right)
    _, out, _ = evaluate(f"--real_labels={file}")
    assert f"{len(counted)} examples with ReaL's labels" in out


def test_real_labels_of_other_images(evaluate, tmp_path):
    for content, line in (
        ("[[1], [2]]", r"2 labels for images called ILSVRC2012_val_00000001.JPEG and on"),
        ('{"a.JPEG": [1]}', "does not know ILSVRC2012_val_"),
        ("[1, 2]", "must be a list of lists of class numbers"),
        ("[", "not valid JSON"),
    ):
        (tmp_path / "real.json").write_text(content)
        code, _, err = evaluate(f"--real_labels={tmp_path / 'real.json'}")
        assert code == 1
        assert line in err.splitlines()[-1]
    code, _, err = evaluate(f"--real_labels={tmp_path / 'nowhere'}")
    assert "nowhere: cannot be read (No such file" in err.splitlines()[-1]


def pooled(weights, images, part):
    paths = sorted((images / part).rglob("*.JPEG"))
    model, params, spec = deit_jax.load(str(weights), return_spec=True)
    tokens = deit_jax.features(
        model, params, deit_jax.preprocess([str(p) for p in paths], spec), layers=-1
    )
    return np.asarray(tokens)[:, :2].mean(1), np.arange(len(paths)) // (len(paths) // COLOURS)


def test_nearest_neighbours_are_scikit_learns(evaluate, images, weights):
    (bank, known), (queries, truth) = (pooled(weights, images, p) for p in ("train", "val"))
    reference = KNeighborsClassifier(
        20, weights=lambda d: np.exp((1 - d) / 0.07), algorithm="brute", metric="cosine"
    )
    shares = reference.fit(bank, known).predict_proba(queries)
    votes = probe.knn(bank, known, queries, COLOURS)
    np.testing.assert_allclose(votes / votes.sum(1, keepdims=True), shares, atol=1e-4)
    code, out, err = evaluate("--json", "--probe=knn")
    assert code == 0, err
    said = json.loads(out)
    assert said["probe"]["train_examples"] == len(bank)
    expected = 100 * np.mean(shares.argmax(1) == truth)
    assert said["probe"]["top1"] == pytest.approx(expected, abs=100 / len(truth) + 0.01)
    assert expected > 40


def test_a_linear_probe_is_scikit_learns(evaluate, images, weights):
    (bank, known), (queries, truth) = (pooled(weights, images, p) for p in ("train", "val"))
    scaler = StandardScaler().fit(bank)
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(bank), known)
    expected = 100 * model.score(scaler.transform(queries), truth)
    code, out, err = evaluate("--json", "--probe=linear")
    assert code == 0, err
    assert json.loads(out)["probe"]["top1"] == pytest.approx(expected, abs=100 / len(truth) + 0.01)
    _, out, _ = evaluate("--probe=linear")
    assert "linear on features" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--probe=knn", "--out=a.csv"], "--probe asks no head: leave out --out and --real_labels"),
        (["--out=a.txt"], "--out=a.txt: answers are a .csv file; name it so"),
        (["--config.data.multi_label=True", "--config.loss.kind=binary"], "data.multi_label"),
    ],
)
def test_words_that_mean_nothing(evaluate, words, line):
    code, _, err = evaluate(*words)
    assert code in (1, 2)
    assert line in err.splitlines()[-1]


def test_imagenet_v2_folders_are_numbers(images, evaluate, tmp_path):
    """Its folders are called 0 … 999: their numbers are the classes', not their order as text."""
    root = tmp_path / "v2"
    for label, folder in enumerate(sorted((images / "val").iterdir())):
        place = root / (str(label) if label < 5 else "10")  # which comes after 2
        place.mkdir(parents=True)
        for path in folder.iterdir():
            (place / path.name).write_bytes(path.read_bytes())
    words = (f"--config.data.source=folder:{root}", "--config.data.eval_split=.")
    code, out, err = evaluate("--json", *words)
    assert code == 0, err
    _, plain, _ = evaluate("--json")
    assert json.loads(out)["fused"] == json.loads(plain)["fused"]


def test_a_probe_needs_no_head_and_no_classes_of_its_own(config, weights, tmp_path, capsys):
    """Of a backbone without a head, and of one whose head knows other classes."""
    for name, classes in (("none", 0), ("other", 3)):
        words = ["convert", str(weights), str(tmp_path / f"{name}.safetensors"), "--head=drop"]
        assert program.main([*words, f"--num_classes={classes}"]) == 0
    capsys.readouterr()
    answers = []
    for file in (weights, tmp_path / "none.safetensors", tmp_path / "other.safetensors"):
        words = ["eval", f"--config={config}", f"--weights={file}", "--probe=knn", "--json"]
        assert program.main(words) == 0
        answers.append(json.loads(capsys.readouterr().out)["probe"]["top1"])
    assert answers[0] == answers[1] == answers[2]
    words = ["eval", f"--config={config}", f"--weights={tmp_path / 'none.safetensors'}"]
    assert program.main(words) == 1
    assert "has no head; `deit embed`, `deit eval --probe=knn`" in capsys.readouterr().err

"""`deit report` and `deit analyze`: their figures against the run's own files and numpy."""

import copy
import functools
import html.parser
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

import deit_jax
from deit_jax import __main__ as program
from deit_jax.analysis import figures as figures_lib
from deit_jax.analysis import predictions
from deit_jax.analysis.report import page as page_lib
from deit_jax.analysis.report import single_run, svg_charts
from deit_jax.cli.flags import write_output
from deit_jax.data import decode
from deit_jax.data.sources.base import ArraySource
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.models.build import build_model
from deit_jax.storage import read_lines
from deit_jax.train import run as run_lib
from deit_jax.train.run import train
from deit_jax.weights import load, torch_names
from deit_jax.weights.load import WeightsError
from deit_jax.workdir import records as records_lib
from tests.tiny import make_tiny_config

HOSTILE = '</td><script>alert("&amp;")</script>\'" & <b>'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a student, and before it its teacher; return the workdir.

    In so few steps nothing is learned: large random weights let answers differ all the same.
    """
    workdir = tmp_path_factory.mktemp("runs") / "student"
    config = make_tiny_config()
    config.data.eval_fraction, config.batch_size = 0.2, 144  # nine steps an epoch
    config.epochs, config.optim.warmup_epochs = 1.0, 0.5
    config.mixing.prob = config.augment.erase_prob = 0.0  # less to compile
    config.train.eval_every_epochs = config.train.save_every_epochs = 0.5
    model = build_model(config.model, 10)
    rng, shapes = np.random.default_rng(0), torch_names.shapes(model)["params"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: rng.normal(8 * (path[-1].key == "scale"), 0.16, x.shape), shapes
    )
    params = jax.tree.map(np.float32, params)
    config.init.weights = str(workdir.with_name("start.safetensors"))
    save_file(torch_names.to_torch({"params": params}), config.init.weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lib, "_draw", lambda *_: None)  # which takes seconds
        train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def found(run):
    """Return the analysis of the student."""
    return figures_lib.analyze([run])


def test_the_history_says_what_the_run_started_from(run):
    (event,) = [e for e in read_lines(run / "history.jsonl") if e["event"] == "init"]
    weights = str(run.with_name("start.safetensors"))
    facts = {"weights": weights, "format": "safetensors file", "notes": []}
    assert {key: event[key] for key in facts} == facts


@pytest.fixture
def few_images(monkeypatch):
    """Look at the attention and tokens of few images."""
    monkeypatch.setattr(figures_lib, "TOKEN_IMAGES", 4)
    monkeypatch.setattr(figures_lib, "ATTENTION_IMAGES", 1)


class Page(html.parser.HTMLParser):
    """What a browser would find on a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.cells, self.in_cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.texts.append(data)
        if self.in_cell:
            self.cells[-1][-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def ids(self):
        return [a["id"] for _, a in self.tags if "id" in a]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def student(run):
    """Return the model, its inputs made one by one with Pillow, their labels and its logits."""
    config = make_tiny_config()
    config.data.eval_fraction = 0.2
    source = open_dataset(config.data).eval
    examples = [source[i] for i in range(len(source))]
    images = np.stack(
        [np.asarray(decode.centre_crop(decode.decode(e["image"], ""), 16, 1.0)) for e in examples]
    )
    images = (images / 255 - np.array(config.data.mean)) / np.array(config.data.std)
    truth = np.array([e["label"] for e in examples])
    model, params = deit_jax.load(str(run))
    images = images.astype(np.float32)
    heads = jax.jit(functools.partial(model.apply, train=False))({"params": params}, images)
    logits = {k: np.asarray(v) for k, v in zip(("cls", "dist"), heads, strict=True)}
    return model, params, images, truth, logits


def test_figures_are_those_of_the_files_and_of_numpy(run, found, student):
    (figures,), results = found.figures["runs"], json.loads((run / "results.json").read_text())
    json.dumps(found.figures, allow_nan=False)
    records, timing = lines_of(run / "metrics.jsonl"), lines_of(run / "timing.jsonl")
    assert figures["curves"].keys() >= {"loss", "lr", "grad_norm", "input_wait", "eval/dist.top1"}
    for key, curve in figures["curves"].items():
        expected = [(r["step"], r[key]) for r in (*records, *timing) if key in r]
        assert list(zip(curve["step"], curve["value"], strict=True)) == expected
    assert figures["accuracy"]["heads"]["teacher"] == results["teacher"]
    assert figures["accuracy"]["heads"]["ema.dist"] == results["ema"]["dist"]
    assert (figures["step"], figures["total_steps"], figures["steps_per_epoch"]) == (9, 9, 9)
    assert figures["finished"]
    assert not figures["notes"]

    evaluation = figures["evaluation"]
    assert (evaluation["images"], evaluation["of"]) == (359, 359)
    for head in ("cls", "dist", "fused", "teacher"):
        assert evaluation["top1"][head] == pytest.approx(results[head]["top1"], abs=1e-9)
    counts = np.array(evaluation["confusion"])
    assert counts.sum() == 359
    assert 100 * np.trace(counts) / counts.sum() == pytest.approx(results["fused"]["top1"])
    _, _, _, truth, logits = student
    logits = logits | {"fused": (logits["cls"] + logits["dist"]) / 2}
    labels = {k: v.argmax(-1) for k, v in logits.items()}
    again = np.array(
        [[np.sum((truth == i) & (labels["fused"] == j)) for j in range(10)] for i in range(10)]
    )
    assert np.abs(counts - again).sum() <= 2  # one tie at most
    matrix, order = found.figures["disagreement"], ("cls", "dist", "fused")
    assert [c["head"] for c in matrix["classifiers"]] == ["teacher", *order]
    for (i, a), (j, b) in itertools.product(enumerate(order, 1), repeat=2):
        differ = 100 * np.mean(labels[a] != labels[b])
        assert matrix["percent"][i][j] == pytest.approx(differ, abs=0.13)
    sure = np.exp(logits["fused"] - logits["fused"].max(-1, keepdims=True))
    sure = (sure / sure.sum(-1, keepdims=True)).max(-1)
    wrong = np.flatnonzero(labels["fused"] != truth)
    expected = np.sort(sure[wrong])[::-1][:12]
    assert [m["probability"] for m in evaluation["mistakes"]] == pytest.approx(expected, abs=1e-5)
    for mistake in evaluation["mistakes"]:
        number = mistake["example"]
        assert mistake["class"] == str(truth[number]) != mistake["predicted"]
        assert mistake["teacher"]["right"] == (mistake["teacher"]["class"] == mistake["class"])


def test_tokens_and_attention_are_of_the_images_shown(found, student):
    figures, pictures = found.figures["runs"][0], found.pictures[0]
    model, params, images, truth, _ = student
    looked = figures["attention"]
    assert (looked["tokens"], looked["layer"], len(looked["images"])) == (["cls", "dist"], 2, 5)
    numbers, config = [seen["example"] for seen in looked["images"]], make_tiny_config()
    shown = np.stack([pictures[n] for n in numbers]) / 255 - np.array(config.data.mean)
    np.testing.assert_allclose(shown / np.array(config.data.std), images[numbers], atol=1e-6)
    attend = jax.jit(functools.partial(deit_jax.analysis.attention_maps, model))
    maps = attend(params, images[numbers])
    last = np.asarray(maps)[:, -1, :, :2, 2:].reshape(5, 3, 2, 4, 4).swapaxes(1, 2)
    rolled = deit_jax.analysis.rollout(maps)[:, :2, 2:].reshape(5, 2, 4, 4)
    # Logits of this network differ by up to 60, whose rounding moves a probability by 4e-5.
    for i, seen in enumerate(looked["images"]):
        assert seen["class"] == str(truth[seen["example"]])
        np.testing.assert_allclose(seen["last_layer"], last[i], atol=2e-4)
        np.testing.assert_allclose(seen["rollout"], rolled[i], atol=2e-4)
    features = jax.jit(functools.partial(deit_jax.analysis.token_features, model))
    some = features(params, images[predictions.spaced(359, 128)])
    expected = deit_jax.analysis.token_cosines(some)
    np.testing.assert_allclose(figures["tokens"]["cosines"], expected, atol=1e-5)
    assert figures["tokens"]["images"] == 128
    assert np.array(figures["position_similarity"]).shape == (16, 16)
    assert np.array(figures["patch_filters"]).shape[1:] == (4, 4, 3)


def no_requests(text):
    """Check that a page asks for nothing but itself, and that nothing in it runs."""
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for key in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(key) or "#"
            assert value.startswith(("data:image/", "#")), (tag, key, value[:80])
        for address in re.findall(r"url\(([^)]*)", attributes.get("style") or ""):
            assert address.startswith("data:image/")
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert len(set(page.ids)) == len(page.ids)
    links = [a["href"][1:] for a in page.of("a")]
    assert set(links) <= set(page.ids)
    for image in page.of("img"):
        assert image["alt"]
    return page


def test_page_is_whole_and_its_figures_are_the_runs(run, found):
    text = page_lib.page(found)
    page = no_requests(text)
    parts = (
        "confusion",
        "mistakes",
        "tokens",
        "attention",
        "positions",
        "filters",
        "data",
        "config",
        "versions",
    )
    assert page.ids == [
        "curves",
        "accuracy",
        "disagreement",
        "run-1",
        *(f"run-1-{p}" for p in parts),
    ]
    results = json.loads((run / "results.json").read_text())
    for row, figures in (
        ("teacher", results["teacher"]),
        ("distillation head", results["dist"]),
        ("fused, EMA", results["ema"]["fused"]),
    ):
        assert [row, f"{figures['top1']:.2f}", f"{figures['top5']:.2f}", "9"] in page.cells
    said = " ".join(page.texts)
    counts = np.bincount(load_digits().target)
    fraction = json.loads((run / "config.json").read_text())["data"]["eval_fraction"]
    held = np.round(fraction * counts).astype(int)
    smallest = int(np.argmin(counts - held))
    cells = [str(smallest), str((counts - held)[smallest]), str(held[smallest])]
    assert cells in page.cells
    assert f"digits: {sum(counts - held)} images to train on (all of it), {sum(held)} to" in said
    for label in (
        "nats",
        "top-1, %",
        "images/s",
        "% of the time",
        "step",
        "epoch",
        "learning rate",
    ):
        assert label in said
    assert "finished at step 9 of 9 (epoch 1 of 1)" in said
    assert "all 359 images" in said
    assert ["optim.warmup_epochs", "0.5"] in page.cells
    assert ["jax", jax.__version__] in page.cells


def drawn(text, title):
    """Return the points of every curve of a chart, in its own coordinates."""
    (figure,) = [f for f in text.split("<figure") if f"<strong>{title}</strong>" in f]
    curves = re.findall(r'<path d="([^"]*)" class="curve', figure.split("</svg>")[0])
    return [np.array(re.findall(r"[ML]([\d.]+) ([\d.]+)", c), float) for c in curves]


def test_curves_are_drawn_as_they_were_written(run, found):
    text = page_lib.page(found)
    records = lines_of(run / "metrics.jsonl")
    for title, keys in (
        ("Training loss", ("loss", "loss_label", "loss_teacher")),
        ("Learning rate", ("lr",)),
        ("Gradient norm", ("grad_norm",)),
        ("Accuracy on held-out images", ("eval/cls.top1", "eval/dist.top1", "eval/fused.top1")),
    ):
        curves = drawn(text, title)
        for key, points in zip(keys, curves, strict=False):
            written = np.array([(r["step"], r[key]) for r in records if key in r])
            assert len(points) == len(written)
            for axis in (0, 1):  # places are a linear function of values
                values, places = written[:, axis], points[:, axis]
                share = (values - values[0]) / np.ptp(values)
                slope = places[values.argmax()] - places[values.argmin()]
                np.testing.assert_allclose(places, places[0] + share * slope, atol=0.15)
            assert np.all(np.diff(points[:, 0]) > 0)
    assert len(drawn(text, "Accuracy on held-out images")) == 6  # with the averages


def tree(workdir):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(workdir.rglob("*"))}


def test_commands_write_one_file_and_agree(run, found, capsys, few_images, monkeypatch, tmp_path):
    before = tree(run)
    assert program.main(["report", f"--workdir={run}", "--images=20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": f"{run}/report.html", "runs": ["student"]}
    text = (run / "report.html").read_text()
    assert "20 of 359 images, evenly spaced" in " ".join(Page(text).texts)
    (run / "report.html").unlink()
    both = f"--workdir={run},{run}/teacher"
    assert program.main(["report", both, "--images=20"]) == 0  # beside the run's own report
    assert capsys.readouterr().out == f"report: {run}/comparison.html\n"
    (run / "comparison.html").unlink()
    after = tree(run)
    assert {k: v for k, v in after.items() if k != run} == {
        k: v for k, v in before.items() if k != run
    }
    monkeypatch.setattr(figures_lib, "analyze", lambda *words: asked.append(words) or found)
    asked = []
    assert program.main(["analyze", f"--workdir={run}", "--images=20"]) == 0
    assert json.loads(capsys.readouterr().out) == found.figures
    assert program.main(["analyze", f"--workdir={run},x", f"--out={tmp_path}/figures.json"]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "figures.json").read_text()) == found.figures
    latest = ("latest", False)
    assert asked == [([str(run)], 20, *latest), ([str(run), "x"], 5000, *latest)]


def test_several_runs_and_one_without_attention(run, found, few_images):
    """The teacher is a run too, of a RegNetY."""
    both = figures_lib.analyze([run, run / "teacher"])
    assert [r["name"] for r in both.figures["runs"]] == ["student", "teacher"]
    teacher = both.figures["runs"][1]
    assert teacher["attention"] is teacher["tokens"] is teacher["position_similarity"] is None
    matrix = both.figures["disagreement"]
    names = [(c["run"], c["head"]) for c in matrix["classifiers"]]
    heads = [("student", h) for h in ("teacher", "cls", "dist", "fused")]
    assert names == [*heads, ("teacher", "cls")]
    percent = np.array(matrix["percent"])
    np.testing.assert_array_equal(percent[0], percent[-1])  # they are the same network
    np.testing.assert_array_equal(percent[:4, :4], found.figures["disagreement"]["percent"])
    page = no_requests(page_lib.page(both))
    parts = ("confusion", "mistakes", "config", "versions")
    assert page.ids[-5:] == ["run-2", *(f"run-2-{p}" for p in parts)]
    results = json.loads((run / "teacher" / "results.json").read_text())
    top1, top5 = (f"{results['fused'][k]:.2f}" for k in ("top1", "top5"))
    assert ["teacher", "fused", top1, top5, "9"] in page.cells
    assert ["model.name", "deit_tiny_distilled_patch16_224", "regnety_002"] in page.cells
    losses = drawn(page_lib.page(both), "Training loss")
    assert sorted(map(len, losses)) == [9, 9, 9, 9]
    # Of many runs a chart shows one curve each: the loss, the accuracy of the model's answer.
    many = {**both.figures, "runs": both.figures["runs"] * 2}
    four = page_lib.page(figures_lib.Analysis(many, both.pictures * 2))
    assert sorted(map(len, drawn(four, "Training loss"))) == [9, 9, 9, 9]
    assert len(drawn(four, "Accuracy on held-out images")) == 4
    # A run of other classes has no matrix with it.
    other = copy.deepcopy(both.figures)
    other["disagreement"] = None
    said = " ".join(Page(page_lib.page(figures_lib.Analysis(other, both.pictures))).texts)
    assert "not evaluated on the same images" in said


def test_a_run_that_is_under_way(run, tmp_path, few_images):
    workdir = shutil.copytree(run, tmp_path / "student")
    (workdir / "results.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "9")
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])  # the last line, an evaluation, is cut
    (workdir / "teacher").rename(workdir / "moved")
    found = figures_lib.analyze([workdir], images=20)
    (figures,) = found.figures["runs"]
    records = lines_of(run / "metrics.jsonl")
    evaluation = next(r for r in records if "eval/cls.top1" in r)
    assert figures["checkpoint_step"] == evaluation["step"] == figures["accuracy"]["step"] == 5
    assert figures["accuracy"]["heads"]["dist"]["top1"] == evaluation["eval/dist.top1"]
    assert figures["accuracy"]["heads"]["ema.cls"]["top5"] == evaluation["eval/ema.cls.top5"]
    assert figures["notes"].keys() == {"teacher"}
    assert not figures["finished"]
    said = " ".join(no_requests(page_lib.page(found)).texts)
    assert "not finished, at step 9 of 9" in said
    assert "the checkpoint after step 5" in said
    assert "The teacher's opinion is missing" in said
    assert f"{workdir}/teacher" in said


def test_a_run_without_checkpoints_or_data(run, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "classes.json", "metrics.jsonl"):
        shutil.copy(run / name, bare)
    found = figures_lib.analyze([bare])
    page = no_requests(page_lib.page(found))
    assert page.ids == ["curves", "accuracy", "run-1", "run-1-config", "run-1-versions"]
    said = " ".join(page.texts)
    assert "Nothing is saved yet to look at" in said
    assert len(drawn(page_lib.page(found), "Training loss")[0]) == 9
    (bare / "metrics.jsonl").unlink()
    shutil.copytree(run / "teacher", bare / "teacher")
    said = " ".join(Page(page_lib.page(figures_lib.analyze([bare]))).texts)
    assert "Nothing is written yet" in said
    assert f"its teacher is a run of its own, {bare}/teacher" in said
    assert "There was no evaluation yet" in said

    moved = shutil.copytree(run, tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    config["data"]["source"] = "folder:/nowhere"
    (moved / "config.json").write_text(json.dumps(config))
    assert program.main(["report", f"--workdir={moved}", f"--out={tmp_path}/x.html"]) == 0
    assert "no such folder" in capsys.readouterr().err
    page = no_requests((tmp_path / "x.html").read_text())
    parts = ("positions", "filters", "data", "config", "versions")
    assert page.ids[2:] == ["run-1", *(f"run-1-{p}" for p in parts)]
    assert "No figures on images" in " ".join(page.texts)
    assert "folder:/nowhere: no such folder" in " ".join(page.texts)


def test_hostile_names_are_text(found):
    figures = json.loads(json.dumps(found.figures))
    (run,) = figures["runs"]
    run["name"] = run["workdir"] = run["model"] = run["notes"]["data"] = HOSTILE
    figures["disagreement"]["classifiers"][0]["run"] = HOSTILE
    run["config"]["data"]["source"] = HOSTILE
    run["history"][0]["command"] = [HOSTILE, "\udcff"]  # as of a file name that is no UTF-8
    for group in ("classes", "mistakes"):
        for item in run["evaluation"][group]:
            item["class"] = HOSTILE
    for item in run["evaluation"]["mistakes"]:
        item["name"] = item["predicted"] = item["teacher"]["class"] = HOSTILE
    for item in run["attention"]["images"]:
        item["class"] = item["name"] = HOSTILE
    text = page_lib.page(figures_lib.Analysis(figures, found.pictures))
    page = no_requests(text.encode("utf-8", "replace").decode())
    plain = no_requests(page_lib.page(found))
    # Not an element more than on the page of harmless names, but for the note's.
    assert len(page.tags) == len(plain.tags) + 1
    said = "".join(page.texts)
    assert said.count(HOSTILE) > 30
    shown = [a["title"] for _, a in page.tags if "title" in a]
    assert HOSTILE in shown


def test_many_classes_have_pairs_instead_of_a_matrix(found):
    rng, classes = np.random.default_rng(0), [f"class {i}" for i in range(50)]
    truth = rng.integers(0, 50, 2000)
    labels = np.where(rng.random(2000) < 0.4, truth, rng.integers(-1, 50, 2000))
    said = predictions.Predictions(
        np.arange(2000), truth, {"fused": labels}, {"fused": rng.random(2000)}
    )
    source = ArraySource("noise", np.zeros((2000, 2, 2), np.uint8), truth)
    errors = predictions.errors(said, source, classes)
    assert errors["confusion"] is None
    assert errors["unanswered"] == np.sum(labels == -1) > 0
    for pair in errors["confused"]:
        both = (truth == classes.index(pair["class"])) & (
            labels == classes.index(pair["predicted"])
        )
        assert pair["examples"] == both.sum()
    most = max(
        np.sum((truth == i) & (labels == j)) for i, j in itertools.permutations(range(50), 2)
    )
    assert errors["confused"][0]["examples"] == most
    assert sum(c["right"] for c in errors["classes"]) == np.sum(truth == labels)
    run = {"evaluation": {"images": 2000, "of": 4000, "top1": predictions.top1(said), **errors}}
    parts = "".join(t for part in single_run.confusion(run) for t in part.itertext())
    assert "2000 of 4000 images, evenly spaced" in parts
    assert "images got logits that are not finite" in parts


def test_gaps_logarithms_and_long_curves():
    values = [1.0, None, 10.0, 0.0, 100.0, 1000.0]
    figure = svg_charts.line_chart(
        "x", [svg_charts.Line("a", range(6), values)], "step", "y", log=True
    )
    (path,) = [e.get("d") for e in figure.iter("path") if e.get("class") == "curve d0"][:1]
    assert [len(part.split("L")) for part in path.split("M")[1:]] == [1, 1, 2]
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    np.testing.assert_allclose(np.diff(heights), np.diff(heights)[0], atol=0.11)  # decades
    assert (
        svg_charts.line_chart("x", [svg_charts.Line("a", [1, 2], [None, None])], "step", "y")
        is None
    )
    assert svg_charts.line_chart("x", [svg_charts.Line("a", [5], [0.0])], "step", "y") is not None
    noise = np.random.default_rng(0).normal(size=100_000)
    noise[54_321] = 99.0
    points = [*enumerate(noise.tolist())]
    kept = svg_charts.thinned(points)
    assert len(kept) <= svg_charts.MOST
    assert (54_321, 99.0) in kept
    assert min(kept, key=lambda p: p[1]) == min(points, key=lambda p: p[1])
    assert set(kept) <= set(points)
    assert svg_charts.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert svg_charts.number(-0.0015) == "\N{MINUS SIGN}1.5e\N{MINUS SIGN}3"
    assert svg_charts.number(250_000.0) == "250k"


def test_names_are_the_shortest_ends_that_differ():
    paths = [Path(p) for p in ("/a/b/small", "/c/b/small", "/c/base")]
    assert records_lib.names(paths) == ["a/b/small", "c/b/small", "base"]


def test_who_holds_the_lock_is_under_way(tmp_path, monkeypatch):
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *words: updates.append(words))

    def locked_by(pid, host=None):
        host = host or socket.gethostname()
        (tmp_path / "lock").write_text(f"process {pid} on {host} since 2026-01-01\n")
        return records_lib.under_way(tmp_path)

    assert not records_lib.under_way(tmp_path)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert locked_by(other.pid)
        figures_lib._leave_accelerator([tmp_path])
        assert updates == [("jax_platforms", "cpu")]
        assert not locked_by(other.pid, "elsewhere")
        assert not locked_by(os.getpid())
    finally:
        other.communicate(b"\n")
    assert not locked_by(other.pid)
    figures_lib._leave_accelerator([tmp_path])
    assert len(updates) == 1


def test_a_checkpoint_that_goes_while_it_is_read_is_not_the_end(run, tmp_path, monkeypatch):
    workdir = shutil.copytree(run, tmp_path / "student")
    real, newest = load.open_model, workdir / "checkpoints" / "9"

    def open_model(*arguments, **options):
        if newest.exists():  # as a training does that keeps few of them
            newest.rename(workdir / "gone")
            raise WeightsError("array not found")
        return real(*arguments, **options)

    monkeypatch.setattr(figures_lib, "open_model", open_model)
    assert figures_lib._open(workdir).run.step == 5
    for place in (workdir / "checkpoints").iterdir():
        place.rename(workdir / f"gone-{place.name}")
    with pytest.raises(UserError, match="no checkpoint yet"):
        figures_lib._open(workdir)


def test_each_mistake_is_one_line(run, tmp_path, capsys):
    for words, code, part in (
        ([], 2, "--workdir=… is missing"),
        ([f"--workdir={tmp_path}"], 1, f"--workdir={tmp_path}: no run is there (no config.json)"),
        ([f"--workdir={run},{run}/../student"], 1, "given twice"),
        ([f"--workdir={run}", "--images=0"], 2, "--images"),
    ):
        for command in ("report", "analyze"):
            assert program.main([command, *words]) == code
            error = capsys.readouterr().err.strip()
            assert part in error
            assert len(error.splitlines()) == 1
    with pytest.raises(UserError, match=r"--out=/nowhere/x: cannot be written \(No such"):
        write_output("/nowhere/x", "")


def test_33_000_classes_take_no_matrix_of_them():
    """K x K numbers are 8.7 GB; what is counted here is of the pairs that occur."""
    rng, count = np.random.default_rng(0), 33_000
    truth, labels = rng.integers(0, count, (2, 5000))
    labels[:50] = (truth[:50] + 1) % count
    truth[50:60], labels[50:60] = 7, 9  # ten times the same mistake
    said = predictions.Predictions(
        np.arange(5000), truth, {"fused": labels}, {"fused": rng.random(5000)}
    )
    source = ArraySource("noise", np.zeros((5000, 2, 2), np.uint8), truth)
    tracemalloc.start()
    errors = predictions.errors(said, source, [str(i) for i in range(count)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
    first = errors["confused"][0]
    assert (first["class"], first["predicted"], first["examples"]) == ("7", "9", 10)
    assert sum(c["examples"] for c in errors["classes"]) == 5000

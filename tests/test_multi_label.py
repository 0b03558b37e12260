"""Several labels an image: losses against PyTorch, figures against scikit-learn, whole runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from sklearn.metrics import average_precision_score

from deit_jax.analysis.classify import classify
from deit_jax.analysis.evaluate import open_evaluation
from deit_jax.analysis.figures import analyze
from deit_jax.analysis.input_sheet import label_text
from deit_jax.analysis.report.page import page
from deit_jax.config.serialize import from_json
from deit_jax.configs import base
from deit_jax.errors import UserError
from deit_jax.models.heads import Heads
from deit_jax.parallel.sharding import make_mesh
from deit_jax.step.distill.base import Layout, Outputs
from deit_jax.step.mixup import mix
from deit_jax.step.objective import chosen, objective
from deit_jax.storage import read_json, read_lines
from deit_jax.train import run as run_lib
from deit_jax.train.average_precision import average_precision, figures
from deit_jax.train.evaluator import Evaluator, table
from deit_jax.train.experiment import prepare
from deit_jax.train.run import train
from deit_jax.train.tape.layout import arrays_of, pack, unpack
from deit_jax.weights.convert import convert
from deit_jax.weights.load import open_model
from deit_jax.workdir.checkpoints import Checkpointer
from tests.test_convert import opened

B, K = 8, 5
RNG = np.random.default_rng(5)
LOGITS = RNG.normal(size=(B, K)).astype(np.float32)
OTHER = 3 * RNG.normal(size=(B, K)).astype(np.float32)
SETS = RNG.integers(0, 2, (B, K)).astype(np.uint8)
COLOURS = ["red", "green", "blue"]


def settings(kind, **fields):
    distill = base.get_config().distill
    distill.update({"kind": kind, "alpha": 0.4, "tau": 3.0} | fields)
    return distill


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """Return a folder of images that are red, green and blue or not, and a table of which."""
    root, rows = tmp_path_factory.mktemp("painted"), ["file,labels"]
    rng = np.random.default_rng(5)  # its own: other files take these images too
    for number in range(72):
        on = [number >> bit & 1 for bit in range(3)]
        pixels = rng.integers(0, 60, (16, 16, 3)) + 180 * np.array(on)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number}.png")
        names = [name for name, there in zip(COLOURS, on, strict=True) if there]
        rows.append(f"{number}.png,{'|'.join(names)}")
    (root / "labels.csv").write_text("\n".join(rows))
    return root


@pytest.fixture
def painting(tiny_config, painted):
    """Return a config that trains on them, without a teacher."""
    c = tiny_config
    c.data.source, c.data.labels = f"folder:{painted}", f"{painted}/labels.csv"
    c.data.multi_label, c.data.eval_fraction = True, 1 / 3
    c.loss.kind, c.loss.smoothing, c.distill.kind = "binary", 0.0, "none"
    c.batch_size, c.train.eval_batch_size, c.augment.repeats = 16, 16, 1
    c.augment.auto, c.augment.color_jitter, c.augment.erase_prob = "", 0.0, 0.0
    c.mixing.group_size, c.epochs = 4, 1.0
    return c


def test_targets_of_a_mixture_are_all_labels_of_both(torch):
    mixing = ConfigDict(
        {"prob": 1.0, "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch_prob": 0.5, "group_size": 4}
    )
    images = jnp.array(RNG.normal(size=(B, 8, 8, 3)), jnp.float32)
    _, targets = mix(jax.random.key(2), images, jnp.array(SETS), K, 0.0, mixing)
    partner = SETS.reshape(2, 4, K)[:, [2, 3, 0, 1]].reshape(B, K)
    assert np.array_equal(np.array(targets) > 0, (SETS | partner) > 0)
    loss = objective(Heads(jnp.array(LOGITS)), targets, None, settings("none"), "binary")[0]
    present = torch.tensor((SETS | partner).astype(np.float32))
    expected = torch.nn.BCEWithLogitsLoss()(torch.tensor(LOGITS), present)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("token", [True, False])
def test_distillation_is_of_each_class(torch, kind, token):
    distill, form = settings(kind), chosen(kind, several=True)
    target = form.target(Outputs(Heads(jnp.array(OTHER))))

    def ours(logits):
        heads = Heads(jnp.array(LOGITS), logits) if token else Heads(logits)
        given = (heads, jnp.array(SETS, jnp.float32), target, distill, "binary")
        return objective(*given, several=True)[1]["loss_teacher"]

    loss, gradient = jax.value_and_grad(ours)(jnp.array(LOGITS))
    x, tau = torch.tensor(LOGITS, requires_grad=True), distill.tau if kind == "soft" else 1.0
    teacher = torch.sigmoid(torch.tensor(OTHER) / tau)
    teacher = (teacher > 0.5).float() if kind == "hard" else teacher
    student = torch.sigmoid(x / tau)
    pairs = [(teacher, student), (1 - teacher, 1 - student)]
    kl = sum(torch.special.xlogy(t, t) - t * torch.log(s) for t, s in pairs)
    expected = kl.mean() * tau**2
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-4, atol=1e-7)


def test_a_tape_keeps_the_teachers_decisions_exactly_in_bits():
    layout = Layout("hard", B, 19, 1, several=True)
    target = jnp.array(RNG.integers(0, 2, (B, 19)).astype(bool))
    parts = jax.device_get(pack(target, layout))
    assert {k: (v.dtype, v.shape) for k, v in parts.items()} == arrays_of(layout)
    assert parts["labels"].nbytes == 3 * B
    assert np.array_equal(unpack(parts, layout), np.array(target))


def by_its_definition(labels, scores):
    """Return the sum over thresholds, from the highest down, of precision times gain in recall."""
    total, before = 0.0, 0
    for threshold in np.unique(scores)[::-1]:
        chosen = labels[scores >= threshold]
        total += chosen.mean() * (int(chosen.sum()) - before)
        before = int(chosen.sum())
    return total / before


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_what_it_says(ties):
    scores = RNG.normal(size=(200, 7)).astype(np.float32)
    scores = np.round(scores) if ties else scores
    labels = (RNG.random((200, 7)) < 0.2).astype(np.uint8)
    labels[:, 3] = 0
    labels[:, 4] = 1
    ours = average_precision(scores, labels)
    known = [k for k in range(7) if k != 3]
    expected = [by_its_definition(labels[:, k], scores[:, k]) for k in known]
    np.testing.assert_allclose(ours[known], expected, rtol=1e-12)
    assert np.isnan(ours[3])
    told = figures(scores, labels, "abcdefg")
    np.testing.assert_allclose(told["mAP"], 100 * np.mean(expected))
    assert told["AP"]["d"] is None
    np.testing.assert_allclose(told["AP"]["a"], 100 * expected[0])


def test_scores_that_are_not_finite_rank_last():
    labels = np.array([[1], [0], [1]], np.uint8)
    for bad in (np.nan, np.inf, -np.inf):
        scores = np.array([[bad], [0.0], [1.0]], np.float32)
        lowest = np.array([[-9.0], [0.0], [1.0]], np.float32)
        assert average_precision(scores, labels) == average_precision(lowest, labels)


class Linear:
    """A model whose logits are the images' mean colours."""

    def apply(self, variables, images, train=False):
        colour = images.mean((1, 2))
        return Heads(colour @ variables, -colour)


@pytest.mark.parametrize("broken", [0, 3])
def test_an_evaluation_ranks_the_examples_that_can_be_read(painting, tmp_path, broken):
    experiment, dataset = prepare(painting)
    experiment.data.skip_unreadable = bool(broken)
    source, mesh = dataset.eval, make_mesh(painting.mesh)
    shown = [source[i] for i in range(len(source))]
    matrix = np.random.default_rng(6).normal(size=(3, 3)).astype(np.float32)

    class Torn:
        labels = source.labels

        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            if index < broken:
                raise UserError("torn")
            return shown[index]

        def describe(self, index):
            return f"torn[{index}]"

    evaluator = Evaluator(Torn(), experiment.data, 16, 16, mesh, classes=COLOURS)
    results = evaluator.model(Linear(), jnp.array(matrix))
    images = np.stack([evaluator.read(i)[0] for i in range(broken, len(source))]) / 255.0
    colour = ((images - painting.data.mean) / painting.data.std).mean((1, 2))
    labels = source.labels[broken:]
    scores = {"cls": colour @ matrix, "dist": -colour}
    scores["fused"] = (scores["cls"] + scores["dist"]) / 2
    order = [COLOURS.index(name) for name in COLOURS]
    assert results.keys() == scores.keys()
    for head, values in scores.items():
        expected = 100 * average_precision_score(labels, values, average=None)
        ours = [results[head]["AP"][COLOURS[k]] for k in order]
        np.testing.assert_allclose(ours, expected, rtol=1e-4)
        np.testing.assert_allclose(results[head]["mAP"], expected.mean(), rtol=1e-4)
    told = evaluator.examples()
    assert told["examples"] == len(source) - broken
    assert told.get("unreadable", 0) == broken


def test_classes_without_positives_are_named(painting):
    experiment, dataset = prepare(painting)
    labels = dataset.eval.labels.copy()
    labels[:, 1] = 0
    dataset.eval.__dict__["labels"] = labels

    class Without:
        def __init__(self):
            self.labels = labels

        def __len__(self):
            return len(labels)

        def __getitem__(self, index):
            return dataset.eval[index] | {"label": self.labels[index]}

        def describe(self, index):
            return ""

    mesh, source = make_mesh(painting.mesh), Without()
    evaluator = Evaluator(source, experiment.data, 16, 16, mesh, classes=COLOURS)
    results = evaluator.model(Linear(), jnp.eye(3))
    results |= evaluator.examples()
    assert results["without_positives"] == ["green"]
    assert results["fused"]["AP"]["green"] is None
    assert "mean without 1 classes of no positives: green" in table(results)
    source.labels[:] = 0
    with pytest.raises(UserError, match="none of its 24 images for evaluation has a label"):
        evaluator.model(Linear(), jnp.eye(3))


def test_a_run_learns_is_evaluated_and_told_of(painting, painted, tmp_path):
    c = painting
    c.epochs, c.optim.lr, c.optim.warmup_epochs, c.mixing.prob = 40.0, 3e-3, 1.0, 0.2
    c.loss.class_weights, c.loss.heads = "balanced", "both"
    c.train.eval_every_epochs = c.train.save_every_epochs = 20.0
    results = train(c, tmp_path / "run")
    assert results["fused"]["mAP"] > 90  # colours are learnt at once; by chance it is 50
    assert results["fused"].keys() == {"mAP", "AP"}
    assert results["ema"]["cls"]["AP"].keys() == set(COLOURS)
    assert read_json(tmp_path / "run" / "results.json") == results
    told = [r for r in read_lines(tmp_path / "run" / "metrics.jsonl") if "eval/fused.mAP" in r]
    assert told[-1]["eval/fused.AP.red"] == results["fused"]["AP"]["red"]
    assert not any("top1" in key for record in told for key in record)
    saver = Checkpointer(tmp_path / "run", keep=2, read_only=True, best="mAP")
    assert saver.facts(120)["mAP"] == results["fused"]["mAP"]
    assert "top1" not in saver.facts(120)
    config = from_json(read_json(tmp_path / "run" / "config.json"))
    again = open_evaluation(config, f"{tmp_path}/run").results()
    assert again["fused"]["mAP"] == pytest.approx(results["fused"]["mAP"])
    assert again["fused"]["AP"] == pytest.approx(results["fused"]["AP"])
    assert "mAP %" in table(again)
    assert "top-1" not in table(again)
    said = classify(str(tmp_path / "run"), [f"{painted}/{i}.png" for i in (0, 7)])
    none, all_three = ({p["class"]: p["probability"] for p in s["predictions"]} for s in said)
    assert all(x < 0.5 for x in none.values())
    assert all(x > 0.5 for x in all_three.values())
    seen = analyze([tmp_path / "run"], images=50)
    evaluation = seen.figures["runs"][0]["evaluation"]
    assert evaluation["mAP"]["fused"] == pytest.approx(results["fused"]["mAP"])
    assert "top1" not in evaluation
    assert seen.figures["disagreement"] is None
    html = page(seen)
    assert "Average precision" in html
    assert "top-1" not in html.split("resolved config")[0]
    for to, name in (("timm", "w.safetensors"), ("huggingface", "hf"), ("deit_jax", "copy")):
        convert(open_model(str(tmp_path / "run")), tmp_path / name, to)
        assert open_model(str(tmp_path / name)).multi_label is True


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_teacher_of_several_labels_teaches(painting, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(run_lib, "_draw", lambda trainer, results: None)
    c = painting
    c.distill.kind, c.teacher.epochs, c.distill.tau = kind, 1.0, 2.0
    results = train(c, tmp_path / "run")
    assert results["teacher"]["mAP"] > 0
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(r["loss_teacher"] >= 0 for r in lines if "loss_teacher" in r)
    if kind == "soft":
        c.teacher.tape = "record"
        with pytest.raises(UserError, match=r"distill.kind=soft learns of several labels"):
            train(c, tmp_path / "tape")
        return
    # A tape of the same run replays to the same bits.
    c.teacher.weights, c.teacher.tape = str(tmp_path / "run" / "teacher"), "record"
    recorded = train(c, tmp_path / "record")
    c.teacher.tape, c.teacher.tape_path = "replay", str(tmp_path / "record" / "tape")
    replayed = train(c, tmp_path / "replay")
    assert {**recorded, "teacher": None} == {**replayed, "teacher": None}
    one = (tmp_path / "record" / "metrics.jsonl").read_text()
    assert one == (tmp_path / "replay" / "metrics.jsonl").read_text()


def random_weights():
    """Return random weights of a model as a run's are opened, for the three classes."""
    sizes = {"image_size": 16, "patch_size": 4}
    return opened("deit_tiny_patch16_224", sizes, sorted(COLOURS))


def test_a_teacher_of_one_label_is_refused(painting, tmp_path):
    convert(random_weights(), tmp_path / "teacher", "deit_jax")
    painting.distill.kind, painting.teacher.weights = "hard", str(tmp_path / "teacher")
    painting.teacher.model = base.get_model_config("deit_tiny_patch16_224")
    painting.teacher.model.image_size, painting.teacher.model.patch_size = 16, 4
    with pytest.raises(UserError, match="the teacher answers one class an image"):
        train(painting, tmp_path / "run")


def test_one_label_and_several_are_not_mixed_up(painting, tmp_path):
    """Neither in an evaluation nor in a prediction."""
    convert(random_weights(), tmp_path / "one", "deit_jax")
    with pytest.raises(UserError, match=r"one class an image; .*data\.multi_label=False"):
        open_evaluation(painting, str(tmp_path / "one")).results()
    with pytest.raises(UserError, match=r"^--multi_label: .* answers one class an image"):
        classify(str(tmp_path / "one"), [f"{painting.data.source[7:]}/1.png"], multi_label=True)
    several = dataclasses.replace(random_weights(), multi_label=True)
    convert(several, tmp_path / "several", "deit_jax")
    painting.data.multi_label, painting.data.labels = False, ""
    painting.data.source = "digits"
    with pytest.raises(UserError, match=r"any number of classes an image; .*multi_label=True"):
        open_evaluation(painting, str(tmp_path / "several")).results()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss.kind": "softmax"}, "config.loss.kind='softmax': one label an image"),
        ({"loss.smoothing": 0.1}, "config.loss.smoothing=0.1: must be 0 with loss.kind=binary"),
        ({"data.balance": "sqrt"}, "config.data.balance='sqrt': images of several labels cannot"),
        ({"loss.class_weights": "1,2"}, "2 weights for 3 classes"),
    ],
)
def test_what_does_not_go_with_several_labels_is_one_line(painting, fields, message):
    painting.update_from_flattened_dict(fields)
    with pytest.raises(UserError) as error:
        prepare(painting)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sheets_titles_name_all_labels():
    assert label_text(np.array([1.0, 1.0, 0.0]), COLOURS) == "red + green"
    assert label_text(np.zeros(3), COLOURS) == "none"
    assert label_text(np.array([0.7, 0.0, 0.0]), COLOURS) == "red 0.70"
    assert label_text(np.array([0.7, 0.7, 0.3]), COLOURS) == "red 0.70 + green 0.70 + blue 0.30"

"""Which checkpoint of a run is taken, by commands, teachers and starts."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

import deit_jax
from deit_jax.__main__ import main
from deit_jax.errors import UserError
from deit_jax.storage import read_lines
from deit_jax.train.experiment import prepare
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.run import starting_weights
from deit_jax.train.tape.fingerprint import parameters_sha256
from deit_jax.weights.load import load_variables, open_model
from deit_jax.workdir import checksums
from deit_jax.workdir.saved_run import load_run
from deit_jax.workdir.which import kept_steps
from tests.tiny import make_tiny_config, train_without_picture

pytestmark = pytest.mark.eight_devices


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train 10 steps, evaluated and saved every second one."""
    workdir = tmp_path_factory.mktemp("which") / "run"
    c = make_tiny_config()
    c.distill.kind = "none"
    c.train.eval_every_epochs = c.train.save_every_epochs = 0.4
    c.train.keep_checkpoints = 10
    train_without_picture(c, workdir)
    return workdir


def parameters_at(workdir, step, part="params"):
    """Read a checkpoint with Orbax alone."""
    place = workdir / "checkpoints" / str(step) / "default"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(place).item_metadata.tree
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(place, restore_args=numpy)[part]


def same(a, b):
    leaves = (jax.tree.leaves(a), jax.tree.leaves(b))
    return all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


def best_step(workdir):
    """Return the newest of the best evaluations in metrics.jsonl."""
    scores = {
        r["step"]: r["eval/fused.top1"]
        for r in read_lines(workdir / "metrics.jsonl")
        if "eval/fused.top1" in r
    }
    return max(scores, key=lambda s: (scores[s], s))


@pytest.fixture
def better_before(run, tmp_path):
    """Return the run with the figure of its fourth step raised above all."""
    copy = shutil.copytree(run, tmp_path / "copy")
    path = copy / "checkpoints" / "4" / "metrics" / "metrics"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top1": 101.0}))
    checksums.write(copy / "checkpoints" / "4")
    return copy


def test_best_is_that_of_the_recorded_evaluations(run, better_before):
    assert kept_steps(run) == [2, 4, 6, 8, 10]
    assert load_run(run).step == load_run(run, checkpoint="latest").step == 10
    assert load_run(run, checkpoint="best").step == best_step(run)
    assert load_run(better_before, checkpoint="best").step == 4


def test_a_step_is_that_checkpoint(run):
    for chosen in (6, "6"):
        assert same(load_run(run, checkpoint=chosen).variables["params"], parameters_at(run, 6))
    opened = open_model(run, checkpoint=6, ema=True)
    assert same(opened.variables["params"], parameters_at(run, 6, "ema")["params"])


def test_each_mistake_is_one_line(run, better_before, tmp_path):
    with pytest.raises(UserError, match=r"checkpoint=5: not there .*there are 2, 4, 6, 8, 10\. "):
        load_run(run, checkpoint=5)
    with pytest.raises(UserError, match="checkpoint=newest: give latest, best or a step"):
        load_run(run, checkpoint="newest")
    for part in (better_before / "checkpoints" / "4" / "default").rglob("*"):
        if part.is_file():
            part.write_bytes(b"x")
    for chosen in ("best", "4"):
        with pytest.raises(UserError, match=r"4: damaged .*take another of 2, 4, 6, 8, 10"):
            load_run(better_before, checkpoint=chosen)
    main(["convert", str(run), str(tmp_path / "plain"), "--to=deit_jax"])
    with pytest.raises(UserError, match=r"=best: none of those there \(0\) was evaluated"):
        load_run(tmp_path / "plain", checkpoint="best")
    main(["convert", str(run), str(tmp_path / "a.safetensors")])
    with pytest.raises(UserError, match="checkpoint=best is of a run, and this is none"):
        load_variables(tmp_path / "a.safetensors", checkpoint="best")


def test_convert_takes_it(run, better_before, tmp_path, capsys):
    main(["convert", str(better_before), str(tmp_path / "b"), "--to=deit_jax", "--checkpoint=best"])
    assert same(load_run(tmp_path / "b").variables["params"], parameters_at(run, 4))
    words = [str(run), str(tmp_path / "c"), "--to=deit_jax", "--checkpoint=6", "--ema"]
    main(["convert", *words])
    average = parameters_at(run, 6, "ema")["params"]
    assert same(load_run(tmp_path / "c").variables["params"], average)
    capsys.readouterr()
    assert main(["convert", str(run), str(tmp_path / "d"), "--checkpoint=newest"]) == 2
    assert "give latest, best or a step" in capsys.readouterr().err


def test_reports_take_it(better_before, capsys):
    main(["analyze", f"--workdir={better_before}", "--images=20", "--checkpoint=best", "--ema"])
    (figures,) = json.loads(capsys.readouterr().out)["runs"]
    assert (figures["checkpoint_step"], figures["checkpoint_ema"]) == (4, True)
    assert main(["report", f"--workdir={better_before}", "--checkpoint=5"]) == 1
    assert "there are 2, 4, 6, 8, 10" in capsys.readouterr().err


def test_a_start_and_a_teacher_take_it(run, better_before, tmp_path):
    c = make_tiny_config()
    c.init.weights, c.init.checkpoint, c.init.ema = str(better_before), "best", True
    c.teacher.weights, c.teacher.checkpoint = str(better_before), "best"
    experiment, dataset = prepare(c)
    start = starting_weights(experiment, tmp_path, dataset.classes)
    assert same(start["params"], parameters_at(run, 4, "ema")["params"])
    spec = experiment.teacher
    _, params = load_teacher(spec, spec.weights, dataset.classes)
    assert same(params, parameters_at(run, 4))
    c.teacher.checkpoint = "latest"
    spec = prepare(c)[0].teacher
    _, latest = load_teacher(spec, spec.weights, dataset.classes)
    assert parameters_sha256(params) != parameters_sha256(latest)  # a tape knows them by that


REFUSED = [
    ({"init.checkpoint": "best"}, "config.init.checkpoint='best': there is no config.init.weights"),
    ({"init.ema": True}, "config.init.ema=True: there is no config.init.weights"),
    ({"init.checkpoint": "first"}, "config.init.checkpoint=first: give latest, best or a step"),
    ({"teacher.ema": True}, "config.teacher.ema=True: there is no config.teacher.weights"),
    ({"teacher.checkpoint": "best", "distill.kind": "none"}, "config.teacher.checkpoint='best'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_choice_of_nothing_is_refused(changes, message):
    c = make_tiny_config()
    c.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        prepare(c)


def test_a_teacher_trained_first_may_be_its_best():
    c = make_tiny_config()
    c.teacher.checkpoint = "best"
    assert prepare(c)[0].teacher.checkpoint == "best"


def told(workdir):
    """Return the evaluations of a run by their step, as it noted them."""
    records = [r for r in read_lines(workdir / "metrics.jsonl") if "eval/fused.top1" in r]
    return {r["step"]: r for r in records}


def test_every_kept_checkpoint_is_evaluated_in_one_call(run, capsys):
    assert main(["eval", f"--workdir={run}", "--checkpoint=all", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["checkpoints"]
    noted = told(run)
    assert [one["step"] for one in said] == sorted(noted) == [2, 4, 6, 8, 10]
    for one in said:
        for head in ("cls", "dist", "fused"):
            expected = noted[one["step"]][f"eval/{head}.top1"]
            assert one[head]["top1"] == pytest.approx(expected, abs=1e-6)
    assert main(["eval", f"--workdir={run}", "--checkpoint=all"]) == 0
    out = capsys.readouterr().out
    assert [f"step {step}: images of" in out for step in (2, 4, 6, 8, 10)] == [True] * 5


def test_an_evaluation_of_one_checkpoint_and_of_the_average(run, better_before, capsys):
    assert main(["eval", f"--workdir={better_before}", "--checkpoint=best", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)
    assert best["step"] == 4
    assert best["fused"]["top1"] == pytest.approx(told(run)[4]["eval/fused.top1"], abs=1e-6)
    assert main(["eval", f"--workdir={run}", "--checkpoint=4", "--ema", "--json"]) == 0
    average = json.loads(capsys.readouterr().out)
    assert average["cls"] == best["ema"]["cls"]
    assert "ema" not in average


def test_predictions_and_features_of_one_checkpoint(run, better_before, tmp_path, capsys):
    """The features are those of the parameters that Orbax reads there."""
    picture = tmp_path / "x.png"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    model, _, spec = deit_jax.load(better_before, return_spec=True)
    images = jnp.asarray(deit_jax.preprocess(picture, spec))
    for words, step, part in (
        (["--checkpoint=best"], 4, "params"),
        (["--checkpoint=6", "--ema"], 6, "ema"),
        ([], 10, "params"),
    ):
        params = parameters_at(run, step, part)
        params = jax.tree.map(jnp.asarray, params["params"] if part == "ema" else params)
        out = tmp_path / f"{step}.npy"
        command = [f"--weights={better_before}", *words, str(picture)]
        assert main(["embed", f"--out={out}", *command]) == 0
        tokens = np.asarray(deit_jax.features(model, params, images, layers=-1))
        np.testing.assert_allclose(np.load(out), tokens[:, :2].mean(1), atol=1e-5)
        capsys.readouterr()
        assert main(["predict", "--json", *command]) == 0
        (said,) = json.loads(capsys.readouterr().out)["results"]
        logits = jax.jit(model.apply)({"params": params}, images).fused()
        chances = np.sort(np.asarray(jax.nn.softmax(logits)[0]))[::-1]
        np.testing.assert_allclose(
            [p["probability"] for p in said["predictions"]], chances[:5], atol=1e-5
        )
    _, params = deit_jax.load(better_before, checkpoint="best")
    assert same(params, parameters_at(run, 4))


def test_checkpoints_that_commands_cannot_take(run, capsys):
    for words, line in (
        (["eval", f"--weights={run}", "--checkpoint=all"], "is for the --workdir of a run"),
        (["eval", f"--workdir={run}", "--checkpoint=5"], "there are 2, 4, 6, 8, 10"),
        (["predict", f"--weights={run}", "--checkpoint=all", "x.png"], "latest, best or a step"),
        (["embed", f"--weights={run}", "--checkpoint=7", "--out=x.npy", "x.png"], "not there"),
    ):
        assert main(words) in (1, 2)
        assert line in capsys.readouterr().err.splitlines()[-1]


def test_an_average_is_evaluated_at_another_size_too(run, tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text(
        "from tests.tiny import make_tiny_config, train_without_picture\n"
        "def get_config():\n    return make_tiny_config()\n"
    )
    words = ["eval", f"--config={config}", "--config.model.image_size=24", "--json"]
    said = []
    for more in ([], ["--ema"]):
        assert main([*words, f"--workdir={run}", *more]) == 0
        said.append(json.loads(capsys.readouterr().out))
        assert said[-1]["input"]["image_size"] == 24
    assert said[0]["ema"]["cls"] == said[1]["cls"]
    assert main(["eval", f"--workdir={run}", "--config.data.eval_crop_ratio=1.0"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--config.data.eval_crop_ratio: a field of a config; name the config too" in line

"""Label tapes in parts: recorded by several, joined, and compared with the live teacher."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deit_jax.configs.base import get_model_config

from deit_jax.cli import compile_cache
from deit_jax.cli import tape as command
from deit_jax.cli.flags import UsageError
from deit_jax.errors import UserError
from deit_jax.models.build import build_model
from deit_jax.parallel import sharding
from deit_jax.train import record_tape
from deit_jax.train.experiment import prepare
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.run import train
from deit_jax.train.tape import join as join_lib
from deit_jax.train.tape import session, tape
from deit_jax.train.tape.check import check
from deit_jax.train.tape.join import join
from tests.test_tape import LAYOUTS, answers, array, assert_same_tape, given, make_tape
from tests.tiny import make_tiny_config, save_weights

STEPS, K = 10, 10
CONFIG = """
import {module} as module


def get_config(kind="hard"):
    c = module.taught(module.make_tiny_config(), {root!r})
    c.distill.kind = kind
    return c
"""


def write_teacher(path, config, seed):
    """Write the weights of a small teacher of random answers, none of which it is unsure of."""
    c = config.teacher.model
    model = build_model(c, K, "float32", "teacher.", 3)
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 16, 16, 3)))
    variables = jax.tree.map(np.array, jax.device_get(variables))
    head, rng = variables["params"]["head"], np.random.default_rng(seed)
    head["kernel"] = rng.normal(0, 3, head["kernel"].shape).astype(np.float32)
    told = {"mean": config.data.mean, "std": config.data.std, "crop_ratio": 0.9}
    classes = [f"class {i}" for i in range(K)]
    save_weights(path, c.name, model, variables, classes=classes, **told)


def taught(c, root=None):
    """Return a config whose teacher is a small transformer, in ROOT/teacher.safetensors."""
    c.dtype, c.data.decoder = "float32", "pillow"
    c.teacher.model = get_model_config("deit_tiny_patch16_224")
    m = c.teacher.model
    m.image_size, m.patch_size, m.width, m.depth, m.num_heads = 16, 4, 24, 1, 3
    if root:
        c.teacher.weights = f"{root}/teacher.safetensors"
    return c


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Compute on one device, and compile into no cache."""
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda n, **_: make_mesh(n, jax.devices()[:1]))
        patch.setattr(compile_cache, "enable", lambda: None)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a folder with a config file, two teachers and a whole tape of the first one."""
    path = tmp_path_factory.mktemp("tapes")
    config = taught(make_tiny_config(), path)
    for number, name in enumerate(("teacher", "other")):
        write_teacher(path / f"{name}.safetensors", config, number)
    (path / "config.py").write_text(CONFIG.format(module=__name__, root=str(path)))
    command.main(["record", f"--config={path}/config.py", f"--workdir={path}/run"])
    return path


@pytest.fixture
def config(root):
    return taught(make_tiny_config(), root)


def run(*words):
    command.main([str(word) for word in words])


def facts_of(capsys, *words):
    capsys.readouterr()
    run(*words, "--json")
    return json.loads(capsys.readouterr().out)


def line_of(*words):
    """Return the line with which a command is refused."""
    with pytest.raises(UserError) as caught:
        run(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def record_part(root, path, steps, *more):
    run("record", f"--config={root}/config.py", f"--steps={steps}", f"--tape={path}", *more)


def test_parts_recorded_apart_and_joined_are_the_whole_tape(root, tmp_path, capsys):
    record_part(root, tmp_path / "a", "0:4")
    record_part(root, tmp_path / "b", "3:8")  # step 3 a second time: the same answers
    facts = facts_of(capsys, "info", tmp_path / "b")
    assert (facts["recorded"], facts["missing"]) == (5, [[0, 3], [8, 10]])
    run("info", tmp_path / "b")
    assert "missing steps: 0:3, 8:10\n" in capsys.readouterr().out
    facts = facts_of(capsys, "join", tmp_path / "whole", tmp_path / "b", tmp_path / "a")
    assert (facts["recorded"], facts["missing"]) == (8, [[8, 10]])
    record_part(root, tmp_path / "c", "8:")
    assert facts_of(capsys, "join", tmp_path / "whole", tmp_path / "c")["missing"] == []
    assert_same_tape(tmp_path / "whole", root / "run" / "tape")
    names = ["labels", "lock", "recorded", "tape.json"]
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == names
    run("join", tmp_path / "whole", tmp_path / "a", tmp_path / "c")  # again: nothing to do
    assert_same_tape(tmp_path / "whole", root / "run" / "tape")


def test_a_part_is_taken_up_and_ends_with_the_run(root, tmp_path, caplog, monkeypatch):
    record_part(root, tmp_path / "a", "6:8")
    asked = []
    answers_of = record_tape.Labeller.answers
    monkeypatch.setattr(
        record_tape.Labeller,
        "answers",
        lambda self, first, stop: asked.append((first, stop)) or answers_of(self, first, stop),
    )
    with caplog.at_level(logging.INFO, "deit_jax"):
        record_part(root, tmp_path / "a", "5:99")
    assert asked == [(5, 6), (8, 10)]
    assert "--steps=5:99: the run ends after its 10 steps" in caplog.text
    whole = array(root / "run" / "tape", "labels")
    np.testing.assert_array_equal(array(tmp_path / "a", "labels")[5:], whole[5:])


@pytest.mark.parametrize("steps", ["10:12", "4:4", "5:3"])
def test_steps_that_the_run_has_not_are_refused(root, tmp_path, steps):
    with pytest.raises(UserError, match=rf"--steps={steps}: the run has the steps 0 to 9; give"):
        record_part(root, tmp_path / "a", steps)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("steps", ["5", "-1:3", "a:b", "1:2:3", "0.5:2"])
def test_what_are_no_steps_is_a_usage_error(root, tmp_path, steps):
    with pytest.raises(UsageError, match=rf"--steps={steps}: give A:B"):
        record_part(root, tmp_path / "a", steps)


def test_a_part_needs_a_tape_and_a_teacher(root, tmp_path):
    words = ["record", f"--config={root}/config.py", "--steps=0:2"]
    assert "name it with --tape=PATH" in line_of(*words)
    line = line_of(*words, f"--tape={tmp_path}/a", "--config.teacher.weights=")
    assert "--steps: the parts of a tape are of one teacher" in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["info"], "give deit tape info PATH"),
        (["info", "a", "b"], "unexpected argument 'b'"),
        (["join", "a"], "give deit tape join DST SRC"),
        (["info", "a", "--steps=0:1"], "--steps: `deit tape info` does not take it"),
        (["join", "a", "b", "--multihost"], "--multihost: `deit tape join` does not take it"),
        (["check", "a", "--tape=b"], "--tape: `deit tape check` does not take it"),
        (["check", "a"], "--config=… is missing"),
        (["sing"], "give record, join, check, info"),
    ],
)
def test_words_that_are_not_understood(words, line):
    with pytest.raises(UsageError) as caught:
        run(*words)
    assert line in str(caught.value)


def test_two_writers_of_one_tape_are_kept_apart(root, config, tmp_path):
    with session.alone(tmp_path / "a"):
        with pytest.raises(UserError, match=r"a: another process writes this label tape \(process"):
            record_part(root, tmp_path / "a", "0:2")
        with pytest.raises(UserError, match=r"another process writes"):
            join(tmp_path / "a", [root / "run" / "tape"])
        config.teacher.tape, config.teacher.tape_path = "record", str(tmp_path / "a")
        with pytest.raises(UserError, match=r"another process writes"):
            train(config, tmp_path / "run")
    record_part(root, tmp_path / "a", "0:2")


# Tapes without a teacher, of a few steps.


@pytest.fixture(params=LAYOUTS, ids=lambda x: x.kind)
def layout(request):
    return request.param


def written(path, layout, steps, count=6, rollbacks=0, **fields):
    """Write a tape of `count` steps with the answers of some; return what it was made of."""
    made = tape.Tape.create(path, layout, given(layout) | fields, count)
    recorder = session.TapeRecorder(made, layout)
    recorder.begin(0, count, rollbacks)
    signals, packed = answers(layout, count)
    for step in steps:
        recorder.record(step, packed[step])
    recorder.flush()
    return signals, packed


def test_joined_steps_are_those_that_were_written(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(tape, "CHUNK_STEPS", 4)
    monkeypatch.setattr(join_lib, "CHUNK_STEPS", 4)
    _, packed = written(tmp_path / "a", layout, [1, 3, 9, 10], 11)
    written(tmp_path / "b", layout, [0, 2, 3, 5], 7)
    made = tape.Tape.open(join(tmp_path / "made", [tmp_path / "b", tmp_path / "a"]))
    assert np.flatnonzero(made.recorded >= 0).tolist() == [0, 1, 2, 3, 5, 9, 10]
    assert len(made) == 11
    for step in (0, 1, 2, 3, 5, 9, 10):
        jax.tree.map(np.testing.assert_array_equal, made.parts(step), packed[step])


def test_a_join_that_was_killed_anywhere_is_run_again(tmp_path, layout, monkeypatch):
    """Killed before the n-th write of a chunk, or between it and its claim."""
    monkeypatch.setattr(tape, "CHUNK_STEPS", 2)
    monkeypatch.setattr(join_lib, "CHUNK_STEPS", 2)
    _, packed = written(tmp_path / "a", layout, [0, 1, 3, 4])
    written(tmp_path / "b", layout, [2, 5])
    sources = [tmp_path / "a", tmp_path / "b"]

    class Killed(BaseException):
        pass

    def dying(name, allowed):
        whole, calls = getattr(tape.Tape, name), []

        def call(*args):
            calls.append(args)
            if len(calls) > allowed:
                raise Killed
            return whole(*args)

        return call

    for name in ("write", "claim"):
        for allowed in range(3):
            path = tmp_path / f"{name}{allowed}"
            with monkeypatch.context() as patch:
                patch.setattr(tape.Tape, name, dying(name, allowed))
                with pytest.raises(Killed):
                    join(path, sources)
            opened = tape.Tape.open(path)
            for step in np.flatnonzero(opened.recorded >= 0).tolist():
                jax.tree.map(np.testing.assert_array_equal, opened.parts(step), packed[step])
            assert np.sum(opened.recorded >= 0) == 2 * allowed
            opened = tape.Tape.open(join(path, sources))
            for step in range(6):
                jax.tree.map(np.testing.assert_array_equal, opened.parts(step), packed[step])


def test_tapes_of_other_views_teachers_or_top_k_are_refused_with_what_differs(tmp_path):
    hard, soft = LAYOUTS
    written(tmp_path / "a", hard, [0], seed=0)
    written(tmp_path / "b", hard, [1], seed=1, **{"teacher.sha256": "f00"})
    line = line_of("join", tmp_path / "made", tmp_path / "a", tmp_path / "b")
    assert line.startswith(f"{tmp_path / 'b'}: not of the same views and teacher as")
    assert "seed: 0 there, 1 here; teacher.sha256: None there, f00 here" in line
    written(tmp_path / "c", soft, [0], seed=0)
    line = line_of("join", tmp_path / "made", tmp_path / "a", tmp_path / "c")
    assert "distill.kind: hard there, soft here" in line
    other = type(soft)("soft", 4, 10, 5)
    written(tmp_path / "d", other, [0], seed=0)
    line = line_of("join", tmp_path / "made", tmp_path / "c", tmp_path / "d")
    assert "top_k: 3 there, 5 here" in line
    assert not (tmp_path / "made").exists()
    line = line_of("join", tmp_path / "c", tmp_path / "a")  # what is there, too
    assert "distill.kind: hard there, soft here" in line


def test_a_tape_from_before_a_field_joins_one_with_it(tmp_path):
    written(tmp_path / "old", LAYOUTS[0], [0])
    written(tmp_path / "new", LAYOUTS[0], [1], **{"data.exif": False})
    join(tmp_path / "one", [tmp_path / "old", tmp_path / "new"])
    join(tmp_path / "two", [tmp_path / "new", tmp_path / "old"])
    assert_same_tape(tmp_path / "one", tmp_path / "two")
    written(tmp_path / "exif", LAYOUTS[0], [1], **{"data.exif": True})
    for pair in (("old", "exif"), ("exif", "old")):
        line = line_of("join", tmp_path / "x", *(tmp_path / name for name in pair))
        assert "data.exif" in line


def test_steps_that_disagree_are_refused(tmp_path):
    layout = LAYOUTS[0]
    written(tmp_path / "a", layout, [0, 1, 2])
    written(tmp_path / "b", layout, [1, 2, 3])
    opened = tape.Tape.open(tmp_path / "b")
    labels = answers(layout, 6)[1][5]  # another step's
    for future in opened.write(2, {name: part[None] for name, part in labels.items()}):
        future.result()
    opened.claim(np.array([2]), 0, [tape.checksum(labels)])
    line = line_of("join", tmp_path / "made", tmp_path / "a", tmp_path / "b")
    assert f"{tmp_path / 'b'}: step 2 has other answers than in {tmp_path / 'a'} (1 of 2" in line
    written(tmp_path / "c", layout, [3, 4], rollbacks=1)
    line = line_of("join", tmp_path / "made", tmp_path / "b", tmp_path / "c")
    assert "step 3 has other answers" in line
    assert not (tmp_path / "made").exists()


def test_damage_and_a_path_named_twice_are_refused(tmp_path):
    written(tmp_path / "a", LAYOUTS[0], [0, 1])
    for words in ((tmp_path / "a", tmp_path / "a"), (tmp_path / "x", *[tmp_path / "a"] * 2)):
        assert "this label tape is named twice" in line_of("join", *words)
    shutil.rmtree(tmp_path / "a" / "labels")
    assert "a/labels: cannot be read (missing)" in line_of("join", tmp_path / "x", tmp_path / "a")
    make_tape(tmp_path / "b", LAYOUTS[0])
    file = tmp_path / "b" / "labels" / "0.0"
    file.unlink()
    line = line_of("join", tmp_path / "x", tmp_path / "b")
    assert f"{tmp_path / 'b'}: step 0 has changed since it was written" in line


# Against the live teacher.


def test_the_right_tape_agrees_and_one_of_other_weights_fails(root, capsys, tmp_path):
    path = root / "run" / "tape"
    words = ["check", path, f"--config={root}/config.py"]
    facts = facts_of(capsys, *words, "--samples=3")
    assert facts["compared"] == [0, 4, 9]
    assert (facts["agreement"], facts["passed"], facts["largest_difference"]) == (100.0, True, None)
    run(*words)
    assert (
        capsys.readouterr().out == f"{path}: 100.00 % of the labels of 10 steps are the teacher's\n"
    )
    line = line_of(*words, f"--config.teacher.weights={root}/other.safetensors")
    assert f"{path}: of another teacher (teacher.sha256: " in line
    assert "% of the labels" in capsys.readouterr().out
    # Where the fingerprint says nothing, the answers do.
    shutil.copytree(path, tmp_path / "outside")
    content = json.loads((tmp_path / "outside" / "tape.json").read_text())
    content["fingerprint"] |= {"teacher.sha256": None, "teacher.model": "theirs"}
    (tmp_path / "outside" / "tape.json").write_text(json.dumps(content))
    words[1] = tmp_path / "outside"
    assert facts_of(capsys, *words)["passed"]
    line = line_of(*words, f"--config.teacher.weights={root}/other.safetensors")
    assert "% of its answers are the teacher's, below 99 %" in line
    assert "seed: 0 there, 3 here" in line_of(*words, "--config.seed=3")
    assert "give config.teacher.weights" in line_of(*words, "--config.teacher.weights=")


def test_soft_answers_are_compared_with_the_formula(root, config, tmp_path, capsys):
    words = [f"--config={root}/config.py:soft", f"--tape={tmp_path}/soft", "--steps=2:4"]
    run("record", *words, "--config.teacher.tape_top_k=3")
    facts = check(tmp_path / "soft", f"{root}/config.py:soft")
    assert facts["compared"] == [2, 3]
    assert facts["agreement"] == 100.0
    experiment, dataset = prepare(config)
    network, params = load_teacher(experiment.teacher, config.teacher.weights, dataset.classes)
    labeller = record_tape.Labeller(experiment, dataset, (network, params))
    seen = jax.jit(lambda n, b: record_tape_images(n, b, experiment.settings))
    largest = 0.0
    for step in (2, 3):
        logits = np.asarray(network.logits(params, seen(step, labeller.batches(step))), np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        kept = -np.sort(-logs, -1)[:, :3]
        rounded = array(tmp_path / "soft", "logits")[step].astype(np.float64)
        largest = max(largest, np.abs(kept - rounded).max())
    np.testing.assert_allclose(facts["largest_difference"], largest, rtol=1e-3)
    facts = facts_of(capsys, "check", tmp_path / "soft", f"--config={root}/config.py:soft")
    assert facts["passed"]
    run("check", tmp_path / "soft", f"--config={root}/config.py:soft")
    assert "% of the kept log-probabilities of 2 steps" in capsys.readouterr().out


def record_tape_images(step, batch, settings):
    from deit_jax.step.train_step import model_inputs

    return model_inputs(step, batch, settings)[0]


def test_a_tape_without_a_step_is_not_checked(root, tmp_path, config):
    experiment, _ = prepare(config)
    layout = session.layout_of(experiment)
    written(tmp_path / "none", layout, [])
    with pytest.raises(UserError, match=r"none: no step is recorded"):
        check(tmp_path / "none", config)

"""Label tapes that another program writes: the views are the step's own, and so are the labels."""

import dataclasses
import logging
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deit_jax.tape
from deit_jax import tape
from deit_jax.errors import UserError
from deit_jax.models.heads import Heads
from deit_jax.step.distill.base import Distillation, Outputs
from deit_jax.step.objective import DISTILLATIONS
from deit_jax.step.teacher import FrozenTeacher
from deit_jax.storage import read_json
from deit_jax.train.experiment import prepare
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.tape.tape import Tape
from tests.test_multi_label import painted, painting  # noqa: F401
from tests.test_tape import array
from tests.test_tape_parts import CONFIG, one_device, root, run, taught  # noqa: F401
from tests.tiny import make_tiny_config, train_without_picture

ROOT = Path(__file__).parent.parent
B, K, STEPS = 32, 10, 10
NAME = "a test's own network"


@pytest.fixture
def config():
    """Return the students' config, which names no teacher."""
    return taught(make_tiny_config())


def logits_of(step, classes=K):
    return np.random.default_rng(step).normal(0, 3, (B, classes)).astype(np.float32)


def test_it_is_imported_in_either_way():
    assert deit_jax.tape is tape
    assert {"views", "Writer", "View", "join", "check"} == set(tape.__all__)


class Seen(FrozenTeacher):
    """A teacher that says what it sees."""

    def outputs(self, params, images, features=False):
        return Outputs(Heads(images.reshape(len(images), -1)))


def test_views_are_what_the_fused_step_sees_to_the_bit(config, monkeypatch):
    """The teacher inside the compiled step hands the images out, as the metrics of recording do."""
    seen = Distillation(
        target=lambda outputs: outputs.heads.fused(),
        loss=lambda outputs, target, settings, extras: jnp.sum(outputs.heads.taught) * 0.0,
    )
    monkeypatch.setitem(DISTILLATIONS, "seen", seen)
    views = list(tape.views(config, 3, 6))
    config.distill.kind, config.teacher.weights = "seen", "those of the class above"
    experiment, dataset = prepare(config)
    settings = dataclasses.replace(experiment.settings, record=True)
    experiment = dataclasses.replace(experiment, settings=settings)
    ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    step = experiment.jit_step(Seen(None, *ones, *ones))
    state = experiment.new_state()
    batches = experiment.batches(dataset)
    for view in views:
        state = state.replace(step=jnp.int32(view.step))
        state, metrics = step(state, {}, experiment.on_devices(batches(view.step)))
        seen = np.asarray(metrics["teacher_target"]).reshape(B, 16, 16, 3)
        np.testing.assert_array_equal(view.images, seen)
    assert [view.step for view in views] == [3, 4, 5]


def test_a_view_says_how_its_images_were_normalised(config):
    """Without erasing and mixing, undone by the formula, they are the batch's bytes."""
    config.augment.erase_prob, config.mixing.prob, config.loss.smoothing = 0.0, 0.0, 0.1
    config.data.mean, config.data.std = (0.1, 0.2, 0.3), (0.5,)
    experiment, dataset = prepare_alone(config)
    (view,) = tape.views(config, STEPS - 1)
    batch = experiment.batches(dataset)(STEPS - 1)
    assert (view.images.dtype, view.images.shape) == (np.float32, (B, 16, 16, 3))
    assert (view.mean, view.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    pixels = 255 * (view.images * np.float32(view.std) + np.float32(view.mean))
    np.testing.assert_allclose(pixels, batch["image"], atol=1e-3)
    smoothed = np.full((B, K), 0.1 / K) + 0.9 * np.eye(K)[batch["label"]]
    np.testing.assert_allclose(view.targets, smoothed, rtol=1e-6)
    view.images[:] = 0  # the caller's own


def prepare_alone(config):
    config = config.copy_and_resolve_references()
    config.distill.kind = "none"
    return prepare(config)


def test_a_config_is_read_as_the_command_reads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("beside.py").write_text("SEED = 7\n")
    Path("mine.py").write_text(
        "import beside\nfrom tests.tiny import make_tiny_config\n\n\n"
        "def get_config(seed='0'):\n    c = make_tiny_config()\n"
        "    c.seed, c.data.decoder = beside.SEED + int(seed), 'pillow'\n    return c\n"
    )
    c = make_tiny_config()
    c.seed, c.data.decoder = 9, "pillow"
    ((ours,), (theirs,)) = (tape.views(x, 2, 3) for x in ("mine.py:2", c))
    np.testing.assert_array_equal(ours.images, theirs.images)
    with pytest.raises(UserError, match=r"nowhere.py: no such file below"):
        tape.views("nowhere.py")
    with pytest.raises(UserError, match=r"mine.py:x: ValueError: invalid literal"):
        tape.views("mine.py:x")
    with pytest.raises(UserError, match=r"unknown argument 'colour'"):
        tape.views("configs/deit.py:colour=red")
    Path("other.py").write_text("def get_config():\n    return {}\n")
    with pytest.raises(UserError, match=r"other.py: its get_config\(\) returns no ConfigDict"):
        tape.views("other.py")


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, STEPS + 1)])
def test_views_beyond_the_run_are_refused(config, start, stop):
    with pytest.raises(
        UserError, match=rf"start={start}, stop={stop}: the run has the steps 0 to 9"
    ):
        tape.views(config, start, stop)


def test_an_identical_teacher_writes_the_tape_that_deit_tape_records(root, config, tmp_path):  # noqa: F811
    """Ours, called from outside; in two goes, and of classes in another order."""
    known = taught(make_tiny_config(), root)
    experiment, dataset = prepare(known)
    network, params = load_teacher(experiment.teacher, known.teacher.weights, dataset.classes)
    teacher = jax.jit(network.logits)
    with tape.Writer(config, tmp_path / "tape", NAME) as writer:
        assert writer.missing() == list(range(STEPS))
        for view in tape.views(config, 4, 7):
            writer.write(view.step, teacher(params, view.images))
        assert writer.missing() == [0, 1, 2, 3, 7, 8, 9]
    backwards = dataset.classes[::-1]
    with tape.Writer(config, tmp_path / "tape", NAME, classes=backwards) as writer:
        for view in writer.views():
            writer.write(np.int64(view.step), np.asarray(teacher(params, view.images))[:, ::-1])
        assert writer.missing() == []
    for name in ("labels", "recorded"):
        ours = array(root / "run" / "tape", name)
        np.testing.assert_array_equal(array(tmp_path / "tape", name), ours)
    facts = tape.check(tmp_path / "tape", known)
    assert (facts["passed"], facts["agreement"]) == (True, 100.0)


def test_soft_answers_are_the_largest_of_their_log_softmax(config, tmp_path):
    config.distill.kind, config.teacher.tape_top_k = "soft", 3
    with tape.Writer(config, tmp_path / "tape", NAME) as writer:
        writer.write(2, logits_of(2).astype(np.float64))
        writer.write(2, logits_of(2))  # again, before it is on disk
    logs = logits_of(2).astype(np.float64)
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    np.testing.assert_array_equal(
        array(tmp_path / "tape", "indices")[2], np.argsort(-logs, -1)[:, :3]
    )
    np.testing.assert_allclose(
        array(tmp_path / "tape", "logits")[2], -np.sort(-logs, -1)[:, :3], rtol=1e-3, atol=1e-3
    )


def test_torch_hands_over_its_tensors(config, tmp_path, torch):
    with tape.Writer(config, tmp_path / "tape", NAME) as writer, warnings.catch_warnings():
        warnings.simplefilter("error")
        for view in writer.views(0, 2):
            assert torch.from_numpy(view.images).shape == (B, 16, 16, 3)
            logits = torch.from_numpy(logits_of(view.step)).requires_grad_()
            writer.write(view.step, logits.bfloat16() if view.step else logits)
    labels = array(tmp_path / "tape", "labels")
    np.testing.assert_array_equal(labels[0], logits_of(0).argmax(-1))
    rounded = torch.from_numpy(logits_of(1)).bfloat16().float().numpy()
    np.testing.assert_array_equal(labels[1], rounded.argmax(-1))


def test_several_labels_are_bits(painting, tmp_path):  # noqa: F811
    c = painting
    c.distill.kind = "hard"
    (view,) = tape.views(c, 0, 1)
    size, classes = view.targets.shape
    logits = np.random.default_rng(0).normal(0, 1, (size, classes)).astype(np.float32)
    with tape.Writer(c, tmp_path / "tape", NAME) as writer:
        writer.write(0, logits)
    bits = np.unpackbits(array(tmp_path / "tape", "labels")[0], axis=-1, count=classes)
    np.testing.assert_array_equal(bits.astype(bool), logits > 0)


@pytest.mark.parametrize(
    ("step", "logits", "line"),
    [
        (0, np.zeros((B, K + 1), np.float32), "step 0: got [32, 11], not logits of 32 images and"),
        (0, np.zeros((B - 1, K), np.float32), "step 0: got [31, 10], not logits"),
        (0, np.zeros(B, np.float32), "step 0: got [32], not logits"),
        (0, np.zeros((B, K), np.int32), "step 0: got int32, not logits"),
        (0, np.zeros((B, K), bool), "step 0: got bool, not logits"),
        (0, np.full((B, K), np.nan, np.float32), "step 0: logits of 32 images are not finite"),
        (0, np.full((B, K), 1e39), "step 0: logits of 32 images are not finite"),
        (STEPS, np.zeros((B, K), np.float32), "step 10: the run has the steps 0 to 9"),
        (-1, np.zeros((B, K), np.float32), "step -1: the run has the steps 0 to 9"),
    ],
)
def test_what_is_no_answer_is_refused(config, tmp_path, step, logits, line):
    with tape.Writer(config, tmp_path / "t", NAME) as writer:
        writer.write(1, logits_of(1))
        with pytest.raises(UserError) as caught:
            writer.write(step, logits)
    assert f"{tmp_path / 't'}: {line}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert np.flatnonzero(Tape.open(tmp_path / "t").recorded >= 0).tolist() == [1]


def test_a_tape_is_of_one_teacher_and_one_config(config, tmp_path, root):  # noqa: F811
    path = tmp_path / "tape"
    with tape.Writer(config, path, NAME) as writer:
        writer.write(0, logits_of(0))
        with pytest.raises(UserError, match=r"another process writes this label tape"):
            tape.Writer(config, path, NAME)
    with tape.Writer(config, path, NAME) as writer:
        writer.write(0, logits_of(0))  # the same again
        with pytest.raises(UserError, match=r"step 0 is there with other answers \(\d+ of 32"):
            writer.write(0, logits_of(1))
    with pytest.raises(UserError, match=r"written to a Writer that was closed"):
        writer.write(1, logits_of(1))
    with pytest.raises(UserError, match=r"teacher.model: a test's own network there, another here"):
        tape.Writer(config, path, "another")
    with pytest.raises(UserError, match=r"teacher.sha256: [0-9a-f]+ there, None here"):
        tape.Writer(config, root / "run" / "tape", NAME)
    config.seed = 1
    with pytest.raises(UserError, match=r"seed: 0 there, 1 here"):
        tape.Writer(config, path, NAME)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"distill.kind": "none"}, "config.distill.kind='none': a label tape cannot hold"),
        ({"teacher.weights": "w"}, "config.teacher.weights=w: the teacher is in this program"),
        ({"batch_size": 33}, "config.batch_size=33: must be a multiple"),
    ],
)
def test_configs_that_no_tape_fits_are_refused(config, tmp_path, fields, line):
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError) as caught:
        tape.Writer(config, tmp_path / "tape", NAME)
    assert line in str(caught.value)
    assert not (tmp_path / "tape").exists()


@pytest.mark.parametrize("name", ["", " ", "two\nlines"])
def test_a_teacher_has_a_name(config, tmp_path, name):
    with pytest.raises(UserError, match=r"teacher=.*: give a name"):
        tape.Writer(config, tmp_path / "tape", name)


def test_classes_that_do_not_go_together_are_refused(config, tmp_path, caplog):
    _, dataset = prepare_alone(config)
    with pytest.raises(UserError, match=r"teacher .* knows 9 classes, digits has 10"):
        tape.Writer(config, tmp_path / "tape", NAME, classes=dataset.classes[1:])
    with caplog.at_level(logging.INFO, "deit_jax"):
        tape.Writer(config, tmp_path / "tape", NAME, classes=dataset.classes[::-1]).close()
    assert "has another order of classes, mapped by their names" in caplog.text


def test_what_a_killed_program_had_flushed_is_right(config, tmp_path, monkeypatch):
    path = tmp_path / "tape"
    writer = tape.Writer(config, path, NAME)
    writer.write(3, logits_of(3))
    writer.flush()
    writer.write(4, logits_of(4))
    assert Tape.open(path).recorded.tolist() == [-1] * 3 + [0] + [-1] * 6  # as if killed now
    monkeypatch.setattr(tape, "FLUSH_S", -1)
    writer.write(5, logits_of(5))  # a minute later
    assert np.flatnonzero(Tape.open(path).recorded >= 0).tolist() == [3, 4, 5]
    writer.close()
    for step in (3, 4, 5):
        labels = Tape.open(path).target(step, range(B))
        np.testing.assert_array_equal(labels, logits_of(step).argmax(-1))


def test_a_full_disk_is_told_of_and_claims_nothing(config, tmp_path, monkeypatch):
    class Full:
        def result(self):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    writer = tape.Writer(config, tmp_path / "tape", NAME)
    with monkeypatch.context() as patch:
        patch.setattr(Tape, "write", lambda *_: [Full()])
        writer.write(0, logits_of(0))
        with pytest.raises(UserError, match=r"1 steps could not be written .*No space left"):
            writer.flush()
    assert 0 in writer.missing()
    writer.write(0, logits_of(0))
    writer.close()
    assert 0 not in writer.missing()


def test_the_documented_program_writes_a_tape_that_trains(tmp_path, torch, caplog, monkeypatch):
    """docs/tape.md's program as it stands, on a smaller quickstart; then a student replays it."""
    text = (ROOT / "docs" / "tape.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert 15 <= len(program.strip().splitlines()) <= 25
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.py").write_text(
        "from deit_jax.configs import quickstart\n\n\ndef get_config():\n"
        "    c = quickstart.get_config()\n    c.epochs, c.model.depth = 0.5, 1\n"
        "    c.train.eval_batch_size = 360\n    return c\n"
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/tape.md", "exec"), {"__name__": "program"})
    (path,) = tmp_path.glob("runs/*/tape")
    facts = Tape.open(path)
    assert (facts.recorded == 0).all()
    assert facts.fingerprint["teacher.sha256"] is None
    c = tape.files.config_of("configs/quickstart.py").copy_and_resolve_references()
    c.teacher.tape, c.teacher.tape_path = "replay", str(path)
    with caplog.at_level(logging.INFO, "deit_jax"):
        results = train_without_picture(c, tmp_path / "student")
    assert f"written by another program, of its teacher {facts.fingerprint['teacher.model']!r}" in (
        caplog.text
    )
    assert results["step"] == len(facts)
    c.teacher.weights = str(tmp_path / "student")
    with pytest.raises(UserError, match=r"another program wrote this label tape, of its teacher"):
        train_without_picture(c, tmp_path / "other")
    c.teacher.weights, c.epochs = "", 1.0
    with pytest.raises(UserError, match=r"has 7 of the 14 steps.*deit_jax.tape.Writer"):
        train_without_picture(c, tmp_path / "longer")
    assert read_json(tmp_path / "student" / "results.json") == results

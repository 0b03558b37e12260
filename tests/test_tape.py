"""Label tapes: the bits of the fused step, recorded once and replayed; refusals; damage."""

import json
import logging
import os
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from deit_jax.cli import tape as tape_lib
from deit_jax.config.serialize import to_json
from deit_jax.errors import UserError
from deit_jax.parallel import sharding
from deit_jax.step.train_step import model_inputs
from deit_jax.train import record_tape
from deit_jax.train import run as run_lib
from deit_jax.train.experiment import prepare
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.run import train
from deit_jax.train.tape import fingerprint, session, tape
from deit_jax.train.tape import layout as layout_lib
from deit_jax.train.teacher_spec import teacher_config
from deit_jax.workdir import checkpoints
from deit_jax.workdir.directory import changes
from tests.tiny import make_tiny_config, resolved

STEPS = 10


def full_config():
    """Return the recipe with everything random in it, and micro-batches."""
    c = make_tiny_config()
    c.dtype, c.model.drop_path, c.optim.accum_steps = "float32", 0.2, 2
    c.data.decoder = "pillow"
    c.train.save_every_epochs, c.train.keep_checkpoints = 0.2, 100  # every step
    c.train.eval_every_epochs = 100.0
    return c


def replaying(config, path, weights=""):
    c = config.copy_and_resolve_references()
    c.teacher.tape, c.teacher.tape_path, c.teacher.weights = "replay", str(path), weights
    return c


def saved(workdir):
    """Return the whole final state: parameters, moments, average, health."""
    return checkpoints.ocp.StandardCheckpointer().restore(
        (workdir / "checkpoints" / str(STEPS) / "default").absolute()
    )


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, saved(a), saved(b))


def array(path, name):
    """Return one array of a tape, read without our code."""
    store = {"driver": "file", "path": f"{path / name}/"}
    return ts.open({"driver": "zarr", "kvstore": store}, open=True).result().read().result()


def assert_same_tape(a, b):
    for name in ("labels", "recorded"):
        np.testing.assert_array_equal(array(a, name), array(b, name))


def cut_back(source, target, last):
    """Copy a run as if it had been killed after saving step `last`, its tape flushed with it."""
    shutil.copytree(source, target)
    (target / "results.json").unlink()
    for number in range(last + 1, STEPS + 1):
        shutil.rmtree(target / "checkpoints" / str(number))


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Train on one device and draw no picture at the end, which takes half the time.

    Tapes of several devices are in test_step.py, of several processes in test_multihost.py.
    """
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda n, **_: make_mesh(n, jax.devices()[:1]))
        patch.setattr(run_lib, "_draw", lambda trainer, results: None)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train the same student with the live teacher, without a tape and recording one."""
    root = tmp_path_factory.mktemp("runs")
    config = full_config()
    train(teacher_config(config), root / "teacher")
    config.teacher.weights = str(root / "teacher")
    train(config, root / "fused")
    recording = config.copy_and_resolve_references()
    recording.teacher.tape = "record"
    train(recording, root / "recorded")
    return types.SimpleNamespace(
        root=root, config=config, recording=recording, tape=root / "recorded" / "tape"
    )


@pytest.mark.slow
def test_recording_changes_no_bit_and_labels_are_the_teachers(runs):
    assert_same_bits(runs.root / "fused", runs.root / "recorded")
    labels, recorded = array(runs.tape, "labels"), array(runs.tape, "recorded")
    assert labels.dtype == np.int16
    assert labels.shape == (STEPS, 32)
    assert (recorded[:, 0] == 0).all()
    experiment, dataset = prepare(runs.config, runs.root / "fused")
    spec = experiment.teacher
    network, params = load_teacher(spec, spec.weights, dataset.classes)
    run = record_tape.Labeller(experiment, dataset, (network, params))
    for number in (0, 3, 9):
        batch = jax.tree.map(jnp.asarray, run.batches(number))
        images, *_ = model_inputs(number, batch, experiment.settings)
        logits = np.asarray(network.model.apply({"params": params}, images, train=False).cls)
        np.testing.assert_array_equal(labels[number], logits.argmax(-1))


@pytest.mark.slow
def test_a_tape_recorded_without_a_student_is_the_same(runs, tmp_path):
    config = runs.recording.copy_and_resolve_references()
    config.teacher.tape_path = str(tmp_path / "alone")
    assert record_tape.record(config, tmp_path / "run") == tmp_path / "alone"
    assert_same_tape(tmp_path / "alone", runs.tape)
    opened = tape.Tape.open(tmp_path / "alone")
    assert opened.fingerprint["teacher.sha256"]
    opened.recorded[4:] = 7
    opened.forget(4, 0)  # as if cut off there
    assert (array(tmp_path / "alone", "recorded")[4:] == -1).all()
    record_tape.record(config, tmp_path / "run")
    assert_same_tape(tmp_path / "alone", runs.tape)


@pytest.mark.slow
def test_a_replayed_run_has_the_bits_of_the_fused_one_also_resumed(runs, tmp_path, caplog):
    config = replaying(runs.config, runs.tape)
    with caplog.at_level(logging.INFO, "deit_jax"):
        results = train(config, tmp_path / "replayed")
    assert "which teacher it is of is not checked" in caplog.text
    assert "teacher" not in results
    assert_same_bits(runs.root / "fused", tmp_path / "replayed")
    cut_back(tmp_path / "replayed", tmp_path / "resumed", 4)
    train(config, tmp_path / "resumed")
    assert_same_bits(runs.root / "fused", tmp_path / "resumed")


@pytest.mark.slow
def test_a_recording_run_that_was_killed_ends_with_the_same_tape(runs, tmp_path):
    """Killed after checkpoint 4, with two more steps claimed on the tape, and four not."""
    cut_back(runs.root / "recorded", tmp_path / "run", 4)
    opened = tape.Tape.open(tmp_path / "run" / "tape")
    opened.recorded[6:] = 7
    opened.forget(6, 0)
    train(runs.recording, tmp_path / "run")
    assert_same_bits(runs.root / "fused", tmp_path / "run")
    assert_same_tape(tmp_path / "run" / "tape", runs.tape)


@pytest.mark.slow
def test_the_teacher_answers_where_the_tape_is_silent(runs, tmp_path, caplog):
    """A tape with holes and its teacher's weights: same bits; without weights: refused."""
    shutil.copytree(runs.tape, tmp_path / "tape")
    opened = tape.Tape.open(tmp_path / "tape")
    opened.recorded[[2, 3, 8]] = 1  # of a run that had rolled back
    opened._write_claims(0, STEPS)
    with pytest.raises(UserError, match=r"has 7 of the 10 steps.*config.teacher.weights"):
        train(replaying(runs.config, tmp_path / "tape"), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    config = replaying(runs.config, tmp_path / "tape", runs.config.teacher.weights)
    with caplog.at_level(logging.INFO, "deit_jax"):
        train(config, tmp_path / "run")
    assert "the teacher answers in the other 3" in caplog.text
    assert_same_bits(runs.root / "fused", tmp_path / "run")


@pytest.mark.slow
def test_a_tape_of_other_views_or_another_teacher_is_refused_with_every_difference(
    runs, tmp_path, monkeypatch
):
    config = replaying(runs.config, runs.tape)
    config.seed, config.augment.flip_prob = 1, 0.25
    with pytest.raises(
        UserError, match=r"seed: 0 there, 1 here; .*augment.flip_prob: 0.5 there, 0.25 here"
    ):
        train(config, tmp_path / "run")
    soft = replaying(runs.config, runs.tape)
    soft.distill.kind = "soft"
    with pytest.raises(UserError, match=r"distill.kind: hard there, soft here"):
        train(soft, tmp_path / "run")
    experiment, dataset = prepare(runs.config, tmp_path)
    spec = experiment.teacher
    network, params = load_teacher(spec, spec.weights, dataset.classes)
    other = jax.tree.map(lambda x: x + 1e-3, params)
    replay = resolved(replaying(runs.config, runs.tape), dataset)
    with pytest.raises(UserError, match=r"teacher.sha256"):
        session.open_tape(replay, tmp_path, dataset, (network, other))
    student = replaying(runs.config, runs.tape)
    student.model.drop_path, student.optim.lr, student.epochs = 0.0, 0.1, 1.0
    student.model.depth, student.loss.smoothing, student.optim.accum_steps = 3, 0.0, 1
    student.data.rules = experiment.config.data.rules  # as `prepare` finds them in the tape
    student = resolved(student, dataset)
    session.open_tape(student, tmp_path, dataset, (network, params))  # the student is free
    views = fingerprint.VIEWS
    monkeypatch.setattr(fingerprint, "VIEWS", views + 1)  # as a later version of the code has it
    with pytest.raises(UserError, match=rf"views: {views} there, {views + 1} here"):
        session.open_tape(student, tmp_path, dataset, (network, params))


def test_a_tape_from_before_a_field_has_its_old_meaning(tmp_path, tiny_config):
    tiny_config.data.decoder = "pillow"
    experiment, dataset = prepare(tiny_config, tmp_path)
    now = fingerprint.fingerprint(experiment, dataset, None)
    new = {"data.exif": False, "data.resize": "crop", "data.bits": 0}
    assert new.items() <= now.items()
    before = {k: v for k, v in now.items() if k not in new}
    fingerprint.check_fingerprint(tmp_path, before, now)
    for key, value in {"data.exif": True, "data.resize": "squash", "data.bits": 12}.items():
        for theirs in (before, now):
            with pytest.raises(UserError, match=rf"{key}: {new[key]} there, {value} here"):
                fingerprint.check_fingerprint(tmp_path, theirs, now | {key: value})


@pytest.mark.slow
def test_epochs_beyond_the_tape_are_counted(runs, tmp_path):
    config = replaying(runs.config, runs.tape)
    config.epochs = 3.0
    with pytest.raises(UserError, match=r"has 10 of the 15 steps to train"):
        train(config, tmp_path / "run")


def test_impossible_configs_are_refused(tiny_config, tmp_path):
    tiny_config.teacher.tape = "replay"
    with pytest.raises(UserError, match=r"config.teacher.tape_path='': replaying needs"):
        train(tiny_config, tmp_path / "run")
    tiny_config.teacher.tape_path = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere/tape.json: cannot be read"):
        train(tiny_config, tmp_path / "run")
    tiny_config.distill.kind = "none"
    with pytest.raises(UserError, match=r"config.teacher.tape='replay': a label tape is of a"):
        train(tiny_config, tmp_path / "run")


LAYOUTS = (layout_lib.Layout("hard", 4, 10, 3), layout_lib.Layout("soft", 4, 10, 3))


def given(layout):
    return {
        "distill.kind": layout.kind,
        "batch_size": layout.batch_size,
        "data.num_classes": layout.num_classes,
    }


def answers(layout, count):
    """Return `count` steps of a teacher's signals and their packed form."""
    rng = np.random.default_rng(0)
    shape = (count, layout.batch_size)
    if layout.kind == "hard":
        signals = rng.integers(0, layout.num_classes, shape).astype(np.int32)
    else:
        signals = rng.normal(0, 3, (*shape, layout.num_classes)).astype(np.float32)
    return signals, [jax.device_get(layout_lib.pack(jnp.asarray(s), layout)) for s in signals]


def make_tape(path, layout, steps=6, count=5, rollbacks=0):
    made = tape.Tape.create(path, layout, given(layout), steps)
    recorder = session.TapeRecorder(made, layout)
    recorder.begin(0, steps, rollbacks)
    signals, packed = answers(layout, count)
    for number, parts in enumerate(packed):
        recorder.record(number, parts)
    recorder.flush()
    return signals


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.kind)
def test_what_is_written_is_read_row_by_row(tmp_path, layout):
    signals = make_tape(tmp_path / "tape", layout)
    opened = tape.Tape.open(tmp_path / "tape")
    assert opened.holes(0, 6, 0).tolist() == [5]
    assert opened.holes(3, 8, 0).tolist() == [5, 6, 7]
    assert opened.holes(0, 6, 1).tolist() == list(range(6))
    found = opened.target(3, [1, 2])
    if layout.kind == "hard":
        np.testing.assert_array_equal(found, signals[3][1:3])
        return
    exact = np.exp(signals[3][1:3] - np.log(np.exp(signals[3][1:3]).sum(-1, keepdims=True)))
    softmax = np.exp(found) / np.exp(found).sum(-1, keepdims=True)
    top = np.argsort(-exact, -1)[:, :3]
    take = np.take_along_axis
    np.testing.assert_allclose(take(softmax, top, -1), take(exact, top, -1), rtol=5e-3)
    rest = (1 - take(exact, top, -1).sum(-1)) / 7  # spread evenly over the other seven
    np.testing.assert_allclose(
        np.sort(softmax, -1)[:, :7], np.repeat(rest[:, None], 7, 1), rtol=0.02
    )


def test_all_classes_kept_give_the_distribution_to_half_precision():
    layout = layout_lib.Layout("soft", 4, 10, 10)
    signals, packed = answers(layout, 1)
    found = layout_lib.unpack(packed[0], layout)
    np.testing.assert_allclose(
        found, np.asarray(jax.nn.log_softmax(signals[0])), rtol=1e-3, atol=1e-3
    )


def test_a_certain_teacher_leaves_finite_numbers():
    layout = layout_lib.Layout("soft", 1, 10, 3)
    sure = jnp.full((1, 10), -1e30).at[0, 4].set(1e30)
    assert np.isfinite(
        layout_lib.unpack(jax.device_get(layout_lib.pack(sure, layout)), layout)
    ).all()


def test_steps_that_a_rollback_undid_are_not_claimed(tmp_path):
    layout = LAYOUTS[0]
    make_tape(tmp_path / "tape", layout)
    recorder = session.TapeRecorder(tape.Tape.open(tmp_path / "tape"), layout)
    recorder.begin(2, 6, 1)
    opened = tape.Tape.open(tmp_path / "tape")
    assert opened.recorded.tolist() == [0, 0, -1, -1, -1, -1]
    recorder.record(2, answers(layout, 1)[1][0])
    assert tape.Tape.open(tmp_path / "tape").recorded.tolist() == opened.recorded.tolist()
    recorder.flush()
    assert tape.Tape.open(tmp_path / "tape").recorded.tolist() == [0, 0, 1, -1, -1, -1]


def test_a_tape_grows_with_the_run(tmp_path):
    layout = LAYOUTS[0]
    signals = make_tape(tmp_path / "tape", layout)
    recorder = session.TapeRecorder(tape.Tape.open(tmp_path / "tape"), layout)
    recorder.begin(5, 9, 0)
    recorder.record(8, answers(layout, 1)[1][0])
    recorder.flush()
    opened = tape.Tape.open(tmp_path / "tape")
    assert opened.recorded.tolist() == [0] * 5 + [-1] * 3 + [0]
    np.testing.assert_array_equal(opened.target(4, range(4)), signals[4])


def test_a_full_disk_is_told_of_and_claims_nothing(tmp_path, caplog, monkeypatch):
    layout = LAYOUTS[0]
    opened = tape.Tape.create(tmp_path / "tape", layout, given(layout), 6)
    recorder = session.TapeRecorder(opened, layout)
    recorder.begin(0, 6, 0)

    class Full:
        def result(self):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(opened, "write", lambda *_: [Full()])
        recorder.record(0, answers(layout, 1)[1][0])
        with caplog.at_level(logging.WARNING, "deit_jax"):
            recorder.flush()
    assert "1 steps could not be written" in caplog.text
    assert "No space left" in caplog.text
    recorder.record(1, answers(layout, 1)[1][0])
    recorder.flush()
    assert tape.Tape.open(tmp_path / "tape").recorded.tolist() == [-1, 0] + [-1] * 4


def read_all(path):
    opened = tape.Tape.open(path)
    return [opened.target(number, range(4)) for number in range(5)]


def chunk(path, layout):
    return (
        path
        / ("labels" if layout.kind == "hard" else "logits")
        / ("0.0" if layout.kind == "hard" else "0.0.0")
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.kind)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "no array", "lies", "no json"])
def test_damage_is_told_of_in_one_line(tmp_path, layout, damage):
    path = tmp_path / "tape"
    make_tape(path, layout)
    file = chunk(path, layout)
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:20])
    elif damage == "flipped":
        data = bytearray(file.read_bytes())
        data[-3] ^= 0x40
        file.write_bytes(bytes(data))
    elif damage == "no array":
        shutil.rmtree(file.parent)
    elif damage == "lies":
        content = json.loads((path / "tape.json").read_text())
        content["fingerprint"]["batch_size"] = 8
        (path / "tape.json").write_text(json.dumps(content))
    else:
        (path / "tape.json").write_text("{")
    with pytest.raises(UserError, match=r"/tape.*(restore|record)") as caught:
        read_all(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"format": 1},
        {"format": 1, "fingerprint": {}},
        {"format": 1, "fingerprint": {"distill.kind": ["hard"]}},
    ],
)
def test_json_that_says_nothing_is_refused(tmp_path, content):
    (tmp_path / "tape.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tape.json: "):
        tape.Tape.open(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    layout = LAYOUTS[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: the label tape cannot be written"):
        tape.Tape.create(tmp_path / "file", layout, given(layout), 6)
    made = tape.Tape.create(tmp_path / "tape", layout, given(layout), 6)
    monkeypatch.setattr(os, "access", lambda path, _: path.name != "labels")
    with pytest.raises(UserError, match=r"tape/labels: cannot be written; make it writable"):
        made.must_be_writable()
    with pytest.raises(UserError, match=r"holds other files"):
        tape.Tape.create(tmp_path, layout, given(layout), 6)


def test_info_counts_and_names(tmp_path, capsys):
    make_tape(tmp_path / "tape", LAYOUTS[0])
    tape_lib.main(["info", str(tmp_path / "tape"), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["steps"], facts["recorded"]) == ("hard", 6, 5)
    assert facts["bytes"] == sum(
        p.stat().st_size for p in (tmp_path / "tape").rglob("*") if p.is_file()
    )
    tape_lib.main(["info", str(tmp_path / "tape")])
    assert "5 of 6 steps recorded" in capsys.readouterr().out


def test_what_may_change_in_a_run(tiny_config):
    """A hard tape trains the same bits, so a run may take it up; a soft one is rounded."""
    old = to_json(tiny_config)
    tiny_config.teacher.tape, tiny_config.teacher.tape_path = "replay", "/tape"
    assert changes(old, to_json(tiny_config)) == {}
    tiny_config.distill.kind = old["distill"]["kind"] = "soft"
    changed = changes(old, to_json(tiny_config))
    assert changed == {"teacher.tape": "teacher.tape: off -> replay"}
    tiny_config.teacher.tape = "record"
    assert changes(old, to_json(tiny_config)) == {}

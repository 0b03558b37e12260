"""Trackers: one run after every start, each step of each curve once, and no harm to the run."""

import contextlib
import importlib.util
import json
import logging
import os
import queue
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import typing
import zlib
from pathlib import Path

import numpy as np
import pytest

from deit_jax import __main__ as program
from deit_jax.errors import Interrupted, UserError
from deit_jax.storage import read_json, read_lines
from deit_jax.workdir import trackers
from deit_jax.workdir.metrics import MetricWriter
from deit_jax.workdir.trackers import base, follow
from deit_jax.workdir.trackers import wandb as wandb_tracker

ROOT = Path(__file__).parent.parent
FIELDS = {"optim.lr": 0.001, "data.mean": [0.5, 0.5, 0.5], "init.weights": "", "seed": None}
LOG_EVERY, EVALUATE_EVERY = 2, 10
# An attempt at a run in a process of its own: from a step to another, then killed or ended.
ATTEMPT = """
import os, signal, sys, time
from pathlib import Path
from tests.test_trackers import attempt
workdir, names, start, stop, kill = sys.argv[1:]
attempt(Path(workdir), tuple(names.split(",")), int(start), int(stop), kill == "kill")
"""


def values_of(step):
    return {"loss": 1.0 / step, "lr": step / 1000}


def timing_of(step):
    return {"images_per_second": 100.0 + step}


def evaluation_of(step):
    return {"eval/cls.top1": step / 10.0}


def attempt(workdir, names, start, stop, kill):
    """Write as the training loop does; killed, beyond the checkpoint that the next one takes."""
    with follow.following(workdir, names, FIELDS, active=True) as following:
        writer = MetricWriter(workdir, start, 100, True, following)
        for step in range(start + 1, stop + 1):
            if step % LOG_EVERY == 0:
                writer.write(step, values_of(step))
                writer.write(step, timing_of(step), kind="timing")
            if step % EVALUATE_EVERY == 0:
                writer.write(step, evaluation_of(step))
        writer.close()
        if kill:
            if os.environ["KILL"] == "sent":  # what the tracker was given, it has
                while not all(one._calls.empty() for one in following._all):
                    time.sleep(0.05)
                time.sleep(follow.IDLE_S + 1.5)
            os.kill(os.getpid(), signal.SIGKILL)
        following.results(stop, {"cls.top1": 7.0})


def expected(stop):
    """Return {key: {step: value}} of a run that nobody stopped."""
    found = {"results/cls.top1": {stop: 7.0}}
    for step in range(LOG_EVERY, stop + 1, LOG_EVERY):
        rows = values_of(step) | timing_of(step)
        rows |= evaluation_of(step) if step % EVALUATE_EVERY == 0 else {}
        for key, value in rows.items():
            found.setdefault(key, {})[step] = pytest.approx(value)
    return found


def curves(points):
    """Return {key: {step: value}} of (key, step, value), none of which may be there twice."""
    found = {}
    for key, step, value in points:
        assert step not in found.setdefault(key, {}), (key, step)
        found[key][step] = value
    return found


# What each tracker has, read by other means than ours.


def wandb_records(data):
    """Yield the records of a file of W&B's, each part's checksum compared."""
    assert data[:7] == b":W&B" + struct.pack("<HB", 0xBEE1, 0)
    whole = b""
    for begin in range(0, len(data), 32768):
        block, place = data[begin : begin + 32768], 7 if begin == 0 else 0
        while len(block) - place >= 7:
            crc, length, kind = struct.unpack("<IHB", block[place : place + 7])
            part = block[place + 7 : place + 7 + length]
            assert zlib.crc32(bytes([kind]) + part) == crc
            place += 7 + length
            whole = part if kind in (1, 2) else whole + part
            if kind in (1, 4):
                yield whole


def wandb_runs(workdir):
    from wandb.proto.wandb_internal_pb2 import Record

    runs = []
    for path in sorted(workdir.glob("wandb/offline-run-*/run-*.wandb")):
        runs.append([Record.FromString(data) for data in wandb_records(path.read_bytes())])
    return runs


def wandb_points(workdir):
    for records in wandb_runs(workdir):
        for record in records:
            row = {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            for key in row.keys() - {"step"}:
                if not key.startswith("_"):
                    yield key, row["step"], row[key]


def mlflow_run(workdir):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{workdir.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("deit_jax")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def mlflow_points(workdir):
    client, run = mlflow_run(workdir)
    for key in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, key):
            yield key, point.step, point.value


def trackio_rows(folder):
    with contextlib.closing(sqlite3.connect(folder / "deit_jax.db")) as base:
        return base.execute("select run_id, run_name, step, metrics from metrics").fetchall()


def trackio_points(folder):
    for _, _, step, metrics in trackio_rows(folder):
        for key, value in json.loads(metrics).items():
            yield key, step, value


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Leave the environment without keys, servers and places of trackers."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def run_attempt(workdir, names, start, stop, kill):
    workdir.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPT, str(workdir), names, str(start), str(stop), kill],
        capture_output=True,
        text=True,
        cwd=workdir.parent,
    )
    assert done.returncode == (-signal.SIGKILL if kill == "kill" else 0), done.stderr
    assert done.stdout == ""  # where a command's results go
    return done.stderr


WHEN = ["at once", pytest.param("sent", marks=pytest.mark.slow)]


def killed_and_resumed(workdir, name, when, monkeypatch):
    """Train to step 30, killed twice: at 17 with a checkpoint of 10, then at once, then at 24."""
    monkeypatch.setenv("KILL", when)
    said = run_attempt(workdir, name, 0, 17, "kill")
    said += run_attempt(workdir, name, 10, 10, "kill")
    said += run_attempt(workdir, name, 10, 24, "kill")
    return said + run_attempt(workdir, name, 20, 30, "end")


@pytest.mark.parametrize("when", WHEN)
def test_wandb_has_each_step_once_under_one_id(offline, monkeypatch, when):
    workdir = offline / "runs/mine"
    assert killed_and_resumed(workdir, "wandb", when, monkeypatch) == ""
    assert curves(wandb_points(workdir)) == expected(30)
    made = [r.run for records in wandb_runs(workdir) for r in records if r.HasField("run")]
    assert {run.run_id for run in made} == {read_json(workdir / "trackers.json")["id"]}
    assert {(run.project, run.display_name) for run in made} == {("deit_jax", "runs/mine")}
    told = {i.key: json.loads(i.value_json) for i in made[0].config.update}
    assert FIELDS.items() <= told.items()
    inner = [
        [json.loads(i.value_json) for i in r.history.item if "_step" in i.nested_key]
        for records in wandb_runs(workdir)
        for r in records
        if r.history.item
    ]
    assert np.diff([step for (step,) in inner]).min() > 0  # W&B drops what goes back


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # of MLflow's own tables
@pytest.mark.parametrize("when", WHEN)
def test_mlflow_has_each_step_once_in_one_run(offline, monkeypatch, when):
    pytest.importorskip("sqlalchemy")
    workdir = offline / "runs/mine"
    assert killed_and_resumed(workdir, "mlflow", when, monkeypatch) == ""
    assert curves(mlflow_points(workdir)) == expected(30)
    _, run = mlflow_run(workdir)
    assert run.data.params == {key: str(value) for key, value in FIELDS.items()}
    assert run.data.tags["deit_jax.run"] == read_json(workdir / "trackers.json")["id"]
    assert (run.info.status, run.info.run_name) == ("FINISHED", "runs/mine")
    assert {p.name for p in workdir.parent.iterdir()} == {"mine", "mlflow.db", "mlflow.db.lock"}


@pytest.mark.parametrize("when", WHEN)
def test_trackio_has_each_step_once_in_one_run(offline, monkeypatch, when):
    pytest.importorskip("trackio", reason="it asks for an older Pillow: Makefile")
    workdir = offline / "runs/mine"
    assert killed_and_resumed(workdir, "trackio", when, monkeypatch) == ""
    assert curves(trackio_points(offline / "trackio")) == expected(30)
    name = f"runs/mine {read_json(workdir / 'trackers.json')['id']}"
    assert {run_name for _, run_name, _, _ in trackio_rows(offline / "trackio")} == {name}
    assert len({run_id for run_id, *_ in trackio_rows(offline / "trackio")}) == 1


class Kept(base.Tracker):
    """A tracker in memory, which a test tells how to behave."""

    store: typing.ClassVar = {}  # rows by a run's id
    closed: typing.ClassVar = []
    begun: typing.ClassVar = []
    trouble = None  # a function of what is called

    def __init__(self, run):
        super().__init__(run)
        self._trouble("open")
        self.rows = self.store.setdefault(run.id, [])

    def _trouble(self, what):
        if type(self).trouble:
            type(self).trouble(what)

    def key(self, name):
        return name.replace("é", "e")

    def last(self):
        found = {}
        for step, values in self.rows:
            found |= {key: max(step, found.get(key, 0)) for key in values}
        return found

    def begin(self, step):
        self.begun.append(step)

    def write(self, step, values):
        self._trouble("write")
        self.rows.append((step, dict(values)))

    def close(self, status):
        self._trouble("close")
        self.closed.append(status)


@pytest.fixture
def kept(monkeypatch):
    """Add a tracker by one file and one line."""
    kind = type("Tracker", (Kept,), {"store": {}, "closed": [], "begun": []})
    module = type(sys)("kept_tracker")
    module.Tracker = kind
    monkeypatch.setitem(sys.modules, "kept_tracker", module)
    monkeypatch.setitem(trackers.TRACKERS, "kept", trackers.Entry("kept_tracker"))
    return kind


def rows_of(kept):
    (rows,) = kept.store.values()
    return rows


def points_of(kept):
    return [(key, step, v) for step, values in rows_of(kept) for key, v in values.items()]


@pytest.fixture
def warned(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("deit_jax"), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_is_known_of_a_step_is_one_row(kept, tmp_path):
    attempt(tmp_path, ("kept",), 0, 20, False)
    assert [step for step, _ in rows_of(kept)] == [*range(2, 21, 2)]
    assert curves(points_of(kept)) == expected(20)
    assert kept.closed == ["finished"]
    assert kept.begun == [0]


def test_a_tracker_that_is_new_to_a_run_gets_what_was_before(kept, tmp_path):
    attempt(tmp_path, (), 0, 20, False)
    attempt(tmp_path, ("kept",), 20, 30, False)
    assert curves(points_of(kept)) == expected(30)


def test_a_rollback_adds_nothing_that_is_there(kept, tmp_path):
    with follow.following(tmp_path, ("kept",), FIELDS, active=True) as following:
        for start, stop, factor in ((0, 10, 1), (4, 12, 2)):
            writer = MetricWriter(tmp_path, start, 100, True, following)
            for step in range(start + 1, stop + 1):
                writer.write(step, {"loss": factor / step})
            writer.close()
    found = curves(points_of(kept))["loss"]
    assert found == {step: pytest.approx((1 if step <= 10 else 2) / step) for step in range(1, 13)}
    after = {r["step"]: r["loss"] for r in read_lines(tmp_path / "metrics.jsonl")}
    assert after[6] == pytest.approx(2 / 6)  # the run's own file has what it went on with
    assert kept.begun == [0, 4]


def test_an_evaluation_that_was_put_off_is_added_to_its_step(kept, tmp_path):
    with follow.following(tmp_path, ("kept",), FIELDS, active=True) as following:
        MetricWriter(tmp_path, 0, 100, True, following).write(10, {"loss": 1.0})
    with follow.following(tmp_path, ("kept",), FIELDS, active=True) as following:
        writer = MetricWriter(tmp_path, 10, 100, True, following)
        writer.write(10, {"eval/cls.top1": 5.0})
        writer.close()
    assert curves(points_of(kept)) == {"loss": {10: 1.0}, "eval/cls.top1": {10: 5.0}}


def test_only_the_first_process_follows(kept, tmp_path):
    with follow.following(tmp_path, ("kept", "tensorboard"), FIELDS, active=False) as following:
        writer = MetricWriter(tmp_path, 0, 100, False, following)
        writer.write(1, {"loss": 1.0})
        writer.close()
    assert (kept.store, list(tmp_path.iterdir())) == ({}, [])


def test_without_trackers_that_need_it_a_run_has_no_id(tmp_path):
    attempt(tmp_path, ("tensorboard",), 0, 4, False)
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "timing.jsonl", "tensorboard"}


def test_names_of_curves_are_spelled_as_the_tracker_wants_them(kept, tmp_path):
    for _ in range(2):
        with follow.following(tmp_path, ("kept",), FIELDS, active=True) as following:
            following.write(1, {"eval/fused.AP.é": 1.0})
    assert points_of(kept) == [("eval/fused.AP.e", 1, 1.0)]


LOST = OSError("no route to host\nand more")


def fails(at, error=LOST):
    def trouble(what):
        if what == at:
            raise error

    return staticmethod(trouble)


@pytest.mark.parametrize("error", [LOST, SystemExit("no route to host")])
@pytest.mark.parametrize("at", ["open", "write", "close"])
def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(kept, tmp_path, warned, at, error):
    kept.trouble = fails(at, error)
    attempt(tmp_path, ("kept",), 0, 30, False)
    line = "tracker kept: no route to host; the run goes on, and metrics.jsonl has all"
    assert warned() == [line]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 18


def test_a_tracker_that_failed_a_while_gets_what_comes_after(kept, tmp_path, warned):
    calls = iter(range(100))

    def trouble(what):
        if what == "write" and next(calls) in (1, 2):
            raise OSError("a moment")

    kept.trouble = staticmethod(trouble)
    attempt(tmp_path, ("kept",), 0, 20, False)
    assert [step for step, _ in rows_of(kept)] == [2, *range(8, 21, 2)]
    assert len(warned()) == 1


@pytest.mark.parametrize("at", ["open", "write", "close"])
def test_a_tracker_that_hangs_blocks_neither_the_run_nor_its_end(
    kept, tmp_path, warned, monkeypatch, at
):
    monkeypatch.setattr(follow, "PATIENCE_S", dict.fromkeys(base.PATIENCE_S, 0.3))
    released = threading.Event()
    kept.trouble = staticmethod(lambda what: released.wait() if what == at else None)
    attempt(tmp_path, ("kept",), 0, 30, False)
    assert warned() == ["tracker kept: not done in time; what it has not sent is lost"]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 18
    released.set()
    for thread in threading.enumerate():
        if thread.name == "tracker kept":
            thread.join()


def test_a_tracker_that_could_not_be_opened_keeps_nothing(kept, tmp_path, monkeypatch):
    kept.trouble = fails("open")
    with follow.following(tmp_path, ("kept",), FIELDS, active=True) as following:
        (one,) = following._all
        one._thread.join()
        following.write(1, {"loss": 1.0})
        with pytest.raises(queue.Empty):
            one._calls.get_nowait()


@pytest.mark.parametrize(
    ("error", "status"),
    [(Interrupted("told to"), "stopped"), (KeyboardInterrupt(), "stopped"), (OSError(), "failed")],
)
def test_trackers_are_told_how_a_run_ended(kept, tmp_path, error, status):
    with (
        pytest.raises(type(error)),
        follow.following(tmp_path, ("kept",), FIELDS, active=True),
    ):
        raise error
    assert kept.closed == [status]


def test_a_damaged_list_of_ids_stops_no_run(kept, tmp_path, warned):
    (tmp_path / "trackers.json").write_text("{")
    attempt(tmp_path, ("kept",), 0, 4, False)
    assert len(rows_of(kept)) == 2
    assert "trackers know the run by a new id" in warned()[0]


def test_words_with_commas_are_several():
    assert trackers.named(("tensorboard,wandb", " mlflow", "wandb", "")) == (
        *("tensorboard", "wandb", "mlflow"),
    )
    assert trackers.named(()) == ()


def test_a_name_that_there_is_not_is_one_line(capsys, tmp_path):
    words = [f"--workdir={tmp_path}/run", "--config.train.trackers=tensorboard,wandbb"]
    code = program.main(["train", f"--config={ROOT}/configs/quickstart.py", *words])
    err = capsys.readouterr().err.strip()
    assert (code, len(err.splitlines())) == (1, 1)
    assert "config.train.trackers=('tensorboard,wandbb',): takes any of tensorboard, wandb," in err


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_package_that_is_missing_is_named_before_anything_is_written(
    capsys, tmp_path, monkeypatch, name
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: None if n == name else find(n, *rest)
    )
    words = [f"--workdir={tmp_path}/run", f"--config.train.trackers=tensorboard,{name}"]
    code = program.main(["train", f"--config={ROOT}/configs/quickstart.py", *words])
    err = capsys.readouterr().err.strip()
    assert (code, len(err.splitlines())) == (1, 1)
    expected = f"config.train.trackers=tensorboard,{name}: {name} needs {name}; "
    assert f"{expected}pip install 'deit_jax[{name}]'" in err
    assert not (tmp_path / "run").exists()


def test_a_folder_of_a_packages_name_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "nowhere_else").mkdir()  # as W&B makes ./wandb
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(trackers.TRACKERS, "x", trackers.Entry("x", ("nowhere_else",)))
    with pytest.raises(UserError, match="x needs nowhere_else"):
        follow.check_installed(("x",))


@pytest.mark.parametrize(
    ("files", "variables", "known"),
    [
        ({}, {}, False),
        ({}, {"WANDB_API_KEY": "k"}, True),
        ({".netrc": "machine api.wandb.ai login user password k"}, {}, True),
        ({".netrc": "machine example.org login user password k"}, {}, False),
        (
            {".netrc": "machine w.org login user password k"},
            {"WANDB_BASE_URL": "https://w.org"},
            True,
        ),
        ({".netrc": "nonsense"}, {}, False),
    ],
)
def test_a_key_for_wandb_is_found(offline, monkeypatch, files, variables, known):
    (offline / "home").mkdir()
    for name, text in files.items():
        (offline / "home" / name).write_text(text + "\n")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_tracker._has_key() is known


def test_records_of_wandb_that_cross_blocks_are_read(tmp_path):
    """LevelDB's log format, written here from its description."""
    contents = [os.urandom(n) for n in (10, 40000, 0, 70000, 32768, 5)]
    data = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
    for content in contents:
        first = True
        while True:
            left = 32768 - len(data) % 32768
            if left < 7:
                data += bytes(left)
                left = 32768
            part, content = content[: left - 7], content[left - 7 :]
            kind = (1 if not content else 2) if first else (4 if not content else 3)
            crc = zlib.crc32(bytes([kind]) + part)
            data += struct.pack("<IHB", crc, len(part), kind) + part
            first = False
            if not content:
                break
    assert list(wandb_tracker._records(data)) == contents
    assert list(wandb_tracker._records(data[:-3])) == contents[:-1]
    assert list(wandb_tracker._records(b"")) == []


TRAIN = (
    *(f"--config={ROOT}/configs/quickstart.py", "--config.data.eval_fraction=0.9"),
    *("--config.distill.kind=none", "--config.model.name=deit_tiny_patch16_224"),
    *("--config.model.depth=1", "--config.model.width=24", "--config.model.image_size=16"),
    *("--config.model.patch_size=4", "--config.batch_size=32", "--config.mixing.group_size=8"),
    *(
        "--config.epochs=12",
        "--config.train.eval_every_epochs=1",
        "--config.train.log_every_steps=1",
    ),
    *("--config.train.save_every_epochs=2", "--config.train.trackers=tensorboard,wandb,mlflow"),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_a_training_that_is_killed_and_goes_on_is_followed_as_one(offline, monkeypatch):
    workdir = offline / "runs/mine"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    words = [sys.executable, "-m", "deit_jax", "train", *TRAIN, f"--workdir={workdir}"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) as killed:
        while len(read_lines(workdir / "metrics.jsonl")) < 27:
            assert killed.poll() is None
            time.sleep(0.05)
        killed.kill()
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "continuing at step" in done.stderr
    truth = {}
    for record in read_lines(workdir / "metrics.jsonl"):
        for key in record.keys() - {"step"}:
            truth.setdefault(key, {})[record["step"]] = pytest.approx(record[key])
    assert len(truth["loss"]) == 60
    assert len(truth["eval/fused.top1"]) == 12
    for points in (wandb_points(workdir), mlflow_points(workdir)):
        found = curves(points)
        assert {key: found[key] for key in truth} == truth
        assert set(found["images_per_second"]) == set(range(1, 61))
        results = read_json(workdir / "results.json")
        assert found["results/fused.top1"] == {60: pytest.approx(results["fused"]["top1"])}
    params = mlflow_run(workdir)[1].data.params
    assert params["optim.name"] == read_json(workdir / "config.json")["optim"]["name"]


MAKE = """
import sys
from pathlib import Path
from deit_jax.workdir.trackers.mlflow import _make_database
print("ready", flush=True)
_make_database(Path(sys.argv[1]), "file:///nowhere")
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_a_kill_while_mlflow_makes_its_tables_leaves_none(offline):
    """Killed ever later, until the data base is there; then it is whole."""
    path, delay = offline / "mlflow.db", 2.0
    while not path.exists():
        assert delay < 300
        words = [sys.executable, "-c", MAKE, str(path)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as made:
            made.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                made.wait(delay)
            made.kill()
        delay *= 1.3
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{path}")
    run = client.create_run(client.create_experiment("a"))
    client.log_metric(run.info.run_id, "loss", 1.0, step=3)
    (point,) = client.get_metric_history(run.info.run_id, "loss")
    assert (point.step, point.value) == (3, 1.0)

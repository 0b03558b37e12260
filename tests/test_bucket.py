"""Buckets: leases, appended files, copies on this machine, what commands do with gs:// and s3://.

A real server of the same interface answers (tests/emulator.py); whole runs are in faults/.
"""

import json
import os
import tarfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

import deit_jax
from deit_jax import storage
from deit_jax.cli.flags import UsageError
from deit_jax.configs import base
from deit_jax.data.prepare.build import prepare
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.storage import LockedError, fetch, gcs, lease, objects, to_path
from deit_jax.storage.bucket import Appender, Bucket
from deit_jax.train.tape.layout import Layout
from deit_jax.train.tape.tape import Tape
from deit_jax.workdir.checkpoints import Checkpointer
from deit_jax.workdir.directory import locked
from deit_jax.workdir.metrics import Lines, MetricWriter
from deit_jax.workdir.saved_run import _restore_on_host
from deit_jax.workdir.trackers.follow import following
from tests.emulator import BadLine
from tests.faults.test_rot import abstract, make_state
from tests.test_cli import deit
from tests.test_wds_source import add
from tests.tiny import save_weights


@pytest.fixture
def bucket(gcs_server, tmp_path, monkeypatch):
    """Return the folder of the emulator that is gs://bucket, emptied; copies go to tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return gcs_server.folder


def write(place, data=b"x"):
    storage.backend(to_path(place)).write(to_path(place), data)


def test_a_path_in_a_bucket_stays_one():
    path = to_path("gs://bucket/run")
    assert str(path / "a" / "b") == "gs://bucket/run/a/b"
    assert str((path / "a").parent) == str(path) == str(storage.absolute(path))
    assert to_path(path) is path
    assert isinstance(to_path("runs/x"), Path)
    assert to_path("~/x") == Path.home() / "x"


# Leases.


def quick(monkeypatch, **seconds):
    usual = {"RENEWED": 0.2, "EXPIRES": 5.0, "TRUSTED": 0.6, "WATCHED": 0.1}
    for name, value in (usual | seconds).items():
        monkeypatch.setattr(lease, name, value)


def elsewhere(monkeypatch, lost=True):
    """Let the next leases be taken by a process of another machine."""
    monkeypatch.setattr(lease, "_machine", lambda: "another machine" if lost else "this one")


def test_a_lease_that_is_renewed_is_not_taken(bucket, monkeypatch):
    quick(monkeypatch)
    disk, path = Bucket(), to_path("gs://bucket/renewed/lock")
    with disk.lock(path, "the first"):
        assert disk.is_locked(path)
        elsewhere(monkeypatch)
        began = time.monotonic()
        with pytest.raises(LockedError, match="the first"), Bucket().lock(path, "the second"):
            raise AssertionError
        assert time.monotonic() - began < lease.EXPIRES
        disk.write(path.parent / "file", b"still ours")
    assert not disk.is_locked(path)
    with Bucket().lock(path, "the second"):  # at once, as it was given back
        pass


def test_a_lease_that_nobody_renews_is_taken_and_the_old_holder_writes_no_more(
    bucket, monkeypatch, caplog
):
    """As when a machine stands still for minutes, and goes on when another one has the run."""
    quick(monkeypatch, RENEWED=1e6)
    old, path = Bucket(), to_path("gs://bucket/expired/lock")
    with old.lock(path, "the first"):
        old.write(path.parent / "file", b"first")
        elsewhere(monkeypatch)
        began, new = time.monotonic(), Bucket()
        with new.lock(path, "the second"):
            assert time.monotonic() - began > lease.EXPIRES
            assert "held by the first; it is taken over" in caplog.text
            new.write(path.parent / "file", b"second")
            with pytest.raises(OSError, match="another process has taken it over"):
                old.write(path.parent / "file", b"first again")
            with pytest.raises(OSError, match="taken it over"):
                old.must_be_writable(path.parent)
            old.write(to_path("gs://bucket/elsewhere/file"), b"that is another folder")
            assert new.read(path.parent / "file") == b"second"
    assert not new.is_locked(path)  # the first, ending later, gave nothing back that is not its own


def test_of_many_that_want_a_lease_one_has_it(bucket, monkeypatch):
    quick(monkeypatch, EXPIRES=30.0)
    path, got, refused = to_path("gs://bucket/wanted/lock"), [], []
    go, end = threading.Event(), threading.Event()

    def want(number):
        go.wait()
        try:
            with Bucket().lock(path, f"number {number}"):
                got.append(number)
                end.wait(20)
        except LockedError as error:
            refused.append(str(error))
            if len(refused) == 5:
                end.set()

    threads = [threading.Thread(target=want, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    assert set(refused) == {f"number {got[0]}"}


def test_a_process_of_this_machine_that_is_gone_holds_nothing(bucket, monkeypatch):
    quick(monkeypatch, EXPIRES=60.0)
    path = to_path("gs://bucket/gone/lock")
    pid = os.fork()
    if pid == 0:
        held = Bucket().lock(path, "the child")
        held.__enter__()
        os._exit(0)
    os.waitpid(pid, 0)
    assert b"the child" in Bucket().read(path)
    assert not Bucket().is_locked(path)
    began = time.monotonic()
    with Bucket().lock(path, "the parent"):
        assert time.monotonic() - began < 20


# What is appended.


def test_what_was_flushed_is_there_and_little_is_put(bucket):
    path, puts = to_path("gs://bucket/lines/x.jsonl"), []

    class Counting(Bucket):
        def write(self, path, data):
            puts.append(len(data))
            super().write(path, data)

    disk = Counting()
    end = disk.append(path)
    for number in range(200):
        end.append(f"{number}\n".encode())
    end.flush()
    assert disk.read(path).split() == [str(n).encode() for n in range(200)]
    assert len(puts) < 10
    end.append(b"more\n")
    end.close()
    again = disk.append(path)
    again.append(b"again\n")
    again.close()
    assert disk.read(path).split()[-3:] == [b"199", b"more", b"again"]


def test_a_put_that_fails_is_told_of_and_tried_again(bucket):
    path, broken = to_path("gs://bucket/failing/x"), [True]

    class Broken(Bucket):
        def write(self, path, data):
            if broken[0]:
                raise OSError(5, "the line is down", str(path))
            super().write(path, data)

    end = Appender(Broken(), path, b"")
    end.append(b"one\n")
    with pytest.raises(OSError, match="the line is down"):
        end.flush()
    broken[0] = False
    end.append(b"two\n")
    end.flush()
    end.close()
    assert Bucket().read(path) == b"one\ntwo\n"


@pytest.mark.parametrize("error", [OSError(5, "down"), AttributeError("a mistake")])
def test_all_who_wait_hear_of_a_put_that_fails(bucket, error):
    """The run that ends and the checkpoint that is being written, of a failure of any kind."""

    class Broken(Bucket):
        def write(self, path, data):
            time.sleep(0.3)
            raise error

    end, heard = Appender(Broken(), to_path("gs://bucket/failing/y"), b""), []
    end.append(b"one\n")

    def wait(call):
        try:
            call()
        except OSError as told:
            heard.append(str(told))

    calls = (end.flush, end.flush, end.close)
    threads = [threading.Thread(target=wait, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    wait(end.flush)  # after the end too
    assert len(heard) == 4
    assert all("down" in text or "AttributeError: a mistake" in text for text in heard)


def test_a_late_put_does_not_replace_what_another_run_has_written(bucket, monkeypatch):
    """The line breaks during a put; another process takes the folder; the line comes back."""
    quick(monkeypatch, RENEWED=1e6, TRY=0.2)
    down, real = [False], Bucket()

    class Line(gcs.Objects):
        def put(self, name, data, generation=None, patience=None):
            if down[0]:
                time.sleep(0.1)
                raise OSError(5, "the line is down", name)
            return super().put(name, data, generation, patience)

    old, path = Bucket(Line()), to_path("gs://bucket/late/lock")
    with old.lock(path, "the first"):
        down[0] = True
        late = []

        def put():
            try:
                old.write(path.parent / "file", b"first")
            except OSError as error:
                late.append(str(error))

        thread = threading.Thread(target=put)
        thread.start()
        elsewhere(monkeypatch)
        with real.lock(path, "the second"):
            real.write(path.parent / "file", b"second")
            down[0] = False
            thread.join(30)
            assert "taken it over" in late[0] or "down" in late[0]
            assert real.read(path.parent / "file") == b"second"


def test_a_clock_that_is_wrong_takes_nothing(bucket, monkeypatch):
    quick(monkeypatch)
    path = to_path("gs://bucket/clock/lock")
    with Bucket().lock(path, "the first"):
        elsewhere(monkeypatch)
        now = time.time
        monkeypatch.setattr(lease.time, "time", lambda: now() + 3600)
        with pytest.raises(LockedError, match="the first"), Bucket().lock(path, "the second"):
            raise AssertionError


def test_a_process_that_others_may_not_see_is_not_gone(monkeypatch):
    mine = lease._this_process()
    monkeypatch.setattr(lease, "_started", lambda pid: None)  # as with hidepid
    assert not lease._is_gone({"process": mine})
    monkeypatch.setattr(lease.os, "kill", _no_such_process)
    assert lease._is_gone({"process": mine})


def _no_such_process(pid, number):
    raise ProcessLookupError


def test_metrics_of_a_run_are_safe_before_its_checkpoint_is(bucket, monkeypatch):
    lines = Lines(to_path("gs://bucket/metrics/metrics.jsonl"), [{"step": 0}])
    lines.append({"step": 1})
    lines.flush()
    there = (bucket / "metrics" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in there] == [0, 1]
    lines.close()


def test_tensorboard_reads_what_was_written_to_a_bucket(bucket):
    place = to_path("gs://bucket/board")
    with following(place, ("tensorboard",), {}, active=True) as trackers:
        writer = MetricWriter(place, 0, 3, True, trackers)
        for step in range(1, 4):
            writer.write(step, {"loss": step / 2})
        writer.close()
    (file,) = (bucket / "board" / "tensorboard").iterdir()
    data, points = file.read_bytes(), {}
    while data:  # a record: its length and a checksum of that, the event, a checksum
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        points[event.step] = [v.simple_value for v in event.summary.value]
        data = data[16 + size :]
    assert {s: v for s, v in points.items() if v} == {1: [0.5], 2: [1.0], 3: [1.5]}


def test_a_label_tape_lies_in_a_bucket(bucket):
    layout = Layout("soft", 4, 5, 3, False, 0)
    given = {"distill.kind": "soft", "batch_size": 4, "data.num_classes": 5}
    tape = Tape.create(to_path("gs://bucket/tape"), layout, given, 10)
    assert len(Tape.open(to_path("gs://bucket/tape"))) == len(tape) == 10
    assert (bucket / "tape" / "recorded" / ".zarray").exists()
    assert not Path("gs:").exists()


# Checkpoints.


@pytest.fixture
def saved(bucket, tmp_path):
    """Return a workdir in the bucket with checkpoints 1, 2 and 3, and its folder on the server."""
    workdir = to_path(f"gs://bucket/{tmp_path.name}")
    saver = Checkpointer(workdir, keep=3)
    for number in (1, 2, 3):
        saver.save(number, jax.device_put(make_state(number)), None)
    saver.close()
    return workdir, bucket / tmp_path.name / "checkpoints"


def flip(checkpoint):
    victim = max((checkpoint / "default").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "cut": lambda c: os.truncate(c / "default" / "manifest.ocdbt", 20),
    "missing": lambda c: (c / "default" / "_METADATA").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(saved, damage):
    workdir, folder = saved
    DAMAGES[damage](folder / "3")
    told = []
    saver = Checkpointer(workdir, keep=3)
    saver.notify_with(lambda event, **facts: told.append((event, facts["step"])))
    state = saver.restore(abstract(jax.device_put(make_state(0))))
    saver.close()
    assert int(state.step) == 2
    np.testing.assert_array_equal(state.params["w"], make_state(2).params["w"])
    assert told == [("damaged checkpoint", 3)]
    assert (folder / "damaged-3" / "commit_success.txt").exists()
    assert storage.steps_in(workdir / "checkpoints") == [1, 2]


def test_where_every_checkpoint_is_damaged_nothing_is_changed(saved):
    workdir, folder = saved
    for number in (1, 2, 3):
        flip(folder / str(number))
    before = sorted(str(path) for path in folder.rglob("*"))
    saver = Checkpointer(workdir, keep=3)
    with pytest.raises(UserError, match=r"no good checkpoint .*nothing was changed"):
        saver.restore(abstract(jax.device_put(make_state(0))))
    saver.close()
    assert sorted(str(path) for path in folder.rglob("*")) == before


def test_what_a_killed_save_leaves_is_no_checkpoint(saved):
    """Without marks and checksums; it is written anew."""
    workdir, folder = saved
    for name in ("commit_success.txt", "sha256.json"):
        (folder / "3" / name).unlink()
    assert int(_restore_on_host(workdir / "checkpoints")["step"]) == 2
    saver = Checkpointer(workdir, keep=3)
    assert saver.latest_step == 2
    saver.save(3, jax.device_put(make_state(7)), None)
    saver.require_saved(3)
    state = saver.restore(abstract(jax.device_put(make_state(0))))
    saver.delete_after(1)  # as a rollback does
    saver.close()
    np.testing.assert_array_equal(state.params["w"], make_state(7).params["w"])
    assert storage.steps_in(workdir / "checkpoints") == [1]


def test_a_run_that_was_copied_from_a_disk_goes_on(bucket, tmp_path, caplog):
    """Its checkpoints have no mark of Orbax's, which would delete them."""
    saver = Checkpointer(tmp_path / "run", keep=3)
    for number in (1, 2, 3):
        saver.save(number, jax.device_put(make_state(number)), None)
    saver.close()
    upload(tmp_path / "run", "gs://bucket/copied")
    write("gs://bucket/copied/config.json", b"{}")
    flip(bucket / "copied" / "checkpoints" / "3")
    workdir = to_path("gs://bucket/copied")
    assert storage.steps_in(workdir / "checkpoints") == [1, 2, 3]
    assert int(_restore_on_host(workdir / "checkpoints")["step"]) == 2  # also by who only reads
    saver = Checkpointer(workdir, keep=3)
    state = saver.restore(abstract(jax.device_put(make_state(0))))
    saver.close()
    np.testing.assert_array_equal(state.params["w"], make_state(2).params["w"])
    assert storage.steps_in(workdir / "checkpoints") == [1, 2]
    assert (bucket / "copied" / "checkpoints" / "damaged-3" / "sha256.json").exists()
    assert int(_restore_on_host(workdir / "checkpoints")["step"]) == 2


def test_a_run_is_not_begun_where_orbax_may_not_look(bucket, monkeypatch):
    def forbidden(self, bucket):
        raise OSError(13, f"not allowed (403); ask for {gcs.ROLES}", f"gs://{bucket}")

    monkeypatch.setattr(gcs.Objects, "look", forbidden)
    text = r"^--workdir=gs://bucket/run: cannot be written \(not allowed .*legacyBucketReader"
    with pytest.raises(UserError, match=text), locked(to_path("gs://bucket/run")):
        raise AssertionError


def test_a_bucket_that_takes_nothing_more_ends_the_run_in_a_line(gcs_server, bucket, monkeypatch):
    line = BadLine(gcs_server.url)
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, line.url)
    gcs._client.cache_clear()
    saver = Checkpointer(to_path("gs://bucket/forbidden"), keep=3)
    line.forbids = True

    def save():
        saver.save(1, jax.device_put(make_state(1)), None)
        saver.settle()

    with pytest.raises(UserError, match=r"the state after step 1 cannot be saved .*writable again"):
        save()
    line.close()


# Copies.


@pytest.fixture
def images(bucket, tmp_path):
    """Return a folder of classes that lies at gs://bucket/pets too, and its pixels."""
    rng, root = np.random.default_rng(0), tmp_path / "pets"
    for split in ("train", "val"):
        for number in range(6):
            place = root / split / ("cat", "dog")[number % 2] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(place)
            write(f"gs://bucket/pets/{place.relative_to(root)}", place.read_bytes())
    return root


def data_of(source, **fields):
    data = base.get_config().data
    data.source = source
    for key, value in fields.items():
        data[key] = value
    return data


def test_a_folder_of_images_is_copied_once(images, bucket, monkeypatch):
    calls = []
    download = gcs.Objects.download
    monkeypatch.setattr(
        gcs.Objects, "download", lambda self, *a: calls.append(a) or download(self, *a)
    )
    here = open_dataset(data_of(f"folder:{images}"))
    for _ in range(2):
        there = open_dataset(data_of("folder:gs://bucket/pets"))
        assert there.classes == here.classes == ["cat", "dog"]
        for a, b in ((there.train, here.train), (there.eval, here.eval)):
            assert [a.key(i) for i in range(len(a))] == [b.key(i) for i in range(len(b))]
            assert [a[i]["image"] for i in range(6)] == [b[i]["image"] for i in range(6)]
        assert len(calls) == 12
    write("gs://bucket/pets/train/cat/new.png", (images / "train/cat/0.png").read_bytes())
    assert len(open_dataset(data_of("folder:gs://bucket/pets")).train) == 7
    (bucket / "pets" / "train" / "cat" / "new.png").unlink()


def test_a_copy_that_was_broken_off_goes_on(images, tmp_path, monkeypatch):
    download, calls = gcs.Objects.download, []

    def three(self, name, path, generation=None):
        if len(calls) == 3:
            raise OSError(5, "the line is down", name)
        calls.append(name)
        download(self, name, path, generation)

    monkeypatch.setattr(fetch, "AT_A_TIME", 1)
    monkeypatch.setattr(gcs.Objects, "download", three)
    with pytest.raises(UserError, match=r"^gs://bucket/pets: cannot be copied \(the line is down"):
        storage.local("gs://bucket/pets")
    monkeypatch.setattr(
        gcs.Objects, "download", lambda self, *a: calls.append(a[0]) or download(self, *a)
    )
    copy = storage.local("gs://bucket/pets")
    assert len(calls) == len(set(calls)) == 12
    assert len(list(copy.rglob("*.png"))) == 12


def test_a_copy_ends_at_once_when_told_to(images, monkeypatch):
    calls = []

    def slow(self, name, path, generation=None):
        calls.append(name)
        time.sleep(0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "AT_A_TIME", 1)
    monkeypatch.setattr(gcs.Objects, "download", slow)
    with pytest.raises(KeyboardInterrupt):
        storage.local("gs://bucket/pets")
    time.sleep(1.5)
    assert len(calls) <= 2


def test_a_copy_is_of_what_was_listed(images, bucket, monkeypatch):
    found = gcs.Objects.found

    def changed(self, prefix, limit=None):
        for one in found(self, prefix, limit):
            yield one._replace(generation=one.generation - 1)  # which is no more there

    monkeypatch.setattr(gcs.Objects, "found", changed)
    with pytest.raises(UserError, match="gs://bucket/pets: cannot be copied"):
        storage.local("gs://bucket/pets")


def test_where_copies_cannot_be_kept_it_says_so(images, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="let XDG_CACHE_HOME name a folder that can be written"):
        storage.local("gs://bucket/pets")


def test_where_there_is_no_room_nothing_is_copied(images, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "SPARE", 1 << 60)
    with pytest.raises(UserError, match=r"0\.0 GB are to be copied to .*let XDG_CACHE_HOME name"):
        storage.local("gs://bucket/pets")


def test_files_that_are_named_in_a_config_may_lie_there(images, bucket):
    write("gs://bucket/names.txt", b"dog\ncat\n")
    dataset = open_dataset(data_of("folder:gs://bucket/pets", classes="gs://bucket/names.txt"))
    assert dataset.classes == ["dog", "cat"]
    rows = "".join(f"train/{('cat', 'dog')[n % 2]}/{n}.png,{n % 2}\n" for n in range(6))
    write("gs://bucket/labels.csv", f"path,label\n{rows}".encode())
    labelled = open_dataset(data_of("folder:gs://bucket/pets", labels="gs://bucket/labels.csv"))
    assert labelled.classes == ["0", "1"]


def test_data_and_weights_lie_in_s3(s3_server, tmp_path, monkeypatch, capsys):
    """Runs do not: Orbax has no driver, which is one line before anything is made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "pets"
    for number in range(8):
        place = root / ("train", "val")[number % 2] / ("cat", "dog")[number // 4] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(place)
    upload(root, "s3://bucket/pets")
    there = open_dataset(data_of("folder:s3://bucket/pets"))
    assert same_images(there, open_dataset(data_of(f"folder:{root}")))
    model, params = deit_jax.load("deit_tiny_patch16_224", num_classes=2)
    told = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_ratio": 1.0, "classes": ["cat", "dog"]}
    file = tmp_path / "w.safetensors"
    save_weights(file, "deit_tiny_patch16_224", model, {"params": params}, **told)
    write("s3://bucket/w.safetensors", file.read_bytes())
    _, loaded = deit_jax.load("s3://bucket/w.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    for words in (
        ("convert", "s3://bucket/w.safetensors", "s3://bucket/hf", "--to=huggingface"),
        ("predict", "--weights=s3://bucket/hf", "s3://bucket/pets/val", "--out=s3://bucket/a.csv"),
    ):
        code, _, err = deit(capsys, *words)
        assert code == 0, err
    rows = s3_server.get_object(Bucket="bucket", Key="a.csv")["Body"].read().decode().splitlines()
    assert [row.partition(",")[0] for row in rows[1:]] == [
        f"s3://bucket/pets/val/{c}/{n}.png"
        for c, n in (("cat", 1), ("cat", 3), ("dog", 5), ("dog", 7))
    ]
    monkeypatch.chdir(tmp_path)
    quickstart = f"--config={Path(__file__).parent.parent}/configs/quickstart.py"
    for words, name in (
        (("train", quickstart, "--workdir=s3://bucket/run"), "--workdir="),
        (
            ("train", quickstart, "--workdir=x", "--config.teacher.tape_path=s3://bucket/run"),
            "--config.teacher.tape_path=",
        ),
    ):
        code, _, err = deit(capsys, *words)
        assert (code, f"{name}s3://bucket/run: runs and label tapes cannot" in err) == (2, True)
    with (
        pytest.raises(UserError, match=r"cannot be written .*no driver"),
        locked(to_path("s3://bucket/run")),
    ):
        raise AssertionError
    assert sorted(os.listdir()) == ["cache", "pets", "w.safetensors"]
    with pytest.raises(UserError, match="there is no bucket s3://nobodys"):
        open_dataset(data_of("folder:s3://nobodys/x"))


@pytest.mark.parametrize("source", ["folder:gs://bucket/none", "wds:gs://bucket/none"])
def test_what_is_not_there_is_said(bucket, source):
    with pytest.raises(UserError, match="none"):
        open_dataset(data_of(source))
    with pytest.raises(UserError, match=r"^gs://nobodys/x: cannot be read \(there is no bucket"):
        open_dataset(data_of("folder:gs://nobodys/x"))
    with pytest.raises(UserError, match="a whole bucket; name a folder in it"):
        open_dataset(data_of("folder:gs://bucket"))


def test_idx_files_lie_there(bucket, tmp_path):
    from tests.test_idx_source import write_idx

    rng = np.random.default_rng(1)
    for part in ("train", "t10k"):
        for name, array in (
            ("images-idx3", rng.integers(0, 255, (5, 4, 4), np.uint8)),
            ("labels-idx1", np.arange(5, dtype=np.uint8)),
        ):
            file = tmp_path / f"{part}-{name}-ubyte"
            write_idx(file, array, zipped=False)
            write(f"gs://bucket/idx/{file.name}", file.read_bytes())
    dataset = open_dataset(data_of("mnist", dir="gs://bucket/idx"))
    assert (len(dataset.train), len(dataset.eval)) == (5, 5)


def same_images(a, b):
    """Return whether two data sets have the same images and labels, in order."""
    parts = ((a.train, b.train), (a.eval, b.eval))
    rows = [
        [(x["image"], x["label"]) for x in map(part.__getitem__, range(len(part)))]
        for pair in parts
        for part in pair
    ]
    return rows[0] == rows[1] and rows[2] == rows[3] and len(rows[0]) > 0


def test_prepared_data_and_tars_lie_there(images, bucket, tmp_path):
    """ArrayRecord and WebDataset: the whole folder of the data set is copied, and no other."""
    prepare(images, tmp_path / "tfds", "pets", workers=1)
    write("gs://bucket/tfds/other/1.0.0/file", b"not asked for")
    upload(tmp_path / "tfds", "gs://bucket/tfds")
    local = open_dataset(data_of("tfds:pets", dir=str(tmp_path / "tfds")))
    there = open_dataset(data_of("tfds:pets", dir="gs://bucket/tfds"))
    assert there.classes == local.classes == ["cat", "dog"]
    assert same_images(there, local)
    assert not list((tmp_path / "cache").rglob("other"))
    with pytest.raises(
        UserError, match=r"config.data.source=tfds:cats.*data.dir='gs://bucket/tfds'"
    ):
        open_dataset(data_of("tfds:cats", dir="gs://bucket/tfds"))
    (tmp_path / "wds").mkdir()
    with tarfile.open(tmp_path / "wds" / "train-0.tar", "w") as tar:
        for number, path in enumerate(sorted((images / "train").rglob("*.png"))):
            add(tar, f"{number}.png", path.read_bytes())
            add(tar, f"{number}.cls", b"%d" % (number % 2))
    upload(tmp_path / "wds", "gs://bucket/wds")
    assert same_images(
        *(open_dataset(data_of(f"wds:{w}")) for w in (tmp_path / "wds", "gs://bucket/wds"))
    )


def upload(folder, place):
    for path in folder.rglob("*"):
        if path.is_file() and path.name[0] != ".":
            write(f"{place}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def test_weights_and_their_places(bucket, capsys, tmp_path, images):
    """`convert` writes to a bucket, and what is there is loaded, described and predicts."""
    model, params = deit_jax.load("deit_tiny_patch16_224", num_classes=2)
    file = tmp_path / "w.safetensors"
    code, _, err = deit(
        capsys, "predict", "--weights=gs://bucket/none.safetensors", "gs://bucket/x.png"
    )
    assert (code, err) == (
        1,
        "deit predict: gs://bucket/none.safetensors: no such file or folder",
    )
    told = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_ratio": 1.0, "classes": ["cat", "dog"]}
    save_weights(file, "deit_tiny_patch16_224", model, {"params": params}, **told)
    write("gs://bucket/weights/w.safetensors", file.read_bytes())
    code, out, err = deit(
        capsys,
        "convert",
        "gs://bucket/weights/w.safetensors",
        "gs://bucket/weights/hf",
        "--to=huggingface",
    )
    assert code == 0, err
    assert (bucket / "weights" / "hf" / "config.json").exists()
    names = ("gs://bucket/weights/hf", "gs://bucket/weights/w.safetensors")
    answers = []
    for name in names:
        words = [f"--weights={name}", "gs://bucket/pets/val/cat", "--format=json"]
        code, out, err = deit(capsys, "predict", *words)
        assert code == 0, err
        answers.append(json.loads(out)["results"])
        paths = [answer["image"] for answer in answers[-1]]
        assert paths == [f"gs://bucket/pets/val/cat/{n}.png" for n in (0, 2, 4)]
    (tmp_path / "list").write_text("gs://bucket/pets/val/cat/2.png\n")
    words = [f"--weights={names[0]}", f"--list={tmp_path / 'list'}", "--format=json"]
    code, out, err = deit(capsys, "predict", *words)
    assert (code, json.loads(out)["results"]) == (0, answers[0][1:2])
    code, _, err = deit(capsys, "predict", f"--weights={names[0]}", "gs://bucket/pets/val/*/*.png")
    assert (code, "patterns are of a disk; give the folder in the bucket" in err) == (1, True)
    scores = [[p["probability"] for r in a for p in r["predictions"]] for a in answers]
    np.testing.assert_allclose(*scores, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["embed", "--weights=x", "--out=gs://bucket/f.npy", "x.png"], "--out=gs://bucket/f.npy"),
        (["prepare", "gs://bucket/pets", "gs://bucket/tfds"], "DST=gs://bucket/tfds"),
    ],
    ids=["embed", "prepare"],
)
def test_what_needs_a_disk_says_so(capsys, tmp_path, monkeypatch, bucket, words, flag):
    monkeypatch.chdir(tmp_path)
    code, _, err = deit(capsys, *words)
    assert code in (1, 2)
    assert f"{flag}: is not written to a bucket; name a disk" in err
    assert not Path("gs:").exists()


def test_a_bad_line_costs_time_alone(gcs_server, bucket, monkeypatch):
    """A third of all requests fails, of these a third after what was asked was done."""
    line = BadLine(gcs_server.url, failing=0.33, seed=2)
    monkeypatch.setattr(gcs, "_retry", lambda: _fast())
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", line.url)
    gcs._client.cache_clear()
    try:
        disk, place = Bucket(), to_path("gs://bucket/bad")
        for number in range(10):
            disk.write(place / f"{number}", b"%d" % number)
        assert [disk.read(place / f"{n}") for n in range(10)] == [b"%d" % n for n in range(10)]
        assert disk.names(place) == [str(n) for n in range(10)]
        assert disk.exists(place / "3")
        disk.rename(place, to_path("gs://bucket/worse"))
        assert not disk.exists(place)
        disk.remove(to_path("gs://bucket/worse"))
        assert disk.names(to_path("gs://bucket/worse")) == []
        with disk.lock(place / "lock", "on a bad line"):
            disk.must_take_files(place)
        assert line.counts["failed"] > 10
    finally:
        gcs._client.cache_clear()
        line.close()


def _fast():
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(60).with_delay(initial=0.01, maximum=0.05)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("Forbidden", "not allowed"),
        ("Unauthorized", "no credentials for Google Cloud"),
        ("NotFound", "No such file"),
    ],
)
def test_what_the_service_says_becomes_one_line(error, says):
    from google.api_core import exceptions

    with pytest.raises(OSError, match=says) as raised, gcs._explained("bucket/x"):
        raise getattr(exceptions, error)("a long\nstory")
    assert raised.value.filename == "gs://bucket/x"
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_of_seconds_is_named(gcs_server, monkeypatch, text):
    monkeypatch.setenv("DEIT_GCS_TIMEOUT", text)
    objects.silence.cache_clear()
    with pytest.raises(UserError, match=f"^DEIT_GCS_TIMEOUT={text}: give seconds above 0"):
        storage.local("gs://bucket/x")
    monkeypatch.setenv("DEIT_GCS_TIMEOUT", "2.5")
    objects.silence.cache_clear()
    assert objects.silence() == 2.5
    objects.silence.cache_clear()


def test_without_the_packages_the_remedy_is_named(monkeypatch, tmp_path):
    import builtins

    real = builtins.__import__

    def missing(name, *rest, **more):
        if name.startswith("google.cloud"):
            raise ImportError(name)
        return real(name, *rest, **more)

    gcs._client.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"gs://b/x: .*pip install 'deit_jax\[gcs\]'"):
        storage.local("gs://b/x")
    with pytest.raises((UserError, UsageError, OSError), match=r"deit_jax\[gcs\]"):
        open_dataset(ConfigDict(data_of("folder:gs://b/x")))

"""What every back end of storage/ promises: the local disk, and a bucket on a server here."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import deit_jax
from deit_jax import storage
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.storage import BACKENDS, LockedError, append_line, backend, read_lines, to_path

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=sorted(BACKENDS))
def disk(request):
    return BACKENDS[request.param]


@pytest.fixture
def place(request, disk, tmp_path):
    """Return a folder that `disk` keeps."""
    if disk is BACKENDS[""]:
        return tmp_path
    scheme = next(name for name, kept in BACKENDS.items() if kept is disk)
    request.getfixturevalue({"gs": "gcs_server", "s3": "s3_server"}[scheme])
    return to_path(f"{scheme}://bucket/{tmp_path.name}")


def test_a_file_is_written_whole_in_the_place_of_the_old_one(disk, place):
    path = place / "deep" / "er" / "file"
    disk.make_folder(path.parent)
    disk.make_folder(path.parent)  # which is there
    disk.write(path, b"old")
    disk.write(path, b"new")
    assert disk.read(path) == b"new"
    assert disk.read_start(path, 2) == b"ne"
    assert disk.names(path.parent) == ["file"]  # nothing is left of the writing
    disk.write(path, b"")
    assert disk.read(path) == disk.read_start(path, 2) == b""
    nowhere = path / "below a file" if disk is BACKENDS[""] else None
    nowhere = nowhere or to_path(f"{str(place)[:2]}://no-such/x")
    with pytest.raises(OSError, match=r"."):
        disk.write(nowhere, b"")
    with pytest.raises(OSError, match=r"."):
        disk.make_folder(nowhere)
    with pytest.raises(FileNotFoundError):
        disk.read(place / "none")


def test_checksums_are_of_the_content(disk, place):
    data = bytes(range(256)) * 5000
    disk.make_folder(place)
    disk.write(place / "file", data)
    assert disk.sha256(place / "file") == hashlib.sha256(data).hexdigest()
    with pytest.raises(FileNotFoundError):
        disk.sha256(place / "none")


def test_what_is_appended_is_at_the_end(disk, place):
    disk.make_folder(place)
    for data in (b"one\n", b"two\n"):
        with contextlib.closing(disk.append(place / "lines")) as end:
            end.append(data)
            end.flush()
            assert disk.read(place / "lines").endswith(data)
    assert disk.read(place / "lines") == b"one\ntwo\n"
    with contextlib.closing(disk.create(place / "lines")) as end:
        end.append(b"anew\n")
    assert disk.read(place / "lines") == b"anew\n"


def test_a_write_that_fails_takes_no_room(tmp_path, monkeypatch):
    """The disk is full when half of the file is written."""
    disk = BACKENDS[""]
    path = tmp_path / "file"
    disk.write(path, b"old")
    write = Path.write_bytes

    def full(path, data):
        write(path, data[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        disk.write(path, b"new")
    assert disk.names(tmp_path) == ["file"]
    assert disk.read(path) == b"old"


def test_links_and_pipes_are_written_through(tmp_path):
    """As the shell's > does: `--out=/dev/stdout`, a link to a larger disk."""
    disk = BACKENDS[""]
    (tmp_path / "far").mkdir()
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "far" / "file")
    for data in (b"new", b"newer"):
        disk.write(link, data)
        assert link.is_symlink()
        assert (tmp_path / "far" / "file").read_bytes() == data
    assert disk.names(tmp_path / "far") == ["file"]
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    disk.write(pipe, b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()


def test_the_scheme_of_a_path_chooses_the_back_end(monkeypatch):
    other = storage.LocalDisk()
    monkeypatch.setitem(BACKENDS, "toy", other)
    assert backend(Path("toy://bucket/run")) is other
    for local in ("run", "/run", "toy/run", "C:/run", "a:b/run"):
        assert backend(Path(local)) is BACKENDS[""]


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("https://host/run", "download it"),
        ("file://host/run", "leave file:// out"),
        ("hdfs://host/run", "hdfs:// is not understood"),
    ],
)
def test_a_scheme_that_nothing_keeps_is_refused(place, remedy, tmp_path, monkeypatch):
    """And no folder named `gs:` is made for it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^{place}/history.jsonl: .*{remedy}"):
        append_line(Path(place) / "history.jsonl", {})
    with pytest.raises(UserError, match=rf"^--out={place}: .*{remedy}"):
        storage.check_scheme("--out", place)
    with pytest.raises(UserError, match=rf"^weights={place}: .*{remedy}"):
        deit_jax.load(place)
    with pytest.raises(UserError, match=remedy):
        deit_jax.load("deit_tiny_patch16_224", weights=place)
    data = ConfigDict({"source": f"folder:{place}"})
    with pytest.raises(UserError, match=rf"^config.data.source=folder:{place}: .*{remedy}"):
        open_dataset(data)
    assert os.listdir() == []


def test_a_process_that_dies_while_it_writes_leaves_the_old_file(disk, place):
    """Killed at some moment of a loop of writes, again and again: the file is one of the whole."""
    path = place / "file"
    code = (
        "import sys\n"
        "from deit_jax.storage import backend, to_path\n"
        "path = to_path(sys.argv[1])\n"
        "while True:\n"
        "    for letter in b'ab':\n"
        "        backend(path).write(path, bytes([letter]) * 3_000_000)\n"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
        deadline = time.monotonic() + 60
        while not disk.exists(path) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = disk.read(path)
        assert content in (b"a" * 3_000_000, b"b" * 3_000_000)


def test_what_is_appended_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    disk = BACKENDS[""]
    path = tmp_path / "lines"
    end = disk.append(path)
    end.append(b"one\n")
    real = end._file

    class Full:
        """A disk that has room for two bytes more."""

        tell, truncate, close = real.tell, real.truncate, real.close

        def write(self, data):
            return real.write(data[:2])

    monkeypatch.setattr(end, "_file", Full())
    with pytest.raises(OSError, match=r".") as raised:
        end.append(b"two\n")
    assert raised.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"one\n"
    monkeypatch.setattr(end, "_file", real)
    end.append(b"three\n")
    end.close()
    assert path.read_bytes() == b"one\nthree\n"


def test_lines_of_json(tmp_path):
    path = tmp_path / "history.jsonl"
    assert read_lines(path) == []
    for number in range(3):
        append_line(path, {"number": number})
    assert read_lines(path) == [{"number": n} for n in range(3)]
    with path.open("a") as file:
        file.write('{"number": 3')  # cut short by a crash
    assert read_lines(path) == [{"number": n} for n in range(3)]


def test_folders_are_listed_renamed_and_removed(disk, place):
    assert disk.names(place / "none") == []
    disk.make_folder(place / "a" / "b")
    disk.write(place / "a" / "b" / "file", b"12345")
    disk.write(place / "a" / "z", b"")
    assert disk.names(place / "a") == ["b", "z"]
    assert disk.files(place / "a") == [("b/file", 5), ("z", 0)]
    assert (disk.exists(place / "a"), disk.exists(place / "none")) == (True, False)
    disk.rename(place / "a", place / "c")
    assert disk.names(place) == ["c"]
    assert disk.exists(place / "c")
    assert disk.is_folder(place / "c")
    assert not disk.is_folder(place / "c" / "z")
    disk.remove(place / "c" / "z")
    disk.remove(place / "c")
    disk.remove(place / "c")  # which is gone
    assert disk.names(place) == []
    for name in ("7", "12", "12.tmp", "damaged-3"):
        disk.make_folder(place / name)
        disk.write(place / name / "commit_success.txt", b"")  # as Orbax writes in a bucket
    assert storage.steps_in(place) == [7, 12]
    assert storage.steps_in(place / "none") == []


def test_a_checkpoint_that_was_begun_in_a_bucket_is_none(gcs_server):
    place, disk = to_path("gs://bucket/begun"), BACKENDS["gs"]
    disk.write(place / "5" / "default" / "d", b"")
    disk.write(place / "3" / "default" / "d", b"")
    disk.write(place / "3" / "commit_success.txt", b"")
    assert storage.steps_in(place) == [3]


def _hold(text, held, free):
    path = to_path(text)
    with backend(path).lock(path, "the other one"):
        held.set()
        free.wait(60)
        os._exit(9)  # without a word: the lock ends with the process


def test_a_lock_is_held_by_one_process_and_ends_with_it(disk, place, monkeypatch):
    disk.make_folder(place)
    path = place / "lock"
    if disk.why_no_runs:  # which nobody locks
        with pytest.raises(OSError, match="Orbax has no driver"), disk.lock(path, ""):
            raise AssertionError
        return
    context = multiprocessing.get_context("spawn")
    held, free = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(path), held, free))
    other.start()
    assert held.wait(60)
    with pytest.raises(LockedError, match="the other one"), disk.lock(path, "this one"):
        raise AssertionError
    free.set()
    other.join(60)
    with disk.lock(path, "this one"):
        assert b"this one" in disk.read(path)
    assert disk.read(path) == (b"" if disk is BACKENDS[""] else b"{}")


@pytest.mark.parametrize(("text", "part"), [("{", "not valid JSON"), ("[]", "holds no dict")])
def test_damaged_json_is_one_line_with_the_remedy(tmp_path, text, part):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=part) as raised:
        storage.read_json(path)
    assert str(path) in str(raised.value)
    assert "restore it from a copy" in str(raised.value)


def test_text_that_utf8_cannot_hold_is_written_all_the_same(tmp_path):
    storage.write_text(tmp_path / "x", "a\udcffb")
    assert storage.read_text(tmp_path / "x") == "a?b"
    storage.write_json(tmp_path / "y", {"a": 1})
    assert json.loads((tmp_path / "y").read_text()) == {"a": 1}

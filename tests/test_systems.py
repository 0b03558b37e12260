"""What only some systems have is imported where it is used, and done without elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deit_jax.data.prepare.build import prepare
from deit_jax.data.sources import tfds
from deit_jax.errors import UserError
from deit_jax.workdir import records

ROOT = Path(__file__).parent.parent
UNIX_ONLY = ("fcntl", "grp", "pwd", "resource", "termios")
# The loader says that a module is not there, as it does on Windows; the libraries that we use
# have code of their own for that and are loaded before.
HIDDEN = f"""
import sys
import portalocker, tqdm.contrib.logging, tensorflow_datasets, jax, orbax.checkpoint, grain
import multiprocessing.util, concurrent.futures.process, tensorboardX.event_file_writer
import matplotlib.pyplot, sklearn.datasets, cv2

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in {UNIX_ONLY}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

for name in {UNIX_ONLY}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hidden())
import os, signal
for module, name in ((os, "sched_getaffinity"), (signal, "pthread_sigmask")):
    if hasattr(module, name):
        delattr(module, name)
"""


def run(code: str, *words: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run(
        [sys.executable, "-c", HIDDEN + code, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def test_every_module_is_imported_without_what_only_unix_has():
    code = (
        "import importlib, pkgutil, deit_jax\n"
        "for found in pkgutil.walk_packages(deit_jax.__path__, 'deit_jax.'):\n"
        "    if not found.name.endswith('__main__') and 'torch_' not in found.name:\n"
        "        importlib.import_module(found.name)\n"
        "        print(found.name)\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert {"deit_jax.storage", "deit_jax.parallel.signals"} < set(done.stdout.split())


@pytest.mark.slow
def test_the_quickstart_begins_without_them(tmp_path):
    """Teacher, student, checkpoints, evaluation and the picture; then the run is read back."""
    words = ["train", "--config=configs/quickstart.py", f"--workdir={tmp_path}/run"]
    words += ["--config.epochs=0.2", "--config.teacher.epochs=0.2"]
    code = "from deit_jax.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = run(code, *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "results.json").exists()
    assert (tmp_path / "run" / "lock").read_text() == ""
    done = run(code, "eval", f"--workdir={tmp_path}/run", "--json")
    assert done.returncode == 0, done.stderr


def test_who_trains_is_asked_on_windows_without_a_signal(tmp_path, monkeypatch):
    """There `os.kill(pid, 0)` would end the process, and a lock that is held cannot be read."""
    monkeypatch.setattr(records, "WINDOWS", True)
    monkeypatch.setattr(records.os, "kill", lambda *_: pytest.fail("the process was ended"))
    (tmp_path / "lock").write_text(f"process 1 on {records.socket.gethostname()} since\n")
    assert not records.under_way(tmp_path)  # read, so nobody holds it

    def locked(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(records, "read_text", locked)
    assert records.under_way(tmp_path)


def test_what_has_no_wheels_for_windows_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^deit prepare: needs `pip install array_record`; .*WSL2"):
        prepare(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()

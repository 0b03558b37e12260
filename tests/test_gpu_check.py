"""benchmarks/gpu_check.sh at toy size on a CPU: every stage, its verdicts, and going on."""

import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from benchmarks import gpu_check, gpu_machine, gpu_micro, gpu_smoke

ROOT = Path(__file__).parent.parent


def start(out: Path, *words, **variables):
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # one device
    own = {"OUT": str(out), "PYTHON": sys.executable}
    environment = {**os.environ, **flags, **own, **variables}
    command = ["bash", "benchmarks/gpu_check.sh", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return the folder of a toy run of every stage, and what it printed."""
    out, state = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("state")
    run = start(out, "--toy", STATE=str(state), T="3000")
    assert run.returncode == 0, run.stdout + run.stderr
    return out, state, run.stdout


@pytest.mark.slow
def test_every_stage_tells_what_it_found(done):
    out, state, text = done
    saved = json.loads((out / "gpu_check.json").read_text())
    assert {n: saved[n]["exit"] for n in (*gpu_check.TOGETHER, *gpu_check.ALONE)} == dict.fromkeys(
        (*gpu_check.TOGETHER, *gpu_check.ALONE), 0
    )
    assert saved["environment"]["backend"] == "cpu"
    assert saved["tests"]["count"]["PASSED"] > 10
    assert saved["quickstart"]["result"]["examples"] == 359
    assert saved["attention"]["result"]["attention_ms"]["xla"] > 0
    smoke = json.loads((out / "smoke.json").read_text())
    assert len(smoke) >= 13
    assert all(found["ok"] for found in smoke.values())
    assert json.loads((out / "micro.json").read_text())["teacher alone"]["ms"] > 0
    assert "plain/tiny/32/8/flax/1" in json.loads((out / "gpu.json").read_text())["rows"]
    assert "nothing is wrong" in text
    assert (out / "log.txt").read_text() == text
    # Few files, as some machines hand no more than a few back; logs stay where the state is.
    assert sorted(p.suffix for p in out.iterdir()) == [".json"] * 4 + [".txt"]
    assert {p.name for p in out.glob("*.json")} <= {p.name for p in state.iterdir()}


@pytest.mark.slow
def test_what_is_done_is_not_done_again(done, tmp_path):
    _, state, _ = done
    before = json.loads((state / "gpu_check.json").read_text())
    run = start(tmp_path / "again", "--toy", "--only=smoke,micro", STATE=str(state), T="600")
    assert run.returncode == 0, run.stderr
    assert "smoke: exit" not in run.stdout
    after = json.loads((tmp_path / "again/gpu_check.json").read_text())
    assert {k: v for k, v in after.items() if k in gpu_check.TOGETHER} == {
        k: v for k, v in before.items() if k in gpu_check.TOGETHER
    }


def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path):
    run = start(tmp_path)
    assert run.returncode == 1
    assert "sees no GPU" in run.stdout.splitlines()[-1]
    assert not (tmp_path / "gpu_check.json").exists()


def test_a_stage_has_its_limit_and_a_later_call_the_rest(tmp_path, monkeypatch):
    sleep = {n: [sys.executable, "-c", "import time; time.sleep(60)"] for n in gpu_check.TOGETHER}
    monkeypatch.setattr(gpu_check, "commands", lambda *_: sleep)
    monkeypatch.setattr(gpu_check, "LIMITS", {"smoke": 0.3, "bench": 0.3})
    monkeypatch.setattr(gpu_check, "SHORTEST", 0.1)
    check = gpu_check.Check(tmp_path, None, 60)
    check.run(["smoke"], {})
    assert check.saved["smoke"]["exit"] == "stopped after 0 s"
    assert gpu_check.Check(tmp_path, None, 60, toy=True).limits["smoke"] == 1.5  # a CPU's
    monkeypatch.setattr(gpu_check, "LIMITS", {"quickstart": 0.4})
    short = gpu_check.Check(tmp_path, None, 5.2)
    short.run(["quickstart"], {})  # stopped earlier than by its limit: not its fault
    assert "quickstart" not in short.saved
    assert gpu_check.wrong(check) == ["smoke: exit stopped after 0 s: "]
    again = gpu_check.Check(tmp_path, None, 5)
    assert again.missing(gpu_check.TOGETHER) == ["tests", "quickstart", "bench"]
    assert "smoke" in gpu_check.Check(tmp_path, None, 5, retry=True).missing(gpu_check.TOGETHER)
    again.run(["bench"], {})  # for which no time is left
    assert "bench" not in again.saved


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_it_leaves_no_process_behind(tmp_path, how):
    """Each stage and each row has a session of its own: a dead parent would leave them the GPU."""
    # Quick to compile for: a row that has a handler of SIGTERM hears of it only after compiling,
    # and both who wait for it, the stage and the one above, wait as long before they use force.
    flags = "--xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "STATE": ""}
    words = ["benchmarks.gpu_check", "--toy", "--only=rows", f"--out={tmp_path}"]
    run = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, env=environment)
    try:
        # The process of a row is the third of them, after the stage that starts it.
        while len(children := descendants(run.pid)) < 2 or not any("--row" in c for c in children):
            assert run.poll() is None
            time.sleep(0.1)
        run.send_signal(how)
        assert run.wait(30) != 0
        assert not [command for command, pid in children.items() if is_alive(pid)]
    finally:
        run.kill()


def is_alive(pid):
    """Return whether a process runs: an orphan that has ended is one until init asks for it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def descendants(pid):
    """Return the processes below one, by their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                command = (path.parent / "cmdline").read_text().replace("\0", " ")
                found |= {command: int(path.parent.name), **descendants(int(path.parent.name))}
    return found


LOG = """
[gw0] [ 50%] PASSED tests/test_losses.py::test_a
[gw1] [ 99%] FAILED tests/test_vit.py::test_b
tests/test_vit.py::test_c[a b] PASSED                                   [100%]
FAILED tests/test_vit.py::test_b - AssertionError: 1 == 2
"""


def test_what_is_wrong_is_said_stage_by_stage(tmp_path):
    check = gpu_check.Check(tmp_path, None, 60)
    lines = LOG.strip().splitlines()
    found = gpu_check.told("tests", lines)
    assert found["count"] == {"PASSED": 2, "FAILED": 1, "ERROR": 0, "SKIPPED": 0}
    check.keep("tests", {"exit": 1, "seconds": 1.0, **found, "tail": lines})
    result = {"fused": {"top1": 11.1}}
    check.keep("quickstart", {"exit": 0, "seconds": 1.0, "result": result, "tail": []})
    check.keep("bench", {"exit": -6, "seconds": 1.0, "tail": ["Fatal: no ptxas"]})
    (tmp_path / "smoke.json").write_text(json.dumps({"bits": {"ok": False, "same_bits": False}}))
    rows = {"train/small/224/256/ours/1": {"error": "out of memory"}}
    (tmp_path / "gpu.json").write_text(json.dumps({"rows": rows}))
    assert gpu_check.wrong(check) == [
        "bench: exit -6: Fatal: no ptxas",
        "quickstart: 11.1 % of the digits, not 95.0 % (docs/results.md)",
        "FAILED tests/test_vit.py::test_b - AssertionError: 1 == 2",
        "smoke, bits: {'ok': False, 'same_bits': False}",
        "rows, train/small/224/256/ours/1: out of memory",
    ]


def test_a_check_that_raises_is_one_that_failed(tmp_path):
    checks = gpu_smoke.Checks(tmp_path / "smoke.json")

    def raises():
        raise RuntimeError("no kernel\nadvice")

    checks.run("first", raises)
    checks.run("second", lambda: {"ok": True})
    saved = json.loads((tmp_path / "smoke.json").read_text())
    assert saved["first"]["error"] == "RuntimeError: no kernel"
    assert saved["first"]["at"].startswith("test_gpu_check.py:")
    assert [found["ok"] for found in saved.values()] == [False, True]


def test_a_wrong_kernel_fails_its_check(monkeypatch):
    assert gpu_smoke.attention_like_float32s((2, 9, 2, 8), "xla")["ok"]
    from deit_jax.models import attention

    right = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *x, choice: 1.05 * right(*x, choice))
    assert not gpu_smoke.attention_like_float32s((2, 9, 2, 8), "xla")["ok"]


def test_only_a_deterministic_program_needs_the_same_bits():
    numbers = iter(range(8))
    assert gpu_smoke._same_bits(lambda: next(numbers), needed=False) == {
        "ok": True,
        "same_bits": False,
    }
    assert not gpu_smoke._same_bits(lambda: next(numbers), needed=True)["ok"]


def test_an_odd_number_of_tokens_is_padded_for_cudnn(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as jaxs

    monkeypatch.setattr(jaxs, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(jaxs, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(jaxs, "is_cuda_compute_capability_equal", lambda capability: False)
    x = jax.ShapeDtypeStruct((4, 197, 3, 64), "bfloat16")
    function = functools.partial(gpu_smoke.pulled, gpu_micro.padded)
    traced = jax.jit(function).trace(x, x, x, x)
    assert [y.shape for y in jax.tree.leaves(traced.out_info)] == [x.shape] * 4
    assert "fmhaSoftmaxBackward" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_triton_lends_its_libdevice_where_cuda_brings_none(tmp_path, monkeypatch):
    theirs = tmp_path / "site/triton/backends/nvidia"
    for name in ("lib/libdevice.10.bc", "bin/ptxas"):
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).write_text(name)
    (tmp_path / "site/triton/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(gpu_machine.shutil, "which", lambda _: None)
    monkeypatch.setattr(gpu_machine, "TOOLKIT", tmp_path / "none")
    root = gpu_machine.cuda_root(tmp_path / "cuda")
    assert root == str(tmp_path / "cuda")
    assert (tmp_path / "cuda/nvvm/libdevice/libdevice.10.bc").exists()
    assert (tmp_path / "cuda/bin/ptxas").exists()
    for name in (gpu_machine.LIBDEVICE, "bin/ptxas"):
        path = tmp_path / "site/nvidia/cu13" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    importlib.invalidate_caches()  # a folder `nvidia` of PyTorch's may be known by now
    assert gpu_machine.cuda_root(tmp_path / "other") == ""

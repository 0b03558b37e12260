"""What `deit doctor` says of machines that lack something, and that it says so of this one."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from deit_jax.cli import platforms
from deit_jax.doctor import devices, images, machine, network, software
from deit_jax.doctor.findings import NOTE, OK, WRONG
from tests.test_cli import deit

ROOT = Path(__file__).parent.parent


def one(found, topic):
    (finding,) = (finding for finding in found if finding.topic == topic)
    return finding


def test_this_machine_is_fit_and_the_output_is_for_a_bug_report(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = deit(capsys, "doctor", f"--workdir={tmp_path / 'runs'}")
    assert (code, err) == (0, "")
    for package in ("jax", "jaxlib", "flax", "orbax-checkpoint"):
        assert f"{package} {metadata.version(package)}" in out
    topics = [line.split(": ")[0].split()[1] for line in out.splitlines() if line[:2] != "  "]
    assert topics[:4] == ["python", "packages", "jax", "extras"]
    assert f"of {os.cpu_count()} usable" in out
    assert "JAX computes on 8 x cpu" in out
    assert os.listdir() == []  # nothing is left, not even the workdir
    code, out, _ = deit(capsys, "doctor", "--json", f"--workdir={tmp_path}")
    said = json.loads(out)
    assert (code, said["ok"]) == (0, True)
    assert all(f["state"] == OK or f["remedy"] for f in said["findings"])
    rate = one([SimpleNamespace(**f) for f in said["findings"]], "decoder").facts
    assert rate["images_per_second_core"] > 1


def test_a_training_that_would_fail_is_exit_code_1(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = deit(capsys, "doctor", f"--workdir={tmp_path / 'file' / 'run'}")
    assert code == 1
    assert "WRONG workdir: " in out
    assert "      -> name another --workdir, or make it writable" in out
    assert err == "deit doctor: a training would fail here: see workdir above"


def test_a_platform_that_is_not_there(tmp_path):
    """In a process of its own, as JAX starts its platforms once."""
    done = subprocess.run(
        [sys.executable, "-m", "deit_jax", "doctor", f"--workdir={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout
    assert "WRONG devices: JAX has none: " in done.stdout
    assert "-> unset JAX_PLATFORMS, or install what it names" in done.stdout
    assert "Traceback" not in done.stderr
    words = ["train", f"--config={ROOT}/configs/quickstart.py", f"--workdir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-m", "deit_jax", *words],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "JAX_PLATFORMS=cuda: `deit doctor` says what is here" in done.stderr


GPU = {"nvidia": ["/dev/nvidia0"]}


@pytest.mark.parametrize(
    ("missed", "files", "environment", "text", "remedy"),
    [
        (
            "there is an NVIDIA GPU, but JAX has no CUDA plugin: pip install x",
            GPU,
            {},
            "no CUDA plugin",
            "pip install x",
        ),
        ("", {"nvidia": ["/dev/nvidia0"]}, {"CUDA_VISIBLE_DEVICES": ""}, "hides it", "unset CUDA_"),
        (
            "",
            {"nvidia": ["/dev/nvidia0"]},
            {"JAX_PLATFORMS": "tpu"},
            "leaves it out",
            "unset JAX_P",
        ),
        ("", {"nvidia": ["/dev/nvidia0"]}, {}, "did not start it", "nvidia-smi"),
        ("", {"tpu": ["/dev/vfio/0"]}, {}, "there is a TPU (/dev/vfio/0)", "deit_jax[tpu]"),
    ],
)
def test_devices_that_are_there_and_not_used(monkeypatch, missed, files, environment, text, remedy):
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    finding = one(devices.look(missed, files), "unseen")
    assert finding.state == NOTE
    assert text in finding.text
    assert remedy in finding.remedy


def _never(*_):
    raise RuntimeError("jaxlib version 1 is newer than jax\nmore")


def test_what_cannot_be_loaded_is_a_finding(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "look", _never)
    monkeypatch.setattr(images, "look", _never)
    code, out, err = deit(capsys, "doctor", f"--workdir={tmp_path}")
    assert (code, err.count("\n")) == (1, 0)
    assert "WRONG devices: cannot be looked at: jaxlib version 1 is newer than jax" in out
    assert "workdir: " in out


def test_without_hidden_devices_nothing_is_said_of_them():
    found = devices.look("", {"nvidia": [], "tpu": []})
    assert {finding.topic for finding in found} == {"devices", "computing"}
    assert all(finding.state == OK for finding in found)


def test_a_device_that_computes_wrongly_is_told(monkeypatch):
    import jax

    monkeypatch.setattr(jax, "jit", lambda program: lambda *arguments: 3.0)
    assert devices._computes().state == WRONG
    monkeypatch.setattr(jax, "jit", lambda program: _failing)
    assert "a small program fails: out of memory" in devices._computes().text


def _failing(*_):
    raise RuntimeError("out of memory\nand more")


@pytest.fixture
def packages(monkeypatch):
    """Return a function that lets other versions, or none, be installed."""
    real = metadata.version

    def change(**others):
        def version(name):
            found = others.get(name.replace("-", "_").lower(), 0)
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found or real(name)

        monkeypatch.setattr(software.metadata, "version", version)

    return change


def test_packages_that_are_missing_or_too_old(packages):
    assert software._packages().state == OK
    packages(optax=None, flax="0.5.0")
    finding = software._packages()
    assert finding.state == WRONG
    assert "(here none)" in finding.text
    assert "(here 0.5.0)" in finding.text
    assert finding.remedy.startswith("pip install ")
    assert '"optax>=' in finding.remedy
    assert '"jax' not in finding.remedy


def test_jax_and_its_halves_of_two_versions(packages):
    assert software._jax_and_jaxlib().state == OK
    packages(jax_cuda13_plugin="0.8.1")
    finding = software._jax_and_jaxlib()
    assert (finding.state, "jax-cuda13-plugin 0.8.1" in finding.text) == (WRONG, True)


def test_extras_are_what_is_installed(packages):
    packages(matplotlib=None, jax_cuda13_plugin=None)
    facts = software._extras().facts
    assert {"viz", "cuda"} <= set(facts["missing"])
    assert "fast" in facts["installed"]
    wanted = {name for name, _ in software.requirements("deit_jax", "cuda")}
    assert "jax-cuda13-plugin" in {name.replace("_", "-") for name in wanted}


FILES = {
    "/sys/fs/cgroup/cpu.max": "50000 100000",
    "/proc/meminfo": "MemTotal:  8000000 kB\nMemFree: 1 kB\nMemAvailable: 6000000 kB\n",
    "/sys/fs/cgroup/memory.max": "3000000000",
    "/sys/fs/cgroup/memory.current": "1000000000",
    "/sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
    "/proc/self/mounts": "x / ext4 rw 0 0\nh:/e /home nfs4 rw 0 0\n"
    "b /home/me/b fuse.gcsfuse rw 0 0\n",
}


def test_limits_of_containers_and_kernels(monkeypatch):
    monkeypatch.setattr(machine, "_read", lambda path: FILES.get(path, ""))
    assert machine._quota() == 0.5
    assert "0.5 at a time" in machine._cores().text
    assert machine.memory() == {"total": 8.192e9, "available": 2e9, "limit": 3e9}
    assert machine._memory().state == NOTE
    if sys.platform == "linux":
        assert "madvise | sudo tee" in machine._large_pages().remedy
    kinds = {p: machine.file_system(Path(p)) for p in ("/x", "/home/you", "/home/me/b/runs")}
    assert kinds == {"/x": "ext4", "/home/you": "nfs4", "/home/me/b/runs": "fuse.gcsfuse"}


def test_a_workdir_on_a_network_or_a_full_disk_is_noted(tmp_path, monkeypatch):
    assert machine.workdir(str(tmp_path / "a" / "b")).state in (OK, NOTE)
    monkeypatch.setattr(machine, "file_system", lambda path: "nfs4")
    monkeypatch.setattr(machine, "FREE_GB", 0.0)
    finding = machine.workdir(str(tmp_path))
    assert (finding.state, "no two machines" in finding.remedy) == (NOTE, True)
    monkeypatch.setattr(machine, "FREE_GB", 1e9)
    assert "make room" in machine.workdir(str(tmp_path)).remedy


def test_the_compile_cache_is_counted(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "program").write_bytes(bytes(1000))
    assert machine._compile_cache(str(tmp_path)).facts["bytes"] == 1000
    assert machine._compile_cache(None).state == NOTE
    assert "gs://b/c" in machine._compile_cache("gs://b/c").text
    assert machine._compile_cache(str(tmp_path / "none")).facts["files"] == 0


def test_the_network_is_asked_only_if_told_to(capsys, tmp_path, monkeypatch):
    asked = []

    def answer(address, timeout):
        asked.append(address[0])
        raise OSError("no route to host")

    monkeypatch.setattr(network.socket, "create_connection", answer)
    deit(capsys, "doctor", f"--workdir={tmp_path}")
    assert asked == []
    code, out, _ = deit(capsys, "doctor", f"--workdir={tmp_path}", "--online")
    assert code == 0  # a training needs neither
    assert asked == ["huggingface.co", "pypi.org"]
    assert "note  Hugging Face hub: huggingface.co does not answer (no route to host)" in out


def test_a_bucket_is_written_to_or_told_of(capsys, gcs_server, monkeypatch):
    monkeypatch.setattr(network, "PLACES", ())
    code, out, _ = deit(capsys, "doctor", "--workdir=gs://bucket/runs")
    assert (code, "not asked; --online does" in out) == (0, True)
    code, out, _ = deit(capsys, "doctor", "--workdir=gs://bucket/runs", "--online")
    assert (code, "ok    workdir: gs://bucket/runs: a bucket that can be written" in out) == (
        0,
        True,
    )
    code, out, _ = deit(capsys, "doctor", "--workdir=gs://no-such-one/runs", "--online")
    assert code == 1
    assert "there is no bucket gs://no-such-one" in out


def test_without_the_fast_decoder_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(images, "available", lambda: ["pillow", "portable"])
    (finding,) = images.look(seconds=0.05)
    assert "deit_jax[fast]" in finding.remedy


def test_a_missed_gpu_is_told_by_platforms(monkeypatch):
    monkeypatch.setattr(platforms, "_nvidia", lambda: True)
    monkeypatch.setattr(platforms, "_installed", lambda name: False)
    monkeypatch.setattr(platforms, "_any", lambda patterns: patterns is platforms.NVIDIA)
    finding = one(devices.look(platforms.missed_gpu(), {}), "unseen")
    assert finding.remedy.startswith('pip install "jax[cuda1')


def test_the_issue_template_asks_for_it():
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text()
    assert "deit doctor" in text

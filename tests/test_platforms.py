"""What JAX is told to use before it is loaded, on machines of every kind."""

import subprocess
import sys

import pytest

from deit_jax.cli import platforms


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that makes this machine one with such packages, devices and variables."""

    def make(installed=(), devices=(), driver=None, **environment):
        for name in list(platforms.os.environ):
            if name.startswith(("TPU_", "JAX_PLATFORMS")):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(platforms, "_installed", lambda name: name in installed)
        for name in devices:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        for kind in ("TPUS", "NVIDIA"):
            patterns = tuple(f"{tmp_path}{p}" for p in getattr(platforms, kind))
            monkeypatch.setattr(platforms, kind, patterns)
        monkeypatch.setattr(platforms, "DRIVER", tmp_path / "version")
        if driver:
            (tmp_path / "version").write_text(
                f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Tue Feb 11\n"
            )
        missed = platforms.choose()
        return platforms.os.environ.get("JAX_PLATFORMS"), missed

    return make


GPU, TPU = "dev/nvidia0", "dev/accel0"
CUDA, LIBTPU = "jax_cuda13_plugin", "libtpu"


@pytest.mark.parametrize(
    ("installed", "devices", "environment", "chosen"),
    [
        ((), (), {}, None),
        ((LIBTPU,), (), {}, "cpu"),
        ((LIBTPU,), (TPU,), {}, None),
        ((LIBTPU,), ("dev/vfio/0",), {}, None),
        ((LIBTPU,), (), {"TPU_WORKER_ID": "0"}, None),  # a pod of GKE
        ((LIBTPU,), (), {"TPU_SKIP_MDS_QUERY": "1"}, "cpu"),
        ((LIBTPU,), (), {"JAX_PLATFORMS": "tpu"}, "tpu"),
        ((LIBTPU, CUDA), (GPU,), {}, "cuda,cpu"),
        ((LIBTPU, CUDA), (), {}, "cpu"),
        ((LIBTPU, "jax_rocm60_plugin"), (), {}, None),
        ((CUDA,), (GPU,), {}, None),
    ],
)
def test_libtpu_is_left_alone_without_a_tpu(machine, installed, devices, environment, chosen):
    assert machine(installed, devices, **environment) == (chosen, "")


@pytest.mark.parametrize(
    ("driver", "extra"), [("580.65.06", "cuda13"), ("570.124.06", "cuda12"), (None, "cuda13")]
)
def test_a_gpu_that_jax_would_miss_is_told_of_with_the_remedy(machine, driver, extra):
    chosen, missed = machine((LIBTPU,), (GPU,), driver)
    assert chosen == "cpu"
    assert missed.endswith(f'pip install "jax[{extra}]"')
    assert "\n" not in missed


@pytest.mark.parametrize("installed", [(CUDA,), ("jax_cuda12_plugin",), ("jax_rocm60_plugin",)])
def test_a_gpu_with_a_plugin_is_not_missed(machine, installed):
    assert machine(installed, (GPU,))[1] == ""


@pytest.mark.parametrize("value", ["", "-1"])
def test_a_gpu_that_is_hidden_from_the_process_is_none(machine, value):
    assert machine((CUDA, LIBTPU), (GPU,), CUDA_VISIBLE_DEVICES=value) == ("cpu", "")
    assert machine((LIBTPU,), (GPU,), CUDA_VISIBLE_DEVICES=value) == ("cpu", "")


def test_who_chose_the_cpu_misses_no_gpu(machine):
    assert machine((), (GPU,), JAX_PLATFORMS="cpu") == ("cpu", "")


def test_the_warning_is_one_line_before_a_command_that_computes(monkeypatch, capsys):
    from deit_jax import __main__ as program

    monkeypatch.setattr(platforms, "choose", lambda: "there is a GPU: pip install it")
    monkeypatch.setattr(program.huge_pages, "restart", lambda: None)
    for command, lines in (("eval", 1), ("predict", 0)):
        monkeypatch.setattr(sys, "argv", ["deit", command])
        assert program.main() == 2  # for want of flags
        err = capsys.readouterr().err
        assert err.count("pip install it\n") == lines, err


@pytest.mark.slow
def test_no_command_shows_what_libtpu_has_to_say(tmp_path):
    pytest.importorskip("libtpu")
    environment = {k: v for k, v in platforms.os.environ.items() if not k.startswith("JAX_")}
    words = ["bench", "--config=configs/quickstart.py", "--config.distill.kind=none"]
    words += ["--config.model.depth=1", "--seconds=0.1", f"--profile={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "deit_jax", *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step: ")
    assert done.stderr == ""

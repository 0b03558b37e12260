"""benchmarks/gpu.py at toy size: every row runs, none twice, and its table adds up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import gpu, gpu_jax
from deit_jax.data.sources.registry import open_dataset
from deit_jax.train.loop import Trainer

ROOT = Path(__file__).parent.parent
ROWS = gpu.rows(list(gpu.PEERS), [], turns=1, toy=True)


@pytest.mark.slow
@pytest.mark.parametrize("key", ROWS)
def test_every_row_is_measured(request, key):
    if ROWS[key]["peer"] not in gpu.JAXS:
        request.getfixturevalue("timm")
    found = gpu.measure(ROWS[key], seconds=0.0)
    assert len(found["windows_ms"]) == gpu.WINDOWS
    assert min(found["windows_ms"]) > 0
    middle = sorted(found["windows_ms"])[gpu.WINDOWS // 2]
    assert found["images_per_second"] == pytest.approx(8e3 / middle)
    assert found["versions"]
    if key.startswith(("train/tiny/32/8/ours", "train/tiny/32/8/replay", "plain/tiny/32/8/ours")):
        assert found["attention"] == "xla"
        assert found["expected_bytes"] > 0


@pytest.mark.parametrize(("peer", "who"), [("ours", "JAX"), ("eager", "this PyTorch")])
def test_no_row_is_measured_on_a_cpu_in_a_gpus_stead(request, monkeypatch, peer, who):
    """As with a PyTorch without CUDA beside a JAX that has it."""
    if peer == "eager":
        request.getfixturevalue("timm")
        from benchmarks import gpu_torch

        monkeypatch.setattr(gpu_torch, "DEVICE", "cpu")
    row = gpu.rows(["train"], [], turns=1, toy=False)[f"train/tiny/224/256/{peer}/1"]
    assert "sees no GPU" in gpu.measured_or_why_not(row, 0.0)["error"]
    assert who in gpu.measured_or_why_not(row, 0.0)["error"]


def test_pytorchs_teacher_says_the_same_with_its_batch_norm_folded(timm, torch):
    from benchmarks import gpu_torch

    model = timm.create_model("regnety_002", num_classes=7).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        after = gpu_torch.folded(model)(images)
    assert not [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert before.std() > 1e-3


def test_the_step_that_is_measured_is_the_one_that_a_run_compiles(tmp_path):
    config = gpu_jax.config_of(ROWS["train/tiny/32/8/ours/1"])
    config.data.source = "digits"
    step, state, teacher_params = gpu_jax.jit_step(config, 10)
    dataset = open_dataset(config.data)
    experiment = gpu_jax.resolved(config, 10)
    run = Trainer(experiment, tmp_path, dataset, experiment.random_teacher())
    run.checkpointer.close()
    batch = gpu_jax.random_batch(config, 10)
    texts = [f.lower(state, teacher_params, batch).as_text() for f in (step, run.step)]
    assert texts[0] == texts[1]


def test_it_needs_no_library_of_the_input_pipeline():
    code = "import sys, benchmarks.gpu_jax, deit_jax.perf.step_time; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    loaded = done.stdout.split()
    assert "benchmarks.gpu_jax" in loaded, done.stderr
    unwanted = {"grain", "tensorflow_datasets", "simplejpeg", "kornia_rs", "tensorboardX", "torch"}
    assert not unwanted & set(loaded)


def test_the_package_is_imported_without_what_only_commands_need():
    code = (
        "import sys, deit_jax; deit_jax.create_model('deit_tiny_patch16_224'); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "deit_jax.models.vit" in loaded, done.stderr
    assert not {"ml_collections", "cv2", "grain", "simplejpeg", "tensorboardX"} & loaded


def start(out: Path, *words) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", f"--out={out}", "--seconds=0"]
    command += ["--part=plain", "--peers=flax", *words]
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # one device
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_goes_on_where_it_ended(tmp_path):
    out, key = tmp_path / "gpu.json", "plain/tiny/32/8/flax/1"
    assert "the time is up" in start(out, "--minutes=0")
    assert not out.exists()
    start(out, "--limit=0.1")
    assert json.loads(out.read_text())["rows"][key]["error"] == "took longer than 0 s"
    assert "took longer" in start(out)  # in the table: a failed row stays
    assert f"{key}: " in start(out, "--retry")
    saved = json.loads(out.read_text())
    assert saved["device"] == "cpu"
    assert saved["versions"]["jax"] == jax.__version__
    rate = saved["rows"][key]["images_per_second"]
    text = start(out)
    assert f"{key}: " not in text
    assert f"| {rate:.0f} |" in text


def row(peer, turn, rate, **more):
    facts = {"part": "train", "model": "small", "image_size": 224, "batch": 256}
    return {**facts, "peer": peer, "turn": turn, "images_per_second": rate, **more}


def test_ratios_are_within_a_turn_and_of_those_the_median():
    rates = {"ours": (100, 300, 50), "eager": (50, 100, 100), "replay": (200, 300, 200)}
    rows = {f"{p}{t}": row(p, t, r) for p, each in rates.items() for t, r in enumerate(each)}
    rows["ours1"] |= {"mfu": 0.25, "peak_bytes": 2e9}
    rows["compile0"] = row("compile", 0, 0) | {"error": "out of memory"}
    del rows["compile0"]["images_per_second"]
    *_, ours, replay, compiled, eager, empty = gpu.table(rows).split("\n")

    def cells(line):
        return line.strip("| ").split(" | ")

    case = ["small", "224", "256"]
    assert cells(ours) == [*case, "ours", "100", "-", "25.0 %", "2.0"]
    assert cells(replay) == [*case, "replay", "200", "0.50", "-", "-"]
    assert cells(compiled) == [*case, "compile", "out of memory", "-", "-", "-"]
    assert cells(eager) == [*case, "eager", "100", "2.00", "-", "-"]
    assert empty == ""


def test_every_peers_share_of_the_peak_is_by_the_same_operations():
    planned = gpu.rows(["train", "plain"], [], turns=1, toy=True)
    flops = gpu.flops_of(planned)
    train = {k: v for k, v in flops.items() if k.startswith("train")}
    replay = train.pop("train/tiny/32/8/replay/1")
    assert len(set(train.values())) == 1
    assert 0 < replay < train["train/tiny/32/8/eager/1"]
    assert flops["plain/tiny/32/8/ours/1"] == flops["plain/tiny/32/8/flax/1"]
    # 1000 images a second of 98.9 GFLOP are a tenth of an H100's 989 TFLOP/s.
    found = gpu.with_share(row("eager", 1, 1000.0), 98.9e9, "NVIDIA H100 80GB HBM3")
    assert found["mfu"] == pytest.approx(0.1)
    assert gpu.with_share(row("eager", 1, 1000.0), 98.9e9, "cpu")["mfu"] is None
    assert "mfu" not in gpu.with_share({"error": "out of memory"}, 1.0, "NVIDIA H100 PCIe")


class BackendCompilerFailed(Exception):
    """As torch.compile raises it."""

    def __init__(self, inner):
        super().__init__("backend='inductor' raised:\nand 20 lines of advice")
        self.inner_exception = inner


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            jax.errors.JaxRuntimeError(
                "INTERNAL: No valid engine\nFor simplicity, JAX has removed"
            ),
            "JaxRuntimeError: INTERNAL: No valid engine",
        ),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of"), "out of memory"),
        (BackendCompilerFailed(OSError("no ptxas")), "OSError: no ptxas"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError(), "ValueError: "),
    ],
)
def test_a_failed_row_keeps_its_cause_in_one_line(monkeypatch, error, expected):
    def fails(*_):
        raise error

    monkeypatch.setattr(gpu, "measure", fails)
    assert gpu.measured_or_why_not({"peer": "ours"}, 0.0) == {"peer": "ours", "error": expected}


@pytest.mark.parametrize(
    ("code", "err", "expected"),
    [
        (-11, "a\nFatal Python error: Segmentation fault\n  File", "SIGSEGV: Fatal Python error"),
        (1, "Traceback\nImportError: no torch\nFor simplicity, JAX has", "exit 1: ImportError: no"),
        (-9, "", "killed by SIGKILL: it said nothing"),
        (1, "torch.OutOfMemoryError: CUDA", "out of memory"),
    ],
)
def test_a_process_that_dies_leaves_its_last_error(code, err, expected):
    found = gpu.crash(code, err)
    assert expected in found
    assert "\n" not in found


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_who_set_the_share_of_memory_keeps_it_by_either_name(monkeypatch, name):
    """JAX refuses to start with both."""
    for each in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(each, raising=False)
    assert gpu.environment()["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
    monkeypatch.setenv(name, "0.5")
    found = {k: v for k, v in gpu.environment().items() if "MEM_FRACTION" in k}
    assert found == {name: "0.5"}


def test_one_file_is_of_one_device(tmp_path):
    results = gpu.Results(tmp_path / "gpu.json")
    results.add("a", row("ours", 1, 1.0, device="NVIDIA H100"))
    results.add("b", {"error": "out of memory"})  # which does not say where
    results.add("c", row("eager", 1, 1.0, device="NVIDIA H100 80GB HBM3"))  # the same, to PyTorch
    with pytest.raises(SystemExit, match="give another --out"):
        gpu.Results(tmp_path / "gpu.json").add("c", row("ours", 1, 1.0, device="NVIDIA H200"))


def test_a_reader_finds_every_case_of_the_paper_the_important_first():
    planned = list(gpu.rows(["train", "forward", "plain"], [], turns=2, toy=False))
    assert "forward/base/384/256/ours/2" in planned
    assert planned[:3] == [
        f"train/small/224/256/{peer}/1" for peer in ("ours", "compile", "graphs")
    ]
    assert len(planned) == len(set(planned)) == 2 * (3 * 5 + 4 * 4 + 3 * 2)
    assert all("/512/" in key for key in gpu.rows(["train"], [512], 1, False))

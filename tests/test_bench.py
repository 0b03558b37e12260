"""Check `deit bench`: its figures agree with each other and with counts made by hand."""

import gzip
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deit_jax import __main__ as program
from deit_jax.configs import quickstart
from deit_jax.data.order import EpochOrder, example_rng
from deit_jax.data.sources.base import ArraySource, Dataset
from deit_jax.errors import UserError
from deit_jax.perf import chips, input_rate, step_time
from deit_jax.train import experiment
from tests.tiny import measured, resolved


def run(capsys, *words):
    code = program.main(["bench", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip()


def test_what_a_device_needs_is_its_peak_times_the_assumed_share():
    found = input_rate.need(6 * 4.61e9, "v5e-8", 0.0)
    assert found["assumed_mfu"] == 0.3
    assert found["images_per_second"] == pytest.approx(0.3 * 8 * 197e12 / (6 * 4.61e9))
    assert input_rate.need(1e9, "H100x8", 0.5)["images_per_second"] == pytest.approx(
        0.5 * 8 * 989e3
    )
    for text, expected in (
        ("h200", ("h200", 1)),
        ("tpu7x-4", ("tpu7x", 4)),
        ("tpu7x", ("tpu7x", 1)),
        ("h100pciex2", ("h100pcie", 2)),
    ):
        assert input_rate.parse_device(text) == expected
    for text in ("", "v5e-0", "tpu", "h1000x8", "v5e 8"):
        with pytest.raises(UserError, match="as in v5e-8"):
            input_rate.parse_device(text)


class SlowSource(ArraySource):
    """Reading takes ten milliseconds."""

    def __getitem__(self, index):
        time.sleep(0.01)
        return super().__getitem__(index)


def test_stages_count_reading_once_for_all_copies_of_an_image(tiny_config):
    images = np.zeros((20, 32, 32, 3), np.uint8)
    source = SlowSource("slow", images, np.zeros(20, np.int32))
    tiny_config.augment.repeats = 4
    dataset = Dataset(source, source, ["a"])
    times = input_rate.stages(resolved(tiny_config, dataset), dataset, seconds=0.5)
    assert list(times) == list(input_rate.STAGES[:4])
    assert 2500 <= times["read"] < 10_000  # 10 ms, a quarter for each copy
    assert all(value > 0 for value in times.values())


def test_the_views_that_are_timed_are_those_of_the_pipeline(tiny_config):
    """The stages repeat what the pipeline does; its own batch shows whether they still do."""
    from deit_jax.data import decode
    from deit_jax.data.augment import make_augment
    from deit_jax.data.decoders import choose, resize_pillow

    rng = np.random.default_rng(0)
    source = ArraySource("noise", rng.integers(0, 256, (40, 40, 30, 3), np.uint8), np.arange(40))
    dataset = Dataset(source, source, ["a"])
    batch = resolved(tiny_config, dataset).batches(dataset, range(6))(0)
    c = tiny_config.augment
    order = EpochOrder(40, tiny_config.batch_size, c.repeats, tiny_config.seed)
    for row in range(6):
        index = int(order.shuffled()[order.slot(row)])
        rng = example_rng(tiny_config.seed, row)
        pixels = decode.read(source[index]["image"], "x", choose("auto"))
        view = input_rate.crop(pixels, c, tiny_config.model.image_size, rng, resize_pillow)
        view = make_augment(c.auto, c.color_jitter)(view, rng)
        assert np.array_equal(view, batch["image"][row])


def test_input_figures_agree_with_each_other(capsys):
    config = f"--config={quickstart.__file__}"
    code, out, err = run(capsys, config, "--input-only", "--seconds=0.6", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["images_per_second"] > 0
    per_core = result["images_per_second"] / result["cores"]
    assert result["images_per_second_per_core"] == pytest.approx(per_core)
    assert set(result["stages_us"]) == {"read", "decode", "crop", "augment", "wait"}
    assert sum(result["stages_us"].values()) >= 0.99e6 / result["images_per_second_per_core"]
    assert result["need"]["cores"] == pytest.approx(result["need"]["images_per_second"] / per_core)
    report = input_rate.report(result)
    assert "images/s per core" in report
    assert "assumed" in report


def test_the_step_is_timed_on_random_images_without_data_or_teacher(tiny_config):
    tiny_config.data.source = "folder:/nowhere"
    tiny_config.teacher.epochs, tiny_config.model.depth = 0.0, 1
    result = measured(tiny_config)
    assert result["steps"] >= 2
    assert result["images_per_second"] == pytest.approx(32e3 / result["step_ms"])
    assert 0 < result["step_ms_p10"] <= result["step_ms"] <= result["step_ms_p90"]
    assert result["compile_s"] > 0
    assert result["mfu"] is None  # a CPU's peak is not known
    # A CPU does not tell its memory, the compiler does: more than the state, four times 15,000
    # parameters of the student in float32, and less than 100 MB.
    assert 400e3 < result["peak_bytes"] < 100e6
    assert result["peak_bytes_by"] == "compiler"
    assert result["input_wait"] is None
    assert "/nowhere" in result["input_wait_unknown"]
    report = step_time.report(result)
    assert "share of the peak: not known" in report
    assert "waiting for input: not measured, " in report


def test_a_real_run_is_fed_and_traced(tmp_path):
    """In a process of its own: where libtpu was loaded before, tracing can crash (platforms.py)."""
    words = [f"--config={quickstart.__file__}", "--config.model.depth=1", "--config.batch_size=32"]
    words += ["--config.distill.kind=none", "--seconds=0.2", "--json", f"--profile={tmp_path}/new"]
    command = [sys.executable, "-m", "deit_jax", "bench"]
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0 <= result["input_wait"] <= 1
    assert result["input_wait_unknown"] is None
    folder = Path(result["profile"])
    assert folder.is_relative_to(tmp_path / "new")
    assert list(folder.glob("*.xplane.pb"))
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("train") == step_time.PROFILED_STEPS
    report = step_time.report(result)
    assert "https://ui.perfetto.dev" in report
    assert f"xprof {tmp_path}/new" in report


def slow(values, seconds):
    """Return a step that is done when it returns, after so many of these seconds."""
    pauses = itertools.cycle(seconds)

    def step(batch):
        time.sleep(next(pauses))
        return values

    return step


def test_steps_have_a_median_and_a_spread():
    times = step_time.step_times(slow(np.zeros(1), [0.01, 0.01, 0.01, 0.04]), None, 0.8)
    # A machine that has other work takes longer, and no machine less.
    assert 0.009 < np.median(times) < np.percentile(times, 90)
    assert np.percentile(times, 90) > 0.03


class Nothing:
    """Batches that another loader makes."""

    blocks = 1

    def empty(self):
        return {}

    def fill(self, step, block, batch):
        pass

    def work_us(self):
        return 0.0


@pytest.mark.parametrize(("loading", "step", "share"), [(0.24, 0.06, 0.75), (0.015, 0.15, 0.0)])
def test_the_wait_for_input_is_what_loading_takes_longer_than_the_step(
    monkeypatch, tiny_config, loading, step, share
):
    """In a row, loading beside the step: of 240 ms for a batch, 60 pass while the step runs.

    Long enough that other work of the machine hardly counts.
    """

    def batches(batches, start, stop, threads, prefetch):
        ready = time.perf_counter()
        while True:  # loads one batch ahead
            ready = max(ready, time.perf_counter() - loading) + loading
            time.sleep(max(0.0, ready - time.perf_counter()))
            yield {"image": np.zeros((32, 1), np.uint8), "label": np.zeros(32, np.int32)}

    monkeypatch.setattr(experiment, "load", batches)
    made, fed = experiment.resolve(tiny_config, 10, 100), slow(np.zeros(1), [step])
    found, why = step_time.input_wait(made, Nothing(), fed, 1.5)
    assert found == pytest.approx(share, abs=0.15)
    assert why == ""


def test_images_that_cannot_be_loaded_leave_the_wait_unknown(monkeypatch, tiny_config):
    def batches(*_):
        raise UserError("picture.jpg: not an image")
        yield

    monkeypatch.setattr(experiment, "load", batches)
    made = experiment.resolve(tiny_config, 10, 100)
    found = step_time.input_wait(made, Nothing(), None, 0.1)
    assert found == (None, "picture.jpg: not an image")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v4", "v4"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA H100 PCIe", "h100pcie"),
        ("NVIDIA H100 NVL", "h100nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", None),  # not an A10
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("cpu", None),
    ],
)
def test_devices_are_known_by_the_names_that_jax_gives_them(kind, name):
    assert chips.device_of(kind) == name


def test_each_mistake_is_one_line(capsys):
    config = f"--config={quickstart.__file__}"
    for words, code, part in (
        ([], 2, "--config=… is missing"),
        ([config, "--input-only", "--device=abacus"], 1, "--device=abacus"),
        ([config, "--input-only", "--config.data.source=folder:/nowhere"], 1, "no such folder"),
        ([config, "--config.batch_size=100"], 1, "batch_size=100"),
        ([config, "--config.batch_size=-1"], 1, "batch_size"),
        ([config, "--config.batch_size=0", "--input-only"], 1, "batch_size"),
        ([config, "--seconds=-1"], 2, "seconds"),
        ([config, "--profile=/dev/null/x"], 1, "--profile=/dev/null/x: cannot be written"),
        ([config, "--profile=x", "--input-only"], 2, "leave out --input-only"),
    ):
        got, _, err = run(capsys, *words)
        assert got == code, err
        assert part in err
        assert len(err.splitlines()) == 1, err

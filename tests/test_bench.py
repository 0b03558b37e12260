"""Check `deit bench`: its figures agree with each other and with counts made by hand."""

import json
import time

import numpy as np
import pytest

from configs import deit, quickstart
from deit_jax import __main__ as program
from deit_jax import bench, chips
from deit_jax.data import pipeline
from deit_jax.data.sources import ArraySource, Dataset
from deit_jax.errors import UserError


def run(capsys, *words):
    code = program.main(["bench", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip()


@pytest.mark.parametrize(
    ("variant", "gmacs"),
    [("tiny", 1.26), ("small", 4.61), ("base", 17.58)],  # as timm counts them
)
def test_flops_are_six_per_multiply_accumulate(variant, gmacs):
    config = deit.get_config(f"variant={variant}")
    flops = bench.flops_per_image(config, 1000)
    assert flops == pytest.approx(6e9 * gmacs, rel=0.06)


def test_a_teacher_adds_its_forward_pass_only():
    plain = bench.flops_per_image(deit.get_config("variant=tiny,distilled=True,kind=none"), 1000)
    distilled = bench.flops_per_image(deit.get_config("variant=tiny,distilled=True"), 1000)
    assert distilled - plain == pytest.approx(2 * 15.96e9, rel=0.05)  # RegNetY-16GF in timm


def test_what_a_device_needs_is_its_peak_times_the_assumed_share():
    found = bench.need(6 * 4.61e9, "v5e-8", 0.0)
    assert found["assumed_mfu"] == 0.3
    assert found["images_per_second"] == pytest.approx(0.3 * 8 * 197e12 / (6 * 4.61e9))
    assert bench.need(1e9, "H100x8", 0.5)["images_per_second"] == pytest.approx(0.5 * 8 * 989e3)
    assert bench.parse_device("h200") == ("h200", 1)
    for text in ("", "v5e-0", "tpu", "h1000x8", "v5e 8"):
        with pytest.raises(UserError, match="as in v5e-8"):
            bench.parse_device(text)


class SlowSource(ArraySource):
    """Reading takes ten milliseconds."""

    def __getitem__(self, index):
        time.sleep(0.01)
        return super().__getitem__(index)


def test_stages_count_reading_once_for_all_copies_of_an_image(tiny_config):
    images = np.zeros((20, 32, 32, 3), np.uint8)
    source = SlowSource("slow", images, np.zeros(20, np.int32))
    tiny_config.augment.repeats = 4
    times = bench.stages(tiny_config, Dataset(source, source, ["a"]), seconds=0.5)
    assert list(times) == list(bench.STAGES[:4])
    assert 2500 <= times["read"] < 10_000  # 10 ms, a quarter for each copy
    assert all(value > 0 for value in times.values())


def test_the_views_that_are_timed_are_those_of_the_pipeline(tiny_config):
    """The stages repeat what the pipeline does; its own batch shows whether they still do."""
    from deit_jax.data import decode
    from deit_jax.data.augment import make_augment
    from deit_jax.data.resize import choose, resize_pillow
    from deit_jax.inspect_data import train_batches

    rng = np.random.default_rng(0)
    source = ArraySource("noise", rng.integers(0, 256, (40, 40, 30, 3), np.uint8), np.arange(40))
    batch = train_batches(tiny_config, Dataset(source, source, ["a"]), range(6))(0)
    c = tiny_config.augment
    order = pipeline.EpochOrder(40, tiny_config.batch_size, c.repeats, tiny_config.seed)
    for row in range(6):
        index = int(order.shuffled()[order.slot(row)])
        rng = pipeline.example_rng(tiny_config.seed, row)
        pixels = decode.read(source[index]["image"], "x", choose("auto"))
        view = bench.crop(pixels, c, tiny_config.model.image_size, rng, resize_pillow)
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
    report = bench.input_report(result)
    assert "images/s per core" in report
    assert "assumed" in report


def test_the_step_is_timed_on_random_images_without_data_or_teacher(tiny_config):
    tiny_config.data.source = "folder:/nowhere"
    tiny_config.teacher.epochs = 0.0
    result = bench.bench_step(tiny_config, seconds=0.1)
    assert result["steps"] >= 2
    assert result["images_per_second"] == pytest.approx(32e3 / result["step_ms"])
    assert result["compile_s"] > 0
    assert result["mfu"] is None  # a CPU's peak is not known
    assert "share of the peak: not known" in bench.step_report(result)


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
        ([config, "--seconds=-1"], 2, "seconds"),
    ):
        got, _, err = run(capsys, *words)
        assert got == code, err
        assert part in err
        assert len(err.splitlines()) == 1, err

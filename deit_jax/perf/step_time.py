"""Speed of the training step on the devices at hand, and its wait for input."""

import contextlib
import itertools
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deit_jax.data.sources.base import ArraySource, Dataset
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.models import cudnn
from deit_jax.parallel import devices, sharding
from deit_jax.perf import hlo_cost
from deit_jax.perf.chips import CHIPS, device_of
from deit_jax.perf.flops import flops_per_image
from deit_jax.shapes import input_shape
from deit_jax.storage import backend, to_path
from deit_jax.train.experiment import Experiment
from deit_jax.train.loop import Trainer
from deit_jax.train.tape.session import stand_in

log = logging.getLogger("deit_jax")

UNKNOWN_CLASSES = 1000
PROFILED_STEPS = 5
PERFETTO = "perfetto_trace.json.gz"  # as JAX names it


def data_or_random(data, batch_size: int) -> tuple[Dataset, str]:
    """Return the data of a `config.data` and "", or random images and why it is them.

    These are in 1000 classes, one batch of them; with `data.multi_label` in none.
    """
    try:
        return open_dataset(data), ""
    except UserError as error:
        classes = [str(i) for i in range(UNKNOWN_CLASSES)]
        images = np.zeros((batch_size, 1, 1, data.channels), np.uint8)
        several = (UNKNOWN_CLASSES,) * data.multi_label
        labels = np.zeros((batch_size, *several), np.uint8 if several else np.int32)
        source = ArraySource("random", images, labels)
        return Dataset(source, source, classes), str(error)


def random_labels(experiment: Experiment, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return labels as a batch has them: [n] numbers of classes, or [n K] for several an image."""
    if experiment.settings.several:
        return rng.integers(0, 2, (count, experiment.num_classes), np.uint8)
    # Images without labels have the number 0, which nobody reads.
    return rng.integers(0, max(1, experiment.num_classes), count, np.int32)


def random_batch(experiment: Experiment) -> dict[str, jax.Array]:
    """Return random images and labels, on the devices as a training batch is."""
    share = len(experiment.rows)
    shape = input_shape(experiment.model, experiment.image_size, share)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": random_labels(experiment, share, rng),
    }
    return experiment.on_devices(batch | stand_in(experiment, batch["label"]))


class CompiledStep:
    """The compiled step of a Trainer and the state that it carries on."""

    def __init__(self, trainer: Trainer, batch):
        self.state, self._teacher_params = trainer.state, trainer.teacher_params
        began = time.perf_counter()
        lowered = trainer.step.lower(self.state, self._teacher_params, batch)
        self.compiled = lowered.compile()
        self.compile_s = time.perf_counter() - began

    def __call__(self, batch) -> Any:
        """Start a step and return its metrics, which may not be there yet."""
        self.state, values = self.compiled(self.state, self._teacher_params, batch)
        return values


def measure(
    experiment: Experiment,
    dataset: Dataset,
    missing: str,
    seconds: float,
    profile: Path | None = None,
    compare: bool = False,
) -> dict[str, Any]:
    """Compile and time the training step; return its time, rate, memory and wait for input.

    The batch is on the devices already; half of the time goes to steps that the config's own data
    feeds, if it is there: `input_wait` is their share of waiting, None without data. `mfu` is None
    where the device's peak is not known; `peak_bytes` is of the fullest device, or what the
    compiler says where the backend does not tell. `attention` is the kernel that computes it, and
    with `compare` `attention_ms` the step's time with each, or why one cannot be had. `profile` is
    where a trace is written, if anywhere; raise UserError if it cannot be. `dataset` and `missing`
    are what data_or_random returns.
    """
    if missing:
        log.info("random images in %d classes, since %s", UNKNOWN_CLASSES, missing)
    folder = profile and _writable(profile)
    teacher = experiment.random_teacher()
    seconds = seconds if missing else seconds / 2
    with _trained(experiment, dataset, teacher) as trainer:
        batch, batches = random_batch(experiment), trainer.batches()
        steps = CompiledStep(trainer, batch)  # which takes the trainer's state away
        result = figures(experiment, step_times(steps, batch, seconds))
        result |= {"compile_s": steps.compile_s, **peak_memory(steps.compiled)}
        result |= attention_of(experiment)
        result["input_wait"] = None
        if not missing:
            result["input_wait"], missing = input_wait(experiment, batches, steps, seconds)
        result["input_wait_unknown"] = missing or None
        result["profile"] = folder and write_profile(steps, batch, folder)
    if compare:
        known = {result["attention"]: result["step_ms"]}
        del trainer, steps, batch  # and the memory that they hold
        result["attention_ms"] = compare_attention(experiment, dataset, teacher, seconds, known)
    return result


@contextlib.contextmanager
def _trained(experiment: Experiment, dataset: Dataset, teacher) -> Iterator[Trainer]:
    """Open a run in a folder that goes again, its "out of memory" explained."""
    with experiment.explained(), tempfile.TemporaryDirectory() as workdir:
        trainer = Trainer(experiment, to_path(workdir), dataset, teacher)
        with contextlib.closing(trainer.checkpointer):
            yield trainer


def attention_of(experiment: Experiment) -> dict[str, Any]:
    """Return {"attention": "cudnn" | "xla" | None, "attention_reason": why it is not cuDNN's}."""
    model = experiment.model
    if not hasattr(model, "attention_shape"):
        return {"attention": None, "attention_reason": None}
    if model.attention == "xla":
        return {"attention": "xla", "attention_reason": "model.attention=xla"}
    shape = model.attention_shape(experiment.batch_size // experiment.settings.micro_batches)
    reason = cudnn.refusal(shape, model.dtype)
    told = reason if sharding.platform(experiment.mesh) == "gpu" else None
    return {"attention": "xla" if reason else "cudnn", "attention_reason": told or None}


def compare_attention(
    experiment: Experiment,
    dataset: Dataset,
    teacher,
    seconds: float,
    known: dict[str | None, float],
) -> dict[str, float | str]:
    """Return the step's milliseconds by kernel of attention, in words why there is none.

    What is known already is not measured again.
    """
    times: dict[str, float | str] = {}
    for choice in ("cudnn", "xla"):
        try:
            times[choice] = known.get(choice) or _median_ms(
                experiment.changed({"model.attention": choice}), dataset, teacher, seconds
            )
        except UserError as error:
            times[choice] = str(error).partition(": ")[2] or str(error)
        except jax.errors.JaxRuntimeError as error:  # of one kernel; the other may do
            times[choice] = next(iter(str(error).splitlines()), type(error).__name__)
    return times


def _median_ms(experiment: Experiment, dataset: Dataset, teacher, seconds: float) -> float:
    """Return the milliseconds of an experiment's step."""
    with _trained(experiment, dataset, teacher) as trainer:
        batch = random_batch(experiment)
        return float(np.median(step_times(CompiledStep(trainer, batch), batch, seconds))) * 1e3


def step_times(step, batch, seconds: float) -> list[float]:
    """Return the seconds of two or more steps after a first.

    As in training, a step is started before the one before it is waited for: what counts is the
    time from one end to the next.
    """
    running, ends = step(batch), []
    began = time.perf_counter()
    while len(ends) < 4 or time.perf_counter() - began < seconds:
        running, before = step(batch), running
        jax.block_until_ready(before)
        ends.append(time.perf_counter())
    jax.block_until_ready(running)
    return np.diff(ends[1:]).tolist()


def input_wait(experiment: Experiment, batches, step, seconds: float) -> tuple[float | None, str]:
    """Return the share of time that steps fed by a run's own loader wait for it.

    Three steps or more are timed, after two: the loader starts with nothing in store. (None, why)
    if an image cannot be loaded.
    """
    loader, in_flight = experiment.loaded(batches, 0, 2**31), None
    waited = began = 0.0
    try:
        with contextlib.closing(loader):
            for number in itertools.count():  # as Trainer does
                if number == 2:
                    began, waited = time.perf_counter(), 0.0
                if number >= 5 and time.perf_counter() - began >= seconds:
                    return waited / (time.perf_counter() - began), ""
                asked = time.perf_counter()
                read = next(loader)
                waited += time.perf_counter() - asked
                batch = experiment.on_devices(read | stand_in(experiment, read["label"]))
                del read  # or its memory would not be free while the next is loaded
                in_flight, before = step(batch), in_flight
                jax.block_until_ready(before)
    except UserError as error:
        return None, str(error)
    raise AssertionError


def figures(experiment: Experiment, times: list[float]) -> dict[str, Any]:
    """Return the steps' time, spread and rate, and the share of the devices' peak."""
    tenth, median, ninetieth = np.percentile(times, (10, 50, 90)).tolist()
    kind = jax.devices()[0].device_kind
    flops = flops_per_image(experiment) * experiment.batch_size
    chip = CHIPS.get(device_of(kind) or "")
    # JAX's devices are whole chips but for tpu7x, of which it makes two.
    peak = chip and chip.peak_tflops / chip.devices
    return {
        "device": kind,
        "devices": jax.device_count(),
        "batch_size": experiment.batch_size,
        "steps": len(times),
        "step_ms": median * 1e3,
        "step_ms_p10": tenth * 1e3,
        "step_ms_p90": ninetieth * 1e3,
        "images_per_second": experiment.batch_size / median,
        "flops_per_step": flops,
        "mfu": peak and flops / median / (peak * 1e12 * jax.device_count()),
    }


def peak_memory(compiled) -> dict[str, Any]:
    """Return the bytes of the fullest device, and whether the device or the compiler says so."""
    if peak := devices.peak_bytes(jax.local_devices()):
        return {"peak_bytes": peak, "peak_bytes_by": "device"}
    expected = hlo_cost.peak_bytes(compiled)
    return {"peak_bytes": expected, "peak_bytes_by": expected and "compiler"}


def _writable(folder: Path) -> Path:
    try:
        backend(folder).make_folder(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--profile={folder}: cannot be written ({error.strerror})") from error
    return folder


def write_profile(step, batch, folder: Path) -> str:
    """Write a trace of a few steps; return the folder that holds it."""
    # Without Python's own calls, of which there are more than a viewer can show.
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
        for number in range(PROFILED_STEPS):
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                jax.block_until_ready(step(batch))
    return str(max(folder.rglob(PERFETTO), key=lambda path: path.stat().st_mtime).parent)


def report(result: dict[str, Any]) -> str:
    """Return what `measure` found, in lines."""
    mfu, wait = result["mfu"], result["input_wait"]
    by = ", by the compiler" if result["peak_bytes_by"] == "compiler" else ""
    peak = result["peak_bytes"]
    memory = "not known" if peak is None else f"{peak / 1e9:.2f} GB a device{by}"
    lines = [
        f"step: {result['step_ms']:.1f} ms ({result['step_ms_p10']:.1f} to "
        f"{result['step_ms_p90']:.1f}), {result['images_per_second']:.0f} images/s (batch "
        f"{result['batch_size']} on {result['devices']} x {result['device']}, median and 10th to "
        f"90th percentile of {result['steps']} steps)",
        f"compiling: {result['compile_s']:.1f} s; "
        f"peak memory: {memory}; "
        f"share of the peak: {'not known' if mfu is None else f'{mfu:.1%}'}",
        f"waiting for input: not measured, {result['input_wait_unknown']}"
        if wait is None
        else f"waiting for input: {wait:.1%} of the time",
    ]
    if result["attention"]:
        reason = result["attention_reason"]
        lines.append(f"attention: {result['attention']}{f' ({reason})' if reason else ''}")
    for kernel, time_ms in result.get("attention_ms", {}).items():
        text = time_ms if isinstance(time_ms, str) else f"{time_ms:.1f} ms a step"
        lines.append(f"  with {kernel}: {text}")
    if folder := result["profile"]:
        lines += [
            f"trace of {PROFILED_STEPS} steps: {folder}",
            f"  open {PERFETTO} from there at https://ui.perfetto.dev, or "
            f"`pip install xprof` and `xprof {Path(folder).parents[2]}`",
        ]
    return "\n".join(lines)

"""What happens on a GPU, as far as stand-ins for JAX's plugin can show it."""

import json
import shutil

import jax
import numpy as np
import pytest

from deit_jax import __main__ as program
from deit_jax.analysis import evaluate
from deit_jax.config.serialize import from_json
from deit_jax.configs import quickstart
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.models import attention, cudnn
from deit_jax.models.build import compute_dtype
from deit_jax.parallel import sharding
from deit_jax.perf import step_time
from deit_jax.step import compile as compile_lib
from deit_jax.train import evaluator, experiment, loop, memory, run
from deit_jax.train.experiment import settings_of
from deit_jax.train.validate import validate
from deit_jax.weights.load import folded
from deit_jax.workdir.saved_run import load_run
from tests.test_convert import opened
from tests.tiny import make_tiny_config, measured, resolved

OUT_OF_MEMORY = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9126805504 bytes.\nBufferAssignment"
)


def raises(*_, **__):
    raise OUT_OF_MEMORY


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that makes this machine's devices GPUs of a compute capability."""

    def pretend(capability):
        monkeypatch.setattr(cudnn, "compute_capability", lambda: capability)
        monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
        monkeypatch.setattr(cudnn, "_tried", lambda *_: "")

    return pretend


def test_a_gpu_without_bfloat16_computes_in_float32_unless_told_otherwise(gpu, tiny_config):
    gpu(7.5)
    assert compute_dtype("auto") == "float32"
    validate(tiny_config, 8)
    tiny_config.dtype = "bfloat16"
    with pytest.raises(UserError, match=r"dtype='bfloat16': .*capability 7.5.* take float32"):
        validate(tiny_config, 8)


@pytest.mark.parametrize(
    ("part", "fields", "reason"),
    [
        ("", {"dtype": "float32"}, "not float32"),
        ("", {"model.width": 900, "model.num_heads": 3}, "a head has 300 numbers"),
        ("teacher.", {"teacher.model.name": "deit_tiny_patch16_224"}, ""),
        ("", {}, ""),
    ],
)
def test_cudnn_is_checked_before_anything_is_written(gpu, tiny_config, part, fields, reason):
    gpu(9.0)
    tiny_config.dtype = "bfloat16"
    if part:
        for key in ("widths", "depths", "stem_width"):
            tiny_config.teacher.model[key] = None
    tiny_config.update_from_flattened_dict(fields)
    (tiny_config.teacher if part else tiny_config).model.attention = "cudnn"
    if reason:
        with pytest.raises(
            UserError, match=f"{part}model.attention='cudnn': .*{reason}.*auto or xla"
        ):
            validate(tiny_config, 8)
    else:
        validate(tiny_config, 8)


@pytest.mark.slow
def test_a_run_that_insists_on_cudnn_is_counted_and_timed(gpu, monkeypatch, tiny_config):
    """Parameters and operations are counted on models in float32, which cuDNN does not take."""
    gpu(9.0)
    monkeypatch.setattr(cudnn, "attention", attention.softmax_attention)
    monkeypatch.setattr(memory, "limit", lambda mesh: 10**10)
    tiny_config.distill.kind, tiny_config.dtype = "none", "bfloat16"
    tiny_config.data.source = "folder:/nowhere"
    tiny_config.model.attention, tiny_config.model.depth = "cudnn", 1
    result = measured(tiny_config, compare=True)
    assert result["attention"] == "cudnn"
    assert set(result["attention_ms"]) == {"cudnn", "xla"}
    assert min(result["attention_ms"].values()) > 0
    assert result["flops_per_step"] > 0


def test_a_kernel_that_fails_leaves_the_others_time(gpu, monkeypatch, tiny_config):
    gpu(9.0)
    tiny_config.distill.kind, tiny_config.dtype = "none", "bfloat16"

    def median_ms(experiment, *_):
        if experiment.model.attention == "cudnn":
            raise jax.errors.JaxRuntimeError("INTERNAL: no plan\nmore")
        return 1.5

    monkeypatch.setattr(step_time, "_median_ms", median_ms)
    dataset = open_dataset(tiny_config.data)
    experiment = resolved(tiny_config, dataset)
    found = step_time.compare_attention(experiment, dataset, None, 0.1, {})
    assert found == {"cudnn": "INTERNAL: no plan", "xla": 1.5}
    known = {"cudnn": 2.5}  # measured before
    found = step_time.compare_attention(experiment, dataset, None, 0.1, known)
    assert found == {"cudnn": 2.5, "xla": 1.5}


def test_only_a_gpus_step_excludes_kernels_and_by_a_name_that_xla_knows(monkeypatch, tiny_config):
    mesh = sharding.make_mesh(tiny_config.mesh)
    recipe = settings_of(tiny_config, 10, mesh)
    assert compile_lib.compiler_options(mesh, True) == {}  # on a CPU nothing changes
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
    assert compile_lib.compiler_options(mesh, False) == {}
    options = compile_lib.compiler_options(mesh, True)
    assert list(options) == ["xla_gpu_exclude_nondeterministic_ops"]
    lowered = jax.jit(lambda x: x + 1).lower(np.float32(1))
    assert lowered.compile(compiler_options=options)(np.float32(1)) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={"xla_gpu_exclude_nothing": True})
    asked = []
    monkeypatch.setattr(jax, "jit", lambda f, **words: asked.append(words) or f)
    compile_lib.jit_train_step(None, None, None, recipe, mesh, None, deterministic=True)
    assert asked[0]["compiler_options"] == options


def test_a_runs_config_reaches_the_compiler(monkeypatch, tiny_config, tmp_path):
    asked = []
    real = compile_lib.compiler_options
    monkeypatch.setattr(
        compile_lib, "compiler_options", lambda *words: asked.append(words[1]) or real(*words)
    )
    tiny_config.distill.kind, tiny_config.train.deterministic = "none", True
    dataset = open_dataset(tiny_config.data)
    loop.Trainer(resolved(tiny_config, dataset), tmp_path, dataset).checkpointer.close()
    assert asked == [True]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["train.micro_batch=2", "optim.accum_steps=2", "model.remat=True"]),
        ({"optim.accum_steps": 2}, ["optim.accum_steps=4", "model.remat=True"]),
        ({"model.remat": True, "model.dropout": 0.1}, ["optim.accum_steps=2"]),
    ],
)
def test_a_training_out_of_memory_says_which_fields_help(
    monkeypatch, tiny_config, tmp_path, fields, expected
):
    tiny_config.distill.kind = "none"
    tiny_config.update_from_flattened_dict(fields)
    monkeypatch.setattr(experiment, "jit_train_step", lambda *_, **__: raises)
    with pytest.raises(UserError, match=r"^training: the device is out of memory; try ") as raised:
        run.train(tiny_config, tmp_path / "run")
    text = str(raised.value)
    flags = [word.removeprefix("--config.") for word in text.split() if word.startswith("--")]
    assert [flag.rstrip(",") for flag in flags] == [*expected, "batch_size"]
    assert "\n" not in text


def test_it_is_one_line_of_the_command_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(experiment, "jit_train_step", lambda *_, **__: raises)
    words = [f"--config={quickstart.__file__}", f"--workdir={tmp_path}/run"]
    assert program.main(["train", *words, "--config.distill.kind=none"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("deit train: training: the device is out of memory; try --config.")


def test_an_evaluation_out_of_memory_has_its_own_field(monkeypatch, tiny_config, tmp_path):
    tiny_config.distill.kind, tiny_config.epochs, tiny_config.model.depth = "none", 0.2, 1
    monkeypatch.setattr(evaluator.eval_step, "eval_step", raises)
    with pytest.raises(UserError, match=r"evaluation: .* try --config.train.eval_batch_size=128"):
        run.train(tiny_config, tmp_path / "run")


def test_other_errors_of_the_device_stay_what_they_are():
    other = jax.errors.JaxRuntimeError("INTERNAL: cuDNN launch failure")
    expected = pytest.raises(jax.errors.JaxRuntimeError, match="launch failure")
    with expected, memory.explained("training", "try"):
        raise other


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a run of one step, and its results."""
    config, folder = make_tiny_config(), tmp_path_factory.mktemp("trained") / "run"
    config.distill.kind, config.epochs, config.model.depth = "none", 0.2, 1
    return folder, run.train(config, folder)


def test_an_evaluation_in_parts_counts_what_a_whole_one_does(monkeypatch, trained):
    folder, whole = trained
    monkeypatch.setattr(evaluator.parts, "forward_parts", lambda *_: 4)
    config = from_json(json.loads((folder / "config.json").read_text()))
    again = evaluate.open_evaluation(config, str(folder)).results()
    assert {k: again[k] for k in ("examples", "cls", "dist")} == {
        k: whole[k] for k in ("examples", "cls", "dist")
    }


def test_a_run_trained_with_cudnn_opens_where_there_is_none(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    path = tmp_path / "run/config.json"
    saved = json.loads(path.read_text())
    saved["model"]["attention"] = "cudnn"
    path.write_text(json.dumps(saved))
    assert load_run(tmp_path / "run").model.attention == "auto"


def test_a_bench_on_a_backend_that_tells_nothing(monkeypatch, tiny_config):
    class Compiled:
        def memory_analysis(self):
            return None

    tiny_config.distill.kind, tiny_config.model.depth = "none", 1
    nothing = step_time.peak_memory(Compiled())
    assert nothing == {"peak_bytes": None, "peak_bytes_by": None}
    monkeypatch.setattr(step_time, "peak_memory", lambda _: nothing)
    tiny_config.data.source = "folder:/nowhere"
    result = measured(tiny_config, compare=True)
    report = step_time.report(result)
    assert "peak memory: not known" in report
    assert "attention: xla\n" in report
    assert result["attention_ms"]["xla"] > 0
    assert "  with cudnn: it needs an NVIDIA GPU" in report


def test_batch_norm_is_folded_by_one_program():
    weights = opened("regnety_002", {"widths": (8, 16, 24), "depths": (1, 1, 1), "stem_width": 8})
    events = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        folded(weights.model, weights.variables)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(events) == 1

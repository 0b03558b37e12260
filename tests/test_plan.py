"""`deit plan`: what it promises of real configs, and that it compiles what Trainer compiles.

The compiler for TPUs comes with the extra `test`; TEST_TPU=0 does without it.
"""

import dataclasses
import itertools
import os

import jax
import jax.numpy as jnp
import pytest

from deit_jax import __main__ as program
from deit_jax.configs import deit, deit3
from deit_jax.models.build import build_model, image_size
from deit_jax.parallel import sharding
from deit_jax.perf import chips, plan, plan_report, step_time
from deit_jax.teachers.folder import write_teacher
from deit_jax.teachers.teacher import Teacher
from deit_jax.train import load_teacher, loop, parts, teacher_spec
from tests.tiny import resolved


@pytest.fixture
def tpu():
    """`make test` installs the compiler; TEST_TPU=0 does without."""
    if os.environ.get("TEST_TPU") == "0":
        pytest.skip("TEST_TPU=0")


def run(capsys, *words):
    code = program.main(["plan", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip()


def small(**arguments):
    """Return a two-block DeiT-S with a small teacher, on data that need not be there."""
    c = deit.get_config("variant=small,distilled=True")
    c.model.depth, c.teacher.model.name = 2, "regnety_002"
    # A TPU's compiler takes three times as long for images of 224, and for a whole convnet.
    c.model.image_size, c.teacher.model.widths, c.teacher.model.depths = 64, (24, 56), (1, 1)
    c.batch_size, c.optim.ema_decay = 64 * 4, 0.0
    c.update_from_flattened_dict(arguments)
    return c


def plan_of(config, topology):
    return plan.plan(plan.planned(config, topology), topology)


@pytest.mark.slow
def test_data_parallel_moves_each_gradient_once_and_no_image(tpu):
    """DeiT-S's blocks on v5e:2x2; gradients of kernels leave the backward pass in bfloat16."""
    result = plan_of(small(), "v5e:2x2")
    model = build_model(small().model, 1000)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    sizes = {path: leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    float32 = [path for path in sizes if "norm" in jax.tree_util.keystr(path)]
    expected = 2 * sum(sizes.values()) + 2 * sum(sizes[path] for path in float32)
    moved = result["collectives"]
    assert moved["all_reduce"] == pytest.approx(expected, rel=0.01)
    assert {k: v for k, v in moved.items() if v} == {"all_reduce": moved["all_reduce"]}
    assert result["fits"]
    assert result["chips"] == 4


@pytest.mark.slow
def test_what_is_frozen_takes_neither_memory_nor_communication(tpu):
    """One of two blocks: its moments, its gradient and what they need of a chip are gone."""
    whole, c = plan_of(small(), "v5e:2x2"), small()
    c.optim.freeze = "blocks_0,patch_embed,*_token,pos_embed"
    part = plan_of(c, "v5e:2x2")
    model = build_model(c.model, 1000)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    frozen = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not path[0].key.startswith(("blocks_1", "norm", "head"))
    )
    saved = whole["per_chip"]["argument_bytes"] - part["per_chip"]["argument_bytes"]
    copies = 2 + bool(c.optim.ema_decay)
    assert saved == pytest.approx(copies * 4 * frozen, rel=0.02)  # a TPU pads its arrays
    assert part["per_chip"]["peak_bytes"] < whole["per_chip"]["peak_bytes"] - saved
    moved = [p["collectives"]["all_reduce"] for p in (whole, part)]
    assert moved[0] - moved[1] == pytest.approx(2 * frozen, rel=0.05)
    assert part["flops_per_step"] < 0.85 * whole["flops_per_step"]
    assert part["estimated_cycles"] < whole["estimated_cycles"]


@pytest.mark.slow
def test_a_teacher_folder_costs_a_tpu_what_the_same_network_does(tpu, tmp_path):
    config = small()
    teacher, params = load_teacher.random_teacher(teacher_spec.teacher_spec(config), 1000)

    def apply(params, images):
        model = teacher.model.clone(dtype=images.dtype)
        return model.apply({"params": params}, images, train=False).cls

    spec = {"mean": teacher.mean, "std": teacher.std, "image_size": 64}
    names = [f"class number {i}" for i in range(1000)]
    write_teacher(Teacher(apply=apply, params=params, classes=names, **spec), tmp_path / "folder")
    ours = plan_of(config, "v5e:2x2")
    config.teacher.weights = str(tmp_path / "folder")
    folder = plan_of(config, "v5e:2x2")
    for key in ("flops_per_step", "analytic_flops_per_step"):
        assert folder[key] == pytest.approx(ours[key], rel=0.01)
    assert folder["estimated_cycles"] == pytest.approx(ours["estimated_cycles"], rel=0.1)
    assert folder["collectives"] == ours["collectives"]


@pytest.mark.parametrize("tape", ["off", "replay"])
def test_plan_is_of_the_step_that_a_run_compiles(tpu, tiny_config, tmp_path, monkeypatch, tape):
    """On the same CPU devices, the plan's program is the Trainer's, to the letter."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    tiny_config.mesh.fsdp, tiny_config.teacher.tape = 2, tape
    dataset, _ = step_time.data_or_random(tiny_config.data, tiny_config.batch_size)
    experiment = resolved(tiny_config, dataset)
    trainer = loop.Trainer(experiment, tmp_path, dataset, experiment.random_teacher())
    trainer.checkpointer.close()
    batch = step_time.random_batch(experiment)
    own = trainer.step.lower(trainer.state, trainer.teacher_params, batch)
    planned, arguments = plan.lower_step(experiment)
    assert planned.as_text() == own.as_text()
    real = (trainer.state, trainer.teacher_params, batch)
    same = jax.tree.map(
        lambda a, b: (
            (a.shape, a.dtype) == (b.shape, b.dtype)
            and a.sharding.is_equivalent_to(b.sharding, a.ndim)
        ),
        arguments,
        real,
    )
    assert all(jax.tree.leaves(same))


@pytest.mark.slow
def test_operations_are_those_of_all_parts(tpu, monkeypatch):
    """XLA counts a loop's body once; the student has four parts here, its teacher one."""
    monkeypatch.setattr(parts, "FAST_BYTES", 5e5)
    planned = plan.planned(small(), "v5e:2x2")
    assert (planned.settings.micro_batches, planned.settings.teacher_parts) == (4, 1)
    result = plan.plan(planned, "v5e:2x2")
    assert result["flops_per_step"] == pytest.approx(result["analytic_flops_per_step"], rel=0.05)


@pytest.mark.long  # five minutes of one core, most of them for the teacher
def test_deit_b_distilled_fits_a_v5e_at_128_images_a_chip(tpu):
    config = deit.get_config("variant=base,distilled=True")
    config.batch_size = 128 * 4
    result = plan_of(config, "v5e:2x2")
    assert result["fits"]
    assert result["images_per_chip"] == 128
    assert result["per_chip"]["peak_bytes"] <= result["per_chip"]["hbm_bytes"] == 15.75 * 2**30
    # Counted by the compiler, and by hand: the same operations but for padding and recomputation.
    assert result["flops_per_step"] == pytest.approx(result["analytic_flops_per_step"], rel=0.1)
    seconds = result["estimated_cycles"] / 1.5e9
    assert result["estimated_step_ms"] == pytest.approx(1e3 * seconds)
    assert result["images_per_second_per_chip"] == pytest.approx(128 / seconds)
    assert result["hours"] == pytest.approx(300 * (1281167 // 512) * seconds / 3600)
    assert result["mfu"] == pytest.approx(
        result["analytic_flops_per_step"] / (4 * 197e12 * seconds)
    )


@pytest.mark.long  # two or three minutes
def test_the_student_alone_takes_less_than_200_m_cycles(tpu):
    config = deit.get_config("variant=base,distilled=True")
    config.batch_size, config.distill.kind = 128 * 16, "none"
    result = plan_of(config, "v5e:4x4")
    assert result["estimated_cycles"] < 200e6
    assert not result["not_estimated"]["custom_calls"]  # kernels that the estimate cannot see


@pytest.mark.long
def test_deit3_h_fits_16_v5e_with_its_weights_shared_out(tpu):
    """32 images a chip of 16 GB, recomputing activations; no chip holds more than a share."""
    config = deit3.get_config("size=huge")
    config.batch_size, config.mesh.fsdp, config.model.remat = 512, 16, True
    result = plan_of(config, "v5e:4x4")
    assert result["fits"]
    # Parameters, two moments and their average (if any) in float32, a sixteenth of each.
    copies = 3 + (config.optim.ema_decay > 0)
    model = build_model(config.model, 1000)
    size = image_size(config.model)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count > 600e6
    share = copies * 4 * count / 16
    assert share < result["per_chip"]["argument_bytes"] < 1.1 * share


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_a_remedy(tpu, capsys, monkeypatch):
    """A chip of 16 MiB stands for a model too large."""
    chip = dataclasses.replace(chips.CHIPS["v5e"], hbm_bytes=16 * 2**20)
    monkeypatch.setitem(plan.CHIPS, "v5e", chip)
    experiment = plan.planned(small(), "v5e:2x2")  # compiled above
    result = plan.plan(experiment, "v5e:2x2")
    assert not result["fits"]
    text = plan_report.report(result) + plan_report.advice(
        result, list(plan.alternatives(experiment))
    )
    for part in ("DOES NOT FIT", "model.remat=True", "mesh.fsdp=4", "batch_size=128", "--sweep"):
        assert part in text


def test_the_compilers_message_names_the_memory():
    message = "RESOURCE_EXHAUSTED: the total memory required (1.50G) exceeds available HBM (0.5G)."
    assert plan.used_bytes(message) == 1.5 * 2**30
    assert plan.used_bytes("Used 20.00M of 15.75G hbm") == 20 * 2**20
    assert plan.used_bytes("no figure") is None


@pytest.mark.parametrize(
    ("text", "found"),
    [("v5e:4x4", ("v5e", 16)), ("v4:2x2x4", ("v4", 16)), ("v6e:16x16", ("v6e", 256))],
)
def test_topologies_count_chips(text, found):
    assert plan.parse_topology(text) == found


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        ([], 2, "--topology=… is missing"),
        (["--topology=h100:8x1"], 1, "--topology=h100:8x1: give v4, v5e"),
        (["--topology=v5e:0x4"], 1, "--topology=v5e:0x4: give"),
        (["--topology=v4:4x4"], 1, "a v4 slice has 3 sides"),
        (["--topology=v5e:32x16"], 1, "512 chips; at most 256"),
        (["--topology=v5e:3x3"], 1, "no such slice"),
        (["--topology=v5e:4x4", "--config.mesh.fsdp=3"], 1, "mesh.fsdp=3"),
        (["--topology=v5e:4x4", "--config.batch_size=1000"], 1, "batch_size=1000"),
        (["--topology=v5e:4x4", "--config.data.source=tfds:cifar10"], 1, "--classes=N"),
    ],
)
def test_each_mistake_is_one_line(tpu, capsys, words, code, part):
    got, out, err = run(capsys, f"--config={deit.__file__}", *words)
    assert (got, out) == (code, "")
    assert part in err
    assert len(err.splitlines()) == 1, err


def test_without_the_compiler_the_package_is_named(capsys, monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    code, _, err = run(capsys, f"--config={deit.__file__}", "--topology=v5e:4x4")
    assert code == 1
    assert err == "deit plan: planning needs the TPU compiler: pip install 'deit_jax[plan]'"


def test_weights_are_split_inside_a_slice(tpu):
    devices = plan.devices_of("v5e:2x2", 2)
    config = small(**{"mesh.slices": 2, "mesh.fsdp": 4}).mesh
    mesh = sharding.make_mesh(config, devices)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
    # Every process loads the rows of its own devices, and all together load every row once.
    shares = [sharding.local_rows(mesh, 64, process) for process in range(2)]
    assert sorted(itertools.chain(*shares)) == list(range(64))


def test_processes_of_a_torus_hold_the_batch_between_them(tpu):
    """Neighbours in the mesh are neighbours in the torus, not in the order of the hosts."""
    config = small().mesh
    mesh = sharding.make_mesh(config, plan.devices_of("v5e:4x4", 1))
    shares = [sharding.local_rows(mesh, 64, process) for process in range(4)]
    assert sorted(itertools.chain(*shares)) == list(range(64))
    assert any(share != list(range(share[0], share[0] + 16)) for share in shares)
    config.tensor = 8  # two hosts to each half of the batch
    mesh = sharding.make_mesh(config, plan.devices_of("v5e:4x4", 1))
    shares = [sharding.local_rows(mesh, 64, process) for process in range(4)]
    assert sorted(itertools.chain(*shares)) == sorted([*range(64)] * 2)

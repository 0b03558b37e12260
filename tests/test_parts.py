"""In how many parts a device takes its share of a batch, and what it is expected to hold."""

import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deit_jax.errors import UserError
from deit_jax.models import liveness, registry
from deit_jax.parallel import devices as devices_lib
from deit_jax.parallel import sharding
from deit_jax.train import memory, parts
from deit_jax.train.experiment import resolve


class Device:
    """A device of some platform that tells nothing, for a mesh that is only asked about."""

    process_index = 0

    def __init__(self, platform):
        self.platform = platform


def mesh_of(count, platform="tpu", tensor=1):
    devices = np.array([Device(platform) for _ in range(count)], object)
    shape = (count // tensor, 1, tensor)

    class Mesh:
        size = count

    Mesh.devices = devices.reshape(shape)
    Mesh.shape = dict(zip(sharding.AXES, shape, strict=True))
    return Mesh


def config_of(name, batch, **fields):
    from deit_jax.configs import deit

    c = deit.get_config("variant=base,distilled=True")
    c.model.name, c.batch_size = name, batch
    for key, value in fields.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    return c


def load_of(config, mesh, classes=1000):
    """Return what a config's step has on the devices of a mesh."""
    with (
        mock.patch.object(sharding, "make_mesh", return_value=mesh),
        mock.patch.object(parts, "choose", return_value=(1, 1)),
    ):
        return resolve(config, classes, 10_000).load


def chosen(config, mesh):
    """Return in how many parts student and teacher take a device's share."""
    settings = (config.optim.accum_steps, config.train.micro_batch)
    return parts.choose(load_of(config, mesh), *settings)


@pytest.mark.parametrize(
    ("name", "batch", "mesh", "fields", "count"),
    [
        # By hand: 12 heads x 198 x 256 x 2 bytes = 1.22 MB an image, 32 of them in 40 MB.
        ("deit_base_distilled_patch16_224", 2048, mesh_of(16), {}, 4),
        ("deit_base_distilled_patch16_224", 512, mesh_of(16), {}, 1),
        ("deit_base_distilled_patch16_224", 2048, mesh_of(16, "gpu"), {}, 1),
        ("deit_base_distilled_patch16_224", 2048, mesh_of(16, tensor=4), {}, 4),
        ("deit_small_distilled_patch16_224", 2048, mesh_of(16), {}, 2),
        ("deit_tiny_distilled_patch16_224", 2048, mesh_of(16), {}, 1),
        ("deit_base_distilled_patch16_224", 2048, mesh_of(16), {"train__micro_batch": 0}, 1),
        ("deit_base_distilled_patch16_224", 2048, mesh_of(16), {"train__micro_batch": 50}, 4),
        ("deit_base_distilled_patch16_224", 2048, mesh_of(16), {"optim__accum_steps": 2}, 2),
        ("deit_base_distilled_patch16_224", 2048, mesh_of(16), {"model__dropout": 0.1}, 1),
        ("regnety_160", 2048, mesh_of(16), {}, 1),
        ("regnety_160", 2048, mesh_of(16), {"train__micro_batch": 32}, 1),
        ("deit_base_distilled_patch16_224", 74 * 16, mesh_of(16), {}, 1),  # or 74 parts of one
        ("deit_base_distilled_patch16_224", 74 * 16, mesh_of(16), {"train__micro_batch": 40}, 2),
    ],
)
def test_the_number_of_parts(name, batch, mesh, fields, count):
    assert chosen(config_of(name, batch, **fields), mesh)[0] == count


@pytest.mark.parametrize(
    ("batch", "fields", "count"),
    [
        (2048, {}, 1),  # 128 images at once, the student in four parts
        (4096, {}, 2),
        (512, {}, 1),
        (4096, {"train__micro_batch": 32}, 8),
        (4096, {"optim__accum_steps": 4}, 4),
        (2048, {"teacher__image_size": 300}, 2),  # 71 images have as many pixels
    ],
)
def test_the_teacher_takes_more_at_a_time_unless_parts_were_asked_for(batch, fields, count):
    config = config_of("deit_base_distilled_patch16_224", batch, **fields)
    assert chosen(config, mesh_of(16))[1] == count


class Gpu:
    """A GPU that tells its memory as JAX's plugin does."""

    process_index = 0

    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        if isinstance(self.stats, Exception):
            raise self.stats
        return self.stats


@pytest.mark.parametrize(
    ("stats", "limit", "peak"),
    [
        ({"bytes_limit": 10, "peak_bytes_in_use": 3}, 10, 3),
        ({"bytes_limit": 10}, 10, None),
        ({"pool_bytes": 5}, None, None),  # other names
        ({}, None, None),
        (None, None, None),
        (NotImplementedError("memory_stats"), None, None),
        (jax.errors.JaxRuntimeError("UNIMPLEMENTED: GetMemoryStats"), None, None),
    ],
)
def test_a_plugin_need_not_tell_its_memory(stats, limit, peak):
    others = [Gpu({"bytes_limit": 20, "peak_bytes_in_use": 1}), Gpu(stats)]
    assert devices_lib.bytes_limit(others) == limit
    assert devices_lib.peak_bytes(others) == (peak or 1)
    assert devices_lib.peak_bytes(others[1:]) == peak
    assert devices_lib.peak_bytes([types.SimpleNamespace()]) is None  # no such attribute


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that turns this machine's eight devices into GPUs of so many bytes."""

    def pretend(size):
        monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
        monkeypatch.setattr(devices_lib, "bytes_limit", lambda _: size)
        memory._limit.cache_clear()

    yield pretend
    memory._limit.cache_clear()


def needed(config, mesh, images):
    """Return what a step with so many images at a time takes, by its parts."""
    load = load_of(config, mesh)
    pixels = load.share * 3 * config.model.image_size**2
    return load.state_bytes + 13 * pixels + load.gradient_bytes + load.gradient.bytes(images)


def test_a_gpus_share_is_parted_so_that_it_fits(gpus, tiny_config):
    tiny_config.batch_size = 8 * 96
    mesh = sharding.make_mesh(tiny_config.mesh)
    whole, half, third = (int(needed(tiny_config, mesh, n) / 0.9) for n in (96, 48, 32))
    for limit, count in ((2 * whole, 1), (half + 1, 2), (half - 1, 3), (third + 1, 3)):
        gpus(limit)
        assert chosen(tiny_config, mesh)[0] == count
        expected = load_of(tiny_config, mesh).expected_bytes(count)
        assert 0.3 * limit < expected <= 0.9 * limit
    gpus(None)  # it does not tell
    assert chosen(tiny_config, mesh)[0] == 1
    gpus(half - 1)
    tiny_config.train.micro_batch = 0  # all at once, whatever happens
    assert chosen(tiny_config, mesh)[0] == 1


def test_teacher_and_evaluation_are_parted_too(gpus, tiny_config):
    tiny_config.batch_size, mesh = 8 * 96, sharding.make_mesh(tiny_config.mesh)
    gpus(int(needed(tiny_config, mesh, 96) / 0.9))
    assert chosen(tiny_config, mesh)[1] == 1
    tiny_config.teacher.image_size = 256  # so that the teacher takes far more than the student
    assert chosen(tiny_config, mesh)[0] == 1
    assert chosen(tiny_config, mesh)[1] > 1
    gpus(10**9)
    model = registry.create_model("deit_tiny_patch16_224", 10)
    takes = functools.partial(memory.of_forward, model, 224)
    asked, one = (takes, 3 * 224**2, 64, mesh), takes().bytes(1)
    assert parts.forward_parts(*asked, held=0) == 1
    assert parts.forward_parts(*asked, held=int(0.9 * 10**9 - 10 * one)) >= 8
    assert parts.forward_parts(*asked, held=10**10) == 64


def test_one_image_that_does_not_fit_is_refused(gpus, tiny_config):
    gpus(10**5)
    with pytest.raises(UserError, match=r"model.name=deit_tiny.* takes about 0.0 GB .*remat=True"):
        chosen(tiny_config, sharding.make_mesh(tiny_config.mesh))[0]


def test_a_micro_batch_has_equal_parts_of_about_its_size(tiny_config):
    mesh = sharding.make_mesh(tiny_config.mesh)
    tiny_config.batch_size, tiny_config.train.micro_batch = 8 * 37, 16
    with pytest.raises(
        UserError, match=r"micro_batch=16: .* 37 images, has no .* 8 to 16; take 37"
    ):
        chosen(tiny_config, mesh)[0]
    tiny_config.batch_size = 8 * 40
    assert chosen(tiny_config, mesh)[0] == 4  # of ten
    tiny_config.train.micro_batch = 1
    assert chosen(tiny_config, mesh)[0] == 40


def peak(function, *arguments, platform="cuda"):
    return liveness.peak_bytes(jax.make_jaxpr(function)(*arguments).jaxpr, platform)


def test_what_lives_at_once_by_hand():
    x = jnp.zeros((100, 100))  # 40 000 bytes
    assert peak(lambda x: jnp.sin(x) + 1, x) == 40_000  # the result
    assert peak(lambda x: (x @ x) @ x, x) == 80_000  # a product and the one made of it
    assert peak(lambda x: jnp.sum(jnp.exp(x)), x) == 4  # fused into the sum
    assert peak(lambda x: jnp.exp(x) @ x, x) == 80_000  # but written for a product
    assert peak(lambda x: (x @ x).reshape(-1), x) == 40_000  # a view
    kept = jax.grad(lambda x: jnp.sum(jnp.sin(x @ x)))
    assert peak(kept, x) == 120_000  # x @ x, for the cosine; its gradient; and one of two products
    calls = jax.jit(lambda x: x @ x)
    assert peak(lambda x: calls(calls(calls(x))), x) == 80_000

    def chosen(x):
        return jax.lax.platform_dependent(x, cuda=lambda x: (x @ x) @ x, default=jnp.sin)

    assert (peak(chosen, x), peak(chosen, x, platform="tpu")) == (80_000, 40_000)

    def loop(x):
        return jax.lax.scan(lambda c, _: ((c @ c) @ c, None), x, length=9)[0]

    assert peak(loop, x) == 40_000 + 80_000


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"model.remat": True}, marks=pytest.mark.slow),
        pytest.param({"dtype": "float32"}, marks=pytest.mark.long),
        pytest.param({"model.image_size": 384}, marks=pytest.mark.long),
    ],
)
def test_the_estimate_is_near_what_a_tpus_compiler_takes(fields):
    """Against XLA's own account of a program for which no device is needed."""
    pytest.importorskip("libtpu")
    from deit_jax.configs import deit
    from deit_jax.perf import plan

    config = deit.get_config("variant=tiny,distilled=True,kind=none")
    config.model.depth, config.batch_size, config.train.micro_batch = 4, 4 * 64, 0
    config.model.image_size = 224
    config.update_from_flattened_dict(fields)
    config.dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    found = plan.plan(plan.planned(config, "v5e:2x2", 1000, 10**6), "v5e:2x2")
    found = found["per_chip"]["temp_bytes"]
    estimate = load_of(config, sharding.make_mesh(config.mesh)).gradient.bytes(64)
    estimate += 64 * 3 * config.model.image_size**2 * (memory.PIXEL_BYTES - 1)
    assert 0.95 * found < estimate < 1.8 * found

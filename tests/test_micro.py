"""Micro-batches: how many, the same gradient, and one meeting of the devices."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from deit_jax import hlo, micro, sharding, step
from tests.test_step import B, assert_close, build, make_batch


class Device:
    """A device of some platform, for a mesh that is only asked about."""

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
    from configs import deit

    c = deit.get_config("variant=base,distilled=True")
    c.model.name, c.batch_size = name, batch
    for key, value in fields.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    return c


@pytest.mark.parametrize(
    ("name", "batch", "mesh", "fields", "parts"),
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
def test_the_number_of_parts(name, batch, mesh, fields, parts):
    assert micro.micro_batches(config_of(name, batch, **fields), mesh) == parts


@pytest.mark.parametrize(
    ("batch", "fields", "parts"),
    [
        (2048, {}, 1),  # 128 images at once, the student in four parts
        (4096, {}, 2),
        (512, {}, 1),
        (4096, {"train__micro_batch": 32}, 8),
        (4096, {"optim__accum_steps": 4}, 4),
        (2048, {"teacher__image_size": 300}, 2),  # 71 images have as many pixels
    ],
)
def test_the_teacher_takes_more_at_a_time_unless_parts_were_asked_for(batch, fields, parts):
    config = config_of("deit_base_distilled_patch16_224", batch, **fields)
    assert micro.teacher_parts(config, mesh_of(16)) == parts


def step_over(config, parts):
    """Return (step over all devices that takes its share in `parts`, state, teacher, batch)."""
    function, state, teacher_params, mesh = build(config)
    keywords = dict(function.__wrapped__.keywords)
    keywords["recipe"] = dataclasses.replace(keywords["recipe"], micro_batches=parts, mesh=mesh)
    places = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)
    jitted = jax.jit(functools.partial(step.train_step, **keywords), out_shardings=places)
    return jitted, state, teacher_params, sharding.to_devices(make_batch(), mesh, B)


def test_parts_that_devices_sum_for_themselves_give_the_whole_batchs_step(tiny_config):
    tiny_config.model.drop_path = 0.3
    tiny_config.optim.eps = 1e-4  # AdamW's first steps are signs of gradients: tame rounding at 0
    results = []
    for n in (1, 4):
        jitted, *arguments = step_over(tiny_config, n)
        results.append(jax.device_get(jitted(*arguments)))
    (whole, metrics), (state, values) = results
    assert_close(whole.params, state.params, 1e-5)
    assert_close(whole.opt_state, state.opt_state, 1e-5)
    assert_close(metrics, values, 1e-5)


def test_the_gradient_crosses_devices_once_however_many_parts(tiny_config):
    # Groups of 8 among 4 images a device would mix across devices.
    tiny_config.mixing.prob, tiny_config.augment.erase_prob = 0.0, 0.0
    tiny_config.distill.kind = "none"
    moved = []
    for parts in (1, 4):
        jitted, *arguments = step_over(tiny_config, parts)
        cost = hlo.cost(jitted.lower(*arguments).compile().as_text())
        assert not cost.bytes["all_gather"] + cost.bytes["all_to_all"], cost.messages
        moved.append(cost.bytes["all_reduce"])
    size = sum(x.size for x in jax.tree.leaves(arguments[0].params))
    # The head that no loss reaches has no gradient to send.
    assert 0.95 * 4 * size < moved[1] < 1.05 * 4 * size
    assert moved[0] == pytest.approx(moved[1], rel=0.1)

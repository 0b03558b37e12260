"""Micro-batches: the same gradient, and one meeting of the devices."""

import dataclasses
import functools

import jax
import pytest

from deit_jax.parallel import sharding
from deit_jax.perf import hlo_cost
from deit_jax.step.train_step import train_step
from tests.test_step import B, assert_close, build, make_batch


def step_over(config, parts):
    """Return (step over all devices that takes its share in `parts`, state, teacher, batch)."""
    function, state, teacher_params, mesh = build(config)
    keywords = dict(function.__wrapped__.keywords)
    keywords["settings"] = dataclasses.replace(keywords["settings"], micro_batches=parts, mesh=mesh)
    places = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)
    jitted = jax.jit(functools.partial(train_step, **keywords), out_shardings=places)
    return jitted, state, teacher_params, sharding.to_devices(make_batch(), mesh, B)


@pytest.mark.slow
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
    tiny_config.distill.kind, tiny_config.model.depth = "none", 1
    moved = []
    for parts in (1, 4):
        jitted, *arguments = step_over(tiny_config, parts)
        cost = hlo_cost.cost(jitted.lower(*arguments).compile().as_text())
        assert not cost.bytes["all_gather"] + cost.bytes["all_to_all"], cost.messages
        moved.append(cost.bytes["all_reduce"])
    size = sum(x.size for x in jax.tree.leaves(arguments[0].params))
    # The head that no loss reaches has no gradient to send.
    assert 0.95 * 4 * size < moved[1] < 1.05 * 4 * size
    assert moved[0] == pytest.approx(moved[1], rel=0.1)

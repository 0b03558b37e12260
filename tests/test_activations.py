"""Under mesh.fsdp weights move to the examples, and under mesh.tensor sums of branches alone."""

import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deit_jax.models.deit import FAMILY
from deit_jax.parallel import sharding
from deit_jax.perf import hlo_cost, plan
from deit_jax.step.teacher import Foreign, FrozenTeacher
from tests import test_plan, test_step
from tests.test_plan import tpu  # noqa: F401  a fixture

BATCH = ("data", "fsdp")
# Of the small models here. No weight has as many rows as a device has tokens of any of these.
TOKENS = {16, 17, 18}


@pytest.mark.parametrize(
    ("path", "shape", "tensor", "expected"),
    [
        ("blocks_0", (8, 18, 32), 2, (BATCH, None, None)),
        ("patch_embed", (8, 16, 32), 1, (BATCH, None, None)),
        ("s1", (8, 4, 4, 24), 1, (BATCH, None, None, None)),
        ("", (8, 10), 2, (BATCH, None)),
        ("blocks_0/mlp/fc1", (8, 18, 128), 2, (BATCH, None, "tensor")),
        ("blocks_0/attn/qkv", (8, 18, 4, 8), 2, (BATCH, None, "tensor", None)),
        ("blocks_0/attn/qkv", (8, 18, 3, 8), 2, (BATCH, None, None, None)),  # DeiT-Ti's three heads
        ("head_dist", (8, 10), 2, (BATCH, "tensor")),
        ("head/fc", (8, 11), 2, (BATCH, None)),
        ("head", (8, 10), 1, (BATCH, None)),
        # What is between these follows from them; each point kept costs a TPU a fusion.
        ("blocks_0/mlp/fc1", (8, 18, 128), 1, None),
        ("blocks_0/attn/qkv", (8, 18, 4, 8), 1, None),
        ("blocks_0/mlp/fc2", (8, 18, 32), 2, None),
        ("blocks_0", (6, 18, 32), 1, None),  # examples that the mesh does not divide
        ("blocks_0", (), 1, None),
    ],
)
def test_where_what_leaves_a_layer_lives(path, shape, tensor, expected):
    spec = sharding.output_spec(path, shape, {"data": 1, "fsdp": 4, "tensor": tensor})
    assert spec == (None if expected is None else PartitionSpec(*expected))


def moved(hlo):
    """Return the kind and the sizes of every array that devices hand each other."""
    found = []
    for kind, shape, _, _ in hlo_cost.cost(hlo).messages:
        for sizes in re.findall(r"\w+\[([\d,]+)\]", shape):
            found.append((kind, tuple(map(int, sizes.split(",")))))
    return found


def of_tokens(messages):
    """Return those messages that are activations: [images tokens …], or their rows one by one."""
    rows = {images * tokens for images in (4, 8, 16, 32) for tokens in TOKENS}

    def activation(sizes):
        return sizes[0] in rows or (len(sizes) > 2 and sizes[0] > 1 and TOKENS & set(sizes))

    return [message for message in messages if activation(message[1])]


def transformer():
    """Return a teacher of 17 tokens, and its parameters."""
    kwargs = {"width": 40, "depth": 2, "num_heads": 4, "image_size": 16, "patch_size": 4}
    model = FAMILY.cls(num_classes=test_step.K, **kwargs)
    params = jax.jit(model.init)(jax.random.key(7), jnp.zeros((1, 16, 16, 3)))["params"]
    return teacher_of(model), params


def program():
    """Return a teacher of which nothing is seen, 16 tokens inside, and its parameters."""
    sizes = {"first": (48, 40), "up": (40, 160), "down": (160, 40), "last": (40, test_step.K)}
    rng = np.random.default_rng(0)
    params = {name: rng.normal(0, 0.1, size).astype(np.float32) for name, size in sizes.items()}

    def apply(params, images):
        tokens = images.reshape(-1, 16, 48) @ params["first"]
        tokens = tokens + jax.nn.relu(tokens @ params["up"]) @ params["down"]
        return tokens.mean(1) @ params["last"]

    return teacher_of(Foreign(apply, "program")), params


def teacher_of(model):
    return FrozenTeacher(model, *[test_step.MEAN, test_step.STD] * 2)


def compiled(monkeypatch, sizes, teacher=test_step.make_teacher, **fields):
    """Return the step of a small distilled student on a mesh of these sizes, as HLO."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    config = test_step.everything_on("hard")
    config.mixing.prob, config.augment.erase_prob = 0.0, 0.0  # partners may be on other devices
    config.model.width, config.model.num_heads = 40, 4
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
    config.update_from_flattened_dict(fields)
    jitted, state, teacher_params, mesh = test_step.build(config, teacher=teacher)
    batch = sharding.to_devices(test_step.make_batch(), mesh, test_step.B)
    return jitted.lower(state, teacher_params, batch).compile().as_text()


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    ("sizes", "teacher", "fields"),
    [
        ((1, 8, 1), transformer, {}),
        pytest.param((1, 8, 1), program, {}, marks=pytest.mark.slow),
        pytest.param((2, 4, 1), transformer, {"model.remat": True}, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), transformer, {"optim.accum_steps": 2}, marks=pytest.mark.slow),
    ],
)
def test_under_fsdp_no_activation_moves(sizes, teacher, fields, monkeypatch):
    messages = moved(compiled(monkeypatch, sizes, teacher, **fields))
    assert any(kind == "all_gather" for kind, _ in messages)
    assert of_tokens(messages) == []


@pytest.mark.eight_devices
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2), (4, 1, 2)])
def test_under_tensor_activations_are_summed_where_a_branch_begins_and_ends(sizes, monkeypatch):
    messages = of_tokens(moved(compiled(monkeypatch, sizes, transformer)))
    assert {kind for kind, _ in messages} == {"all_reduce"}
    share = test_step.B // (sizes[0] * sizes[1])
    summed = Counter(math.prod(sizes) for _, sizes in messages)
    # Two sums in each block of a forward pass, of teacher and student. Backward one for the MLP,
    # and for attention three, as a CPU's compiler sums before it adds what comes of q, k and v.
    assert summed == {share * 17 * 40: 2 * 2, share * 18 * 40: 2 * (2 + 1 + 3)}


@pytest.mark.slow
def test_a_tpu_moves_each_weight_three_times_under_fsdp(tpu):  # noqa: F811
    """Gathered for the forward pass and for the backward, summed as a gradient, in bfloat16."""
    fields = {"mesh.data": 1, "mesh.fsdp": 4, "distill.kind": "none"}
    experiment = plan.planned(test_plan.small(**fields), "v5e:2x2")
    params = experiment.abstract_state.params
    split = sum(x.size for x in jax.tree.leaves(params) if "fsdp" in x.sharding.spec)
    assert split > 0.99 * sum(x.size for x in jax.tree.leaves(params))
    weights = 3 * 2 * split
    hlo = plan.lower_step(experiment)[0].compile().as_text()
    assert 0.7 * weights < sum(hlo_cost.cost(hlo).bytes.values()) < 1.3 * weights
    # Nothing of all 256 images but a number of each, nor of 64 a chip and their 18 tokens.
    found = moved(hlo)
    assert [m for m in found if 256 in m[1] and math.prod(m[1]) > 256] == []
    assert [m for m in found if 18 in m[1] and math.prod(m[1]) > 18 * 384] == []

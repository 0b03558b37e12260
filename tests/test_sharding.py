"""Where every parameter lives, by a golden file; meshes; what a device holds after start-up."""

import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from deit_jax.config import schema
from deit_jax.configs import base, deit, deit3
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.models.build import build_model, image_size
from deit_jax.parallel import sharding
from deit_jax.step.optimizer import make_optimizer
from deit_jax.step.state import init_state
from deit_jax.train import loop, picture
from deit_jax.train.validate import validate
from tests.test_step import make_teacher
from tests.tiny import make_tiny_config, resolved

# path -> axis of the mesh that splits each dimension; a block's paths stand for all its like.
GOLDEN = Path(__file__).parent / "golden" / "shardings.json"
MODELS = {
    "deit_base_distilled": lambda: deit.get_config("variant=base,distilled=True"),
    "deit3_huge": lambda: deit3.get_config("size=huge"),
}
SIZES = ((8, 1, 1), (2, 4, 1), (2, 2, 2))


def make_mesh_config(data=-1, fsdp=1, tensor=1, slices=1):
    return ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor, "slices": slices})


def make_state(config):
    """Return a model and the shapes of its train state."""
    model = build_model(config.model, 1000)
    tx = make_optimizer(config.optim, lambda step: 0.1)
    size, decay = image_size(config.model), config.optim.ema_decay
    init = functools.partial(init_state, model=model, image_size=size, tx=tx, ema_decay=decay)
    return model, jax.eval_shape(init, jax.random.key(0))


def specs(config, sizes):
    """Return path -> spec, as a list, of everything in the train state."""
    model, state = make_state(config)
    mesh = sharding.make_mesh(make_mesh_config(*sizes))
    places = sharding.state_shardings(mesh, state, model)
    leaves = jax.tree_util.tree_leaves_with_path(places)
    return {sharding.path_name(path): list(place.spec) for path, place in leaves}


def by_kind(found):
    """Return the parameters' specs, blocks_* standing for all blocks, which must agree."""
    result = {}
    for path, spec in found.items():
        if path.startswith("params/"):
            name = re.sub(r"blocks_\d+", "blocks_*", path.removeprefix("params/"))
            assert result.setdefault(name, spec) == spec, path
    return result


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_lives_where_the_golden_file_says(name, sizes):
    found = by_kind(specs(MODELS[name](), sizes))
    assert found == json.loads(GOLDEN.read_text())[name]["x".join(map(str, sizes))]


@pytest.mark.parametrize("name", MODELS)
def test_moments_and_average_live_with_their_parameter(name):
    found = specs(MODELS[name](), (2, 2, 2))
    params = {k.removeprefix("params/"): v for k, v in found.items() if k.startswith("params/")}
    mirrors = [k for k in found if re.search(r"/(mu|nu)/|^ema/params/", k)]
    assert len(mirrors) == (3 if name == "deit_base_distilled" else 2) * len(params)
    for path in mirrors:
        assert found[path] == params[re.split(r"/mu/|/nu/|^ema/params/", path)[-1]], path


def test_heads_that_do_not_divide_stay_whole_and_are_reported():
    config = deit.get_config("variant=tiny,distilled=True")  # three heads
    model, state = make_state(config)
    mesh = sharding.make_mesh(make_mesh_config(tensor=2))
    found = by_kind(specs(config, (4, 1, 2)))
    assert found["blocks_*/attn/qkv/kernel"] == found["blocks_*/attn/proj/kernel"] == []
    assert found["blocks_*/mlp/fc1/kernel"] == [None, "tensor"]
    assert sharding.unsplit(mesh, state.params, model) == [
        f"blocks_*/attn/{name}/kernel is not split: mesh.tensor=2 does not divide 3 attention heads"
        for name in ("proj", "qkv")
    ]


def test_sizes_are_inferred():
    assert sharding.mesh_sizes(make_mesh_config(), 8) == (8, 1, 1)
    assert sharding.mesh_sizes(make_mesh_config(fsdp=4), 8) == (2, 4, 1)
    assert sharding.mesh_sizes(make_mesh_config(data=1, fsdp=-1, tensor=2), 8) == (1, 4, 2)
    assert sharding.mesh_sizes(make_mesh_config(2, 2, 2), 8) == (2, 2, 2)
    with pytest.raises(UserError, match=r"mesh.fsdp=3: must divide the number of devices, 8"):
        sharding.mesh_sizes(make_mesh_config(fsdp=3), 8)
    with pytest.raises(UserError, match=r"mesh.fsdp=-1: only one"):
        sharding.mesh_sizes(make_mesh_config(fsdp=-1), 8)
    with pytest.raises(UserError, match=r"mesh.slices=3: must divide mesh.data=8"):
        sharding.mesh_sizes(make_mesh_config(slices=3), 8)


def test_only_data_crosses_slices():
    """Devices of two slices, listed in turns; the mesh's inner axes must not mix them."""
    devices = [
        SimpleNamespace(id=i, slice_index=i % 2, platform="gpu", device_kind="x", process_index=0)
        for i in range(8)
    ]
    grid = sharding.device_grid(make_mesh_config(fsdp=2, tensor=2, slices=2), devices)
    assert grid.shape == (2, 2, 2)
    slices = np.vectorize(lambda d: d.slice_index)(grid)
    np.testing.assert_array_equal(slices, np.arange(2)[:, None, None] * np.ones((2, 2, 2)))
    with pytest.raises(UserError, match=r"mesh.slices=4: the devices are in 2 slice"):
        sharding.device_grid(make_mesh_config(slices=4), devices)
    for device in devices:
        device.platform = "tpu"
    with pytest.raises(UserError, match=r"set --config.mesh.slices=2"):
        sharding.device_grid(make_mesh_config(), devices)


def test_no_device_holds_more_than_its_share(tmp_path, monkeypatch):
    """Neither of the state nor of the teacher, however much of it could be split."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 256)
    config = make_tiny_config()
    config.model.width, config.model.num_heads = 32, 4
    config.mesh.fsdp = config.mesh.tensor = 2
    dataset = open_dataset(config.data)
    trainer = loop.Trainer(resolved(config, dataset), tmp_path, dataset, make_teacher())
    trainer.checkpointer.close()
    for tree, least in ((trainer.state, 40), (trainer.teacher_params, 4)):
        split = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            share = leaf.sharding.shard_shape(leaf.shape)
            assert {s.data.shape for s in leaf.addressable_shards} == {share}
            if leaf.size >= 256 and sharding.path_name(path).endswith("kernel"):
                assert np.prod(share) <= leaf.size // 2, path
            split += share != leaf.shape
        assert split >= least
    fc1 = trainer.state.params["blocks_0"]["mlp"]["fc1"]["kernel"]
    assert fc1.addressable_shards[0].data.shape == (16, 64)

    # The last picture's answers: of split heads, yet whole where each process reads them.
    seen, get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: seen.append(tree) or get(tree))
    size = trainer.evaluator.image_size
    answers = picture.answer(trainer, np.zeros((8, size, size, 3), np.uint8))
    assert set(answers) == {"teacher", "student"}
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(seen))


def test_the_batch_checks_count_what_splits_the_batch(tiny_config):
    tiny_config.mesh.tensor = 4
    tiny_config.batch_size = tiny_config.train.eval_batch_size = 2
    tiny_config.augment.repeats, tiny_config.mixing.group_size = 1, 2
    validate(tiny_config, num_devices=8)
    tiny_config.batch_size = 3
    with pytest.raises(UserError, match=r"batch_size=3.*mesh.data=2 x mesh.fsdp=1"):
        validate(tiny_config, num_devices=8)


def test_the_mesh_may_change_when_a_run_goes_on():
    assert {f"mesh.{name}" for name in base.get_config().mesh} <= set(schema.MAY_CHANGE)

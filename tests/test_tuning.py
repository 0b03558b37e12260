"""Freezing, layer decay and rates of single layers, against timm and torch."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deit_jax.errors import UserError
from deit_jax.models.registry import create_model
from deit_jax.parallel.sharding import path_name
from deit_jax.perf.step_time import random_batch
from deit_jax.step.tuning import Tuning, matches
from deit_jax.train.finetune import tuning_of
from deit_jax.train.memory import abstract_variables
from deit_jax.train.run import train
from deit_jax.weights.torch_names import from_torch
from deit_jax.workdir.saved_run import load_run
from tests import test_trajectory as trajectory
from tests.tiny import make_tiny_config, resolved

DISTILLED, PLAIN = "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"
NO_DECAY = ("cls_token", "pos_embed")
PATTERNS = [
    ("blocks_[0-5]", "blocks_3/attn/qkv/kernel", True),
    ("blocks_[0-5]/*", "blocks_3/attn/qkv/kernel", True),
    ("blocks_[0-5]", "blocks_10/attn/qkv/kernel", False),
    ("blocks_1*", "blocks_10/attn/qkv/kernel", True),
    ("*/norm1", "blocks_3/norm1/scale", True),
    ("head*", "head_dist/bias", True),
    ("head", "head_dist/bias", False),
    ("norm", "blocks_3/norm1/scale", False),
]


class Data:
    """As many classes and images as the tests' config finds."""

    classes = tuple("0123456789")
    train = range(180)


@pytest.mark.parametrize(("pattern", "path", "fits"), PATTERNS)
def test_patterns_fit_paths_and_their_beginnings(pattern, path, fits):
    assert matches(pattern, path) == fits


def paths_of(model, size=trajectory.SIZE):
    tree = abstract_variables(model, size)["params"]
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def numbered(reference, name):
    """Return {our path: the reference's name} of parameters: each is sent through as its number."""
    named = dict(reference.named_parameters())
    state = {n: np.full(p.shape, i, np.float32) for i, (n, p) in enumerate(named.items())}
    tree, names = from_torch(state, name, **trajectory.SHAPE)["params"], list(named)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): names[int(np.ravel(leaf)[0])] for path, leaf in leaves}


def layer_groups(reference, decay, weight_decay=0.0):
    from timm.optim import param_groups_layer_decay

    return param_groups_layer_decay(reference, weight_decay, NO_DECAY, layer_decay=decay)


@pytest.mark.parametrize("name", [PLAIN, DISTILLED])
def test_rates_of_layers_are_timms(name, timm):
    reference = trajectory.make_reference(name)
    groups = layer_groups(reference, 0.65)
    theirs = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    named = dict(reference.named_parameters())
    c = make_tiny_config()
    c.optim.layer_decay = 0.65
    model = create_model(name, trajectory.K, **trajectory.SHAPE)
    tuning = tuning_of(c.optim, c.init, name, model, trajectory.SIZE)
    assert len({tuning.rate(path) for path in paths_of(model)}) == 4  # stem, two blocks, heads
    names = numbered(reference, name)
    assert sorted(names) == sorted(paths_of(model))
    for path, theirs_name in names.items():
        assert tuning.rate(path) == pytest.approx(theirs[id(named[theirs_name])], rel=1e-12), path


def attention_only(reference):
    """Do what --attn-only does in main.py of facebookresearch/deit."""
    for name, parameter in reference.named_parameters():
        parameter.requires_grad = ".attn." in name
    for parameter in (*reference.head.parameters(), reference.pos_embed):
        parameter.requires_grad = True


def linear_probe(reference):
    for name, parameter in reference.named_parameters():
        parameter.requires_grad = name.startswith("head")


def frozen_parts(reference):
    for name, parameter in reference.named_parameters():
        parameter.requires_grad = not name.startswith(("blocks.0.", "patch_embed", "norm."))


def nothing(reference):
    pass


CASES = {
    "layer decay": (PLAIN, {"optim.layer_decay": 0.65}, nothing),
    "distilled, layer decay": (DISTILLED, {"optim.layer_decay": 0.75}, nothing),
    "attention only": (PLAIN, {"optim.tune": "attention_only"}, attention_only),
    "linear probe": (DISTILLED, {"optim.tune": "linear_probe"}, linear_probe),
    "freeze": (DISTILLED, {"optim.freeze": "blocks_0/*, patch_embed,norm"}, frozen_parts),
    "multipliers": (PLAIN, {"optim.lr_multipliers": "head*=10, blocks_1/mlp=0.5"}, nothing),
    "all, clipped": (
        PLAIN,
        {"optim.tune": "attention_only", "optim.layer_decay": 0.7, "optim.clip_norm": 0.5},
        attention_only,
    ),
}


def reference_groups(reference, c):
    """Return timm's groups of layer decay; with multipliers a group for each parameter."""
    groups = layer_groups(reference, c.optim.layer_decay, c.optim.weight_decay)
    if not c.optim.lr_multipliers:
        return groups
    names, single = {id(p): n for n, p in reference.named_parameters()}, []
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            scale = 10.0 if name.startswith("head") else 0.5 if "blocks.1.mlp" in name else 1.0
            single.append({**group, "params": [parameter], "lr_scale": scale})
    return single


def reference_optimizer(torch, reference, c):
    groups = reference_groups(reference, c)
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=(c.optim.b1, c.optim.b2), eps=c.optim.eps, foreach=False
    )
    if c.optim.clip_norm:
        moving = [p for p in reference.parameters() if p.requires_grad]

        def clip(*_):
            torch.nn.utils.clip_grad_norm_(moving, c.optim.clip_norm)

        optimizer.register_step_pre_hook(clip)
    return optimizer


@pytest.mark.parametrize("case", CASES)
def test_twenty_updates_are_torchs_with_timms_groups(case, timm, torch):
    name, changes, prepare = CASES[case]
    c = trajectory.make_config("hard" if name == DISTILLED else "none", "batchmean")
    c.update_from_flattened_dict(changes)
    reference, data = trajectory.make_reference(name), trajectory.make_data()
    prepare(reference)
    start = from_torch(trajectory.tensors(reference), name, **trajectory.SHAPE)["params"]
    optimizer = reference_optimizer(torch, reference, c)
    expected_losses = trajectory.run_reference(torch, reference, c, data, optimizer)
    expected = from_torch(trajectory.tensors(reference), name, **trajectory.SHAPE)["params"]
    losses, params = trajectory.run_ours(name, start, c, data)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    stay = {n for n, p in reference.named_parameters() if not p.requires_grad}
    for path, theirs_name in numbered(reference, name).items():
        same = np.array_equal(at(start, path), at(params, path))
        assert same == (theirs_name in stay), path
    for tree in (params, expected):
        trajectory.drop_key_biases(tree)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), params, expected
    )


def at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return np.asarray(tree)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def measured(experiment):
    """Return the bytes of the state, frozen parameters, and FLOPs and memory of the step."""
    state = experiment.abstract_state
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    frozen = count(state.params) - count(experiment.settings.tuning.moving(state.params))
    batch = random_batch(experiment)
    compiled = experiment.jit_step(None).lower(state, None, batch).compile()
    used = compiled.memory_analysis()
    return size, frozen, compiled.cost_analysis()["flops"], used.temp_size_in_bytes


@pytest.mark.eight_devices
@pytest.mark.parametrize("changes", [{"tune": "linear_probe"}, {"freeze": "blocks_0,patch_embed"}])
@pytest.mark.parametrize("ema", [0.0, pytest.param(0.9, marks=pytest.mark.slow)])
def test_what_is_frozen_takes_no_memory_and_no_time(changes, ema):
    c = make_tiny_config()
    c.distill.kind, c.optim.ema_decay = "none", ema
    whole = resolved(c, Data)
    for key, value in changes.items():
        c.optim[key] = value
    part = resolved(c, Data)
    (size, none, flops, temp), (less, frozen, fewer, smaller) = measured(whole), measured(part)
    assert none == 0 < frozen
    copies = 2 + bool(ema)  # Adam's two moments and the average, in float32
    assert size - less == copies * 4 * frozen
    assert whole.load.state_bytes - part.load.state_bytes == copies * 4 * frozen
    assert whole.load.gradient_bytes - part.load.gradient_bytes == 4 * frozen
    assert fewer < flops * (0.6 if "tune" in changes else 0.95)
    assert smaller < temp


REFUSED = [
    ({"optim.freeze": "blok_0"}, r"'blok_0' fits no parameter of .*nearest are .*blocks_0"),
    ({"optim.freeze": "*"}, r"nothing of .* is left to train"),
    ({"optim.tune": "linear_probe", "optim.freeze": "head*"}, "nothing of"),
    ({"optim.lr_multipliers": "haed=10"}, r"'haed' fits no parameter.*nearest are head"),
    ({"optim.lr_multipliers": "head"}, r"'head' is no PATTERN=NUMBER"),
    ({"optim.lr_multipliers": "head=0"}, r"'head=0' is no PATTERN=NUMBER"),
    ({"optim.lr_multipliers": "head=nan"}, r"'head=nan' is no PATTERN=NUMBER"),
    ({"optim.lr_multipliers": "norm=2", "optim.tune": "linear_probe"}, "only what is frozen"),
    ({"optim.freeze": "head", "init.head": "drop"}, "freezes head, which init.head=drop"),
    ({"optim.freeze": "head_dist", "init.head": "cls"}, "freezes head_dist, which init.head=cls"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_each_mistake_is_one_line(changes, message):
    c = make_tiny_config()
    c.update_from_flattened_dict(changes)
    model = create_model(DISTILLED, 10, **trajectory.SHAPE)
    with pytest.raises(UserError, match=message) as error:
        tuning_of(c.optim, c.init, DISTILLED, model, trajectory.SIZE)
    assert "\n" not in str(error.value)


def test_convnets_have_neither_blocks_nor_attention():
    c, name, model = make_tiny_config(), "regnety_002", create_model("regnety_002", 10)
    c.optim.layer_decay = 0.5
    with pytest.raises(UserError, match="no blocks of a transformer"):
        tuning_of(c.optim, c.init, name, model, 64)
    c.optim.layer_decay, c.optim.tune = 1.0, "attention_only"
    with pytest.raises(UserError, match="regnety_002 has no attn"):
        tuning_of(c.optim, c.init, name, model, 64)
    c.optim.tune = "linear_probe"
    tuning = tuning_of(c.optim, c.init, name, model, 64)
    assert {p for p in paths_of(model) if tuning.moves(p)} == {"head/fc/bias", "head/fc/kernel"}


def test_what_a_distillation_trains_besides_is_always_trained():
    tuning = Tuning(trained=("head",), frozen=("*",))
    assert tuning.moving({"head": {"a": 1}, "distill": {"w": 2}}) == {"distill": {"w": 2}}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Train with frozen blocks in parts over a mesh that splits weights, with LAMB and average."""
    workdir = tmp_path_factory.mktemp("tuned") / "whole"
    c = make_tiny_config()
    c.epochs, c.teacher.epochs = 1.0, 0.2
    c.mesh.fsdp, c.mesh.tensor, c.mesh.data = 2, 2, 2
    c.model.width, c.model.num_heads = 64, 2
    c.optim.accum_steps, c.optim.layer_decay = 2, 0.7
    c.optim.freeze, c.optim.lr_multipliers = "blocks_0,*_token", "head*=10"
    c.optim.name, c.optim.clip_norm = "lamb", 1.0
    c.train.save_every_epochs, c.train.keep_checkpoints = 0.2, 10
    return c, workdir, train(c, workdir)


@pytest.mark.eight_devices
def test_a_frozen_part_stays_to_the_bit_and_every_command_reads_the_run(tuned):
    c, workdir, results = tuned
    assert "ema" in results
    run = load_run(workdir)
    start = jax.device_get(resolved(c, Data).new_state().params)
    for path in paths_of(run.model, 16):
        frozen = path.startswith("blocks_0/") or path in ("cls_token", "dist_token")
        for tree in (run.variables, run.ema):
            assert np.array_equal(at(start, path), at(tree["params"], path)) == frozen, path
    heads = run.model.apply(
        jax.tree.map(jnp.asarray, run.ema), jnp.zeros((1, 16, 16, 3)), train=False
    )
    assert np.isfinite(heads.cls).all()


@pytest.mark.slow
@pytest.mark.eight_devices
def test_a_tuned_run_goes_on_to_the_same_bits(tuned, tmp_path):
    c, workdir, results = tuned
    copy = shutil.copytree(workdir, tmp_path / "copy")
    (copy / "results.json").unlink()
    for step in (3, 4, 5):
        shutil.rmtree(copy / "checkpoints" / str(step))
    assert train(c, copy) == results
    ours, theirs = load_run(copy), load_run(workdir)
    jax.tree.map(np.testing.assert_array_equal, ours.variables, theirs.variables)
    jax.tree.map(np.testing.assert_array_equal, ours.ema, theirs.ema)
    assert json.loads((copy / "config.json").read_text())["optim"]["freeze"] == c.optim.freeze


@pytest.mark.eight_devices
def test_parts_over_several_devices_make_the_gradient_of_the_whole():
    """Where the mesh splits only the batch, each device sums its own parts (shard_map)."""
    params = []
    for parts in (1, 2):
        c = make_tiny_config()
        c.distill.kind, c.optim.freeze, c.train.micro_batch = "none", "blocks_0", 4 // parts
        c.optim.name, c.optim.b1 = "sgd", 0.0  # Adam divides rounding by itself
        experiment = resolved(c, Data)
        assert experiment.settings.micro_batches == parts
        state = experiment.new_state()
        step, batch = experiment.jit_step(None), random_batch(experiment)
        for _ in range(2):
            state, _ = step(state, None, batch)
        params.append(jax.device_get(state.params))
    first = jax.device_get(experiment.new_state().params)
    assert same_tree(params[0]["blocks_0"], first["blocks_0"])
    assert not same_tree(params[0]["blocks_1"], first["blocks_1"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *params)


def same_tree(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.eight_devices
@pytest.mark.parametrize("allowed", [(), ("optim.freeze",)])
def test_what_is_trained_stays_a_runs_own(tuned, allowed):
    c, workdir, _ = tuned
    other, before = c.copy_and_resolve_references(), (workdir / "config.json").read_bytes()
    other.optim.freeze = "blocks_1"
    with pytest.raises(UserError, match=r"optim.freeze: .* -> blocks_1: .*--config.init.weights="):
        train(other, workdir, allowed=allowed)
    assert (workdir / "config.json").read_bytes() == before


@pytest.mark.eight_devices
def test_frozen_without_weights_to_start_from_is_said(tmp_path, caplog):
    c = make_tiny_config()
    c.distill.kind, c.epochs, c.optim.tune = "none", 0.2, "linear_probe"
    with caplog.at_level(logging.INFO, "deit_jax"):
        train(c, tmp_path)
    assert "stays as drawn" in caplog.text
    assert "of them trained" in caplog.text

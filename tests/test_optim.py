"""Schedule, mask and update against their formulas."""

import importlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deit_jax.config import files
from deit_jax.config.serialize import to_json
from deit_jax.configs import base, deit, deit_finetune384
from deit_jax.data.order import whole_steps
from deit_jax.errors import UserError
from deit_jax.step.optimizer import decay_mask, make_optimizer, make_schedule
from deit_jax.train.began import began_rising
from deit_jax.train.validate import check_schedule
from tests.tiny import make_tiny_config

STEPS = 10


def reference_lr(optim_config, epochs, t):
    """Return timm's CosineLRScheduler at epoch t (warmup_prefix=False), t any real number."""
    c = optim_config
    if t < c.warmup_epochs:
        return c.warmup_lr + t * (c.lr - c.warmup_lr) / c.warmup_epochs
    return c.min_lr + 0.5 * (c.lr - c.min_lr) * (1 + math.cos(math.pi * t / epochs))


def test_schedule_is_timms_cosine_at_every_step():
    c = base.get_config()
    schedule = make_schedule(c.optim, c.epochs, STEPS)
    for step in (0, 1, 25, 49, 50, 51, 1500, 2999):
        expected = reference_lr(c.optim, c.epochs, step / STEPS)
        np.testing.assert_allclose(schedule(jnp.int32(step)), expected, rtol=1e-5)


def test_schedule_agrees_with_timm_at_whole_epochs(timm):
    import torch
    from timm.scheduler import CosineLRScheduler

    c = base.get_config().optim
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=c.lr)
    theirs = CosineLRScheduler(
        opt, t_initial=300, lr_min=c.min_lr, warmup_lr_init=c.warmup_lr, warmup_t=5
    )
    schedule = make_schedule(c, 300.0, STEPS)
    for epoch in (0, 1, 4, 5, 6, 150, 299):
        theirs.step(epoch)
        expected = opt.param_groups[0]["lr"]
        np.testing.assert_allclose(schedule(jnp.int32(epoch * STEPS)), expected, rtol=1e-5)


def test_learning_rate_follows_the_batch_size():
    c = deit.get_config("variant=tiny")
    assert c.optim.lr == pytest.approx(1e-3)
    c.batch_size = 256
    assert c.optim.lr == pytest.approx(5e-4 * 256 / 512)
    c.optim.lr = 7e-4
    c.batch_size = 1024
    assert c.optim.lr == pytest.approx(7e-4)  # a rate set by hand stays


ARGUMENTS = {
    "deit": [f"variant={v},distilled={d}" for v in ("tiny", "base") for d in (False, True)],
    "deit3": [
        f"size={s},stage={t}"
        for s in ("small", "huge")
        for t in ("pretrain", "finetune224", "finetune384")
    ],
    "deit_finetune384": ["", "variant=tiny,distilled=False"],
    "deit_transfer": [f"dataset={d}" for d in ("cifar10", "inat18")],
    "teacher": [f"variant={v}" for v in ("002", "160")],
}


def shipped(name, argument):
    made = importlib.import_module(f"deit_jax.configs.{name}").get_config
    return made(argument) if name in ARGUMENTS else made()


@pytest.mark.parametrize("batch", [64, 256, 1024, 4096])
def test_every_shipped_schedule_falls_after_its_warm_up(batch):
    names = {name.split("/")[-1].removesuffix(".py") for name in files.shipped()}
    assert set(ARGUMENTS) < names
    for name in sorted(names):
        for argument in ARGUMENTS.get(name, [""]):
            c = shipped(name, argument)
            c.batch_size = batch
            check_schedule(c.optim, c.optim.lr)
            check_schedule(c.optim, c.teacher.lr, "teacher.lr")
            schedule = make_schedule(c.optim, c.epochs, STEPS)
            rates = np.asarray(jax.vmap(schedule)(jnp.arange(int(c.epochs * STEPS))))
            after = rates[math.ceil(c.optim.warmup_epochs * STEPS) :]
            assert (np.diff(after) <= 1e-6 * c.optim.lr).all(), (name, argument)
            assert rates.max() <= c.optim.lr * (1 + 1e-6), (name, argument)


def test_finetuning_at_384_is_the_references_at_its_batch():
    c = deit_finetune384.get_config("")
    assert (c.optim.lr, c.optim.min_lr, c.optim.warmup_lr) == (5e-6, 5e-6, 1e-6)


def test_a_rate_that_would_climb_is_refused_with_both_numbers():
    c = deit.get_config("variant=tiny")
    c.optim.lr = 5e-6
    with pytest.raises(UserError, match=r"optim.min_lr=1e-05: .*config.optim.lr=5e-06, .*may_rise"):
        check_schedule(c.optim, c.optim.lr)
    c.optim.min_lr, c.optim.warmup_lr = 0.0, 1e-5
    with pytest.raises(UserError, match=r"optim.warmup_lr=1e-05: .*config.optim.lr=5e-06"):
        check_schedule(c.optim, c.optim.lr)
    c.optim.warmup_epochs = 0.0  # then it is never used
    check_schedule(c.optim, c.optim.lr)
    c.optim.min_lr, c.optim.may_rise = 1.0, True
    check_schedule(c.optim, c.optim.lr)


def test_a_run_that_began_with_a_climbing_rate_goes_on_so(tmp_path):
    """Its config.json is of a version without the field, or says that it may."""
    assert not began_rising(tmp_path)
    old = to_json(make_tiny_config())
    del old["optim"]["may_rise"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert began_rising(tmp_path)
    old["optim"]["may_rise"] = False
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert not began_rising(tmp_path)


def params():
    rng = np.random.default_rng(0)
    return {
        "cls_token": rng.normal(size=(1, 1, 4)),
        "dist_token": rng.normal(size=(1, 1, 4)),
        "pos_embed": rng.normal(size=(1, 3, 4)),
        "head": {"kernel": rng.normal(size=(4, 2)), "bias": rng.normal(size=2)},
        "norm": {"scale": rng.normal(size=4), "bias": rng.normal(size=4)},
    }


def test_decay_mask_is_the_references():
    assert decay_mask(params()) == {
        "cls_token": False,
        "dist_token": True,  # deliberate in the reference: deit issues 48 and 60
        "pos_embed": False,
        "head": {"kernel": True, "bias": False},
        "norm": {"scale": False, "bias": False},
    }


def numpy_adamw(p, grads, lrs, decay, c):
    m = v = np.zeros_like(p)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        m = c.b1 * m + (1 - c.b1) * g
        v = c.b2 * v + (1 - c.b2) * g**2
        p = p * (1 - lr * (c.weight_decay if decay else 0))  # torch: decay first, decoupled
        p = p - lr * (m / (1 - c.b1**t)) / (np.sqrt(v / (1 - c.b2**t)) + c.eps)
    return p


def run(config, p, grads):
    schedule = make_schedule(config.optim, 2.0, STEPS)
    tx = make_optimizer(config.optim, schedule)
    p, grads = jax.tree.map(jnp.float32, (p, grads))
    state = tx.init(p)
    for g in grads:
        updates, state = tx.update(g, state, p)
        p = optax.apply_updates(p, updates)
    return p, [float(schedule(jnp.int32(i))) for i in range(len(grads))]


def test_adamw_is_torchs():
    c = base.get_config()
    c.optim.lr, c.optim.weight_decay, c.optim.warmup_epochs = 0.1, 0.3, 0.2
    p = params()
    rng = np.random.default_rng(1)
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape), p) for _ in range(4)]
    ours, lrs = run(c, p, grads)
    for path, decay in ((("cls_token",), False), (("head", "kernel"), True)):
        leaf, steps, end = p, grads, ours
        for key in path:
            leaf, steps, end = leaf[key], [g[key] for g in steps], end[key]
        np.testing.assert_allclose(
            end, numpy_adamw(leaf, steps, lrs, decay, c.optim), rtol=1e-4, atol=1e-6
        )


def test_sgd_is_torchs(torch):
    c = base.get_config()
    c.optim.name, c.optim.lr, c.optim.weight_decay = "sgd", 0.1, 0.3
    p = {"kernel": params()["head"]["kernel"]}
    rng = np.random.default_rng(1)
    grads = [{"kernel": rng.normal(size=(4, 2))} for _ in range(4)]
    ours, lrs = run(c, p, grads)
    theirs = torch.nn.Parameter(torch.tensor(p["kernel"]))
    opt = torch.optim.SGD([theirs], lr=1.0, momentum=0.9, weight_decay=0.3)
    for g, lr in zip(grads, lrs, strict=True):
        opt.param_groups[0]["lr"] = lr
        theirs.grad = torch.tensor(g["kernel"])
        opt.step()
    np.testing.assert_allclose(ours["kernel"], theirs.detach().numpy(), rtol=1e-5)


def test_clipping_bounds_the_global_norm():
    c = base.get_config()
    c.optim.name, c.optim.clip_norm, c.optim.weight_decay, c.optim.b1 = "sgd", 1.0, 0.0, 0.0
    c.optim.warmup_epochs, c.optim.lr = 0.0, 1.0
    p = {"a": np.zeros(3), "b": np.zeros(4)}
    ours, lrs = run(c, p, [{"a": np.full(3, 6.0), "b": np.full(4, 8.0)}])
    norm = np.sqrt(sum((np.asarray(x) ** 2).sum() for x in ours.values()))
    assert norm == pytest.approx(lrs[0], rel=1e-5)


@pytest.mark.parametrize(("epochs", "steps"), [(2.0, 20), (0.25, 3), (0.001, 1)])
def test_whole_steps(epochs, steps):
    assert whole_steps(epochs, STEPS) == steps


def test_lamb_is_timms(timm, torch):
    from timm.optim import Lamb

    c = base.get_config()
    c.optim.name, c.optim.lr, c.optim.weight_decay, c.optim.clip_norm = "lamb", 0.1, 0.3, 1.0
    p = params()
    rng = np.random.default_rng(1)
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape), p) for _ in range(4)]
    ours, lrs = run(c, p, grads)
    theirs = jax.tree.map(lambda x: torch.nn.Parameter(torch.tensor(x, dtype=torch.float32)), p)
    decayed = jax.tree.leaves(decay_mask(p))
    groups = [
        {
            "params": [x for x, d in zip(jax.tree.leaves(theirs), decayed, strict=True) if d == on],
            "weight_decay": 0.3 * on,
        }
        for on in (True, False)
    ]
    opt = Lamb(groups, lr=0.1, eps=c.optim.eps, max_grad_norm=1.0)
    for g, lr in zip(grads, lrs, strict=True):
        for group in opt.param_groups:
            group["lr"] = lr
        for x, value in zip(jax.tree.leaves(theirs), jax.tree.leaves(g), strict=True):
            x.grad = torch.tensor(value, dtype=torch.float32)
        opt.step()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-4, atol=1e-5)

"""Losses against scipy's formulas and, where it is installed, PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.special import log_softmax, rel_entr, softmax

from deit_jax.configs import base
from deit_jax.models.heads import Heads
from deit_jax.step import losses
from deit_jax.step.distill import hard, soft
from deit_jax.step.objective import objective

RNG = np.random.default_rng(0)
B, K = 6, 11
LOGITS, OTHER, TEACHER = RNG.normal(0, 3, (3, B, K)).astype(np.float32)
LABELS = RNG.integers(0, K, B).astype(np.int32)
TARGETS = softmax(RNG.normal(0, 2, (B, K)), axis=1).astype(np.float32)


def ours(function, *arrays, **kwargs):
    return function(*(jnp.asarray(a) for a in arrays), **kwargs)


def numpy_cross_entropy(logits, targets):
    return -(targets * log_softmax(logits.astype(np.float64), axis=1)).sum(1).mean()


def numpy_soft(logits, teacher, tau):
    p, q = (softmax(x.astype(np.float64) / tau, axis=1) for x in (teacher, logits))
    return rel_entr(p, q).sum() * tau**2


def test_smooth_one_hot_gives_the_references_on_and_off_values():
    smoothed = np.array(losses.smooth_one_hot(jnp.array(LABELS), K, 0.1))
    off, on = 0.1 / K, 0.9 + 0.1 / K  # timm's mixup.one_hot
    expected = np.full((B, K), off)
    expected[np.arange(B), LABELS] = on
    np.testing.assert_allclose(smoothed, expected, rtol=1e-6)


def test_cross_entropy():
    np.testing.assert_allclose(
        ours(losses.cross_entropy, LOGITS, TARGETS), numpy_cross_entropy(LOGITS, TARGETS), rtol=1e-6
    )


def test_hard_distillation_is_cross_entropy_with_unsmoothed_labels():
    one_hot = np.eye(K)[LABELS]
    np.testing.assert_allclose(
        ours(hard.hard_distillation, LOGITS, LABELS),
        numpy_cross_entropy(LOGITS, one_hot),
        rtol=1e-6,
    )


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation_has_both_reductions(tau):
    total = numpy_soft(LOGITS, TEACHER, tau)
    for reduction, divisor in (("batchmean", B), ("numel", B * K)):
        np.testing.assert_allclose(
            ours(soft.soft_distillation, LOGITS, TEACHER, tau=tau, reduction=reduction),
            total / divisor,
            rtol=2e-5,
        )


@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
@pytest.mark.parametrize("dist_head", [True, False])
def test_distillation_combines_the_terms_through_the_right_head(kind, dist_head):
    distill = base.get_config().distill
    distill.update({"kind": kind, "alpha": 0.3, "tau": 2.0})
    heads = Heads(jnp.array(LOGITS), jnp.array(OTHER) if dist_head else None)
    signal = {"none": None, "soft": jnp.array(TEACHER), "hard": jnp.array(TEACHER.argmax(1))}[kind]
    loss, terms = objective(heads, jnp.array(TARGETS), signal, distill)

    own = numpy_cross_entropy(LOGITS, TARGETS)
    student = OTHER if dist_head else LOGITS
    teacher_term = {
        "soft": numpy_soft(student, TEACHER, 2.0) / B,
        "hard": numpy_cross_entropy(student, np.eye(K)[TEACHER.argmax(1)]),
    }
    if kind == "none":
        np.testing.assert_allclose(loss, own, rtol=1e-6)
        assert set(terms) == {"loss_label"}
    else:
        np.testing.assert_allclose(loss, 0.7 * own + 0.3 * teacher_term[kind], rtol=2e-5)
        np.testing.assert_allclose(terms["loss_teacher"], teacher_term[kind], rtol=2e-5)


def test_both_heads_learn_the_labels_where_asked_and_without_a_teacher():
    heads, none = Heads(jnp.array(LOGITS), jnp.array(OTHER)), ConfigDict({"kind": "none"})
    loss, terms = objective(heads, jnp.array(TARGETS), None, none, label_heads="both")
    two = [numpy_cross_entropy(x, TARGETS) for x in (LOGITS, OTHER)]
    np.testing.assert_allclose(loss, np.mean(two), rtol=1e-6)
    assert set(terms) == {"loss_label"}


def test_losses_agree_with_pytorch(torch):
    functional = torch.nn.functional
    logits, teacher = torch.tensor(LOGITS), torch.tensor(TEACHER)
    np.testing.assert_allclose(
        ours(hard.hard_distillation, LOGITS, TEACHER.argmax(1)),
        functional.cross_entropy(logits, teacher.argmax(1)).item(),
        rtol=1e-5,
    )
    kl = functional.kl_div(
        (logits / 3).log_softmax(1), (teacher / 3).log_softmax(1), reduction="sum", log_target=True
    )
    for reduction, divisor in (("batchmean", B), ("numel", logits.numel())):
        np.testing.assert_allclose(
            ours(soft.soft_distillation, LOGITS, TEACHER, tau=3.0, reduction=reduction),
            kl.item() * 9 / divisor,
            rtol=1e-5,
        )


def test_fused_is_the_mean_of_the_logits():
    fused = Heads(jnp.array(LOGITS), jnp.array(OTHER)).fused()
    np.testing.assert_allclose(fused, (LOGITS + OTHER) / 2, rtol=1e-6)
    np.testing.assert_array_equal(Heads(jnp.array(LOGITS)).fused(), LOGITS)


def test_binary_cross_entropy_is_deit3s(torch):
    targets = np.where(RNG.random((B, K)) < 0.3, RNG.random((B, K)), 0.0).astype(np.float32)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(LOGITS), torch.tensor(targets).gt(0.0).float()
    )
    got = ours(losses.binary_cross_entropy, LOGITS, targets)
    np.testing.assert_allclose(got, expected.item(), rtol=1e-5)

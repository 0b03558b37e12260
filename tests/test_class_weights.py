"""loss.class_weights against PyTorch and scikit-learn, and what is no weight of each class."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.utils.class_weight import compute_class_weight

from deit_jax.configs import base
from deit_jax.data.class_weights import class_weights
from deit_jax.data.sources.base import ArraySource, Dataset
from deit_jax.errors import UserError
from deit_jax.models.heads import Heads
from deit_jax.step.losses import LABEL_LOSSES
from deit_jax.step.mixup import mix
from deit_jax.step.objective import objective
from deit_jax.train.experiment import prepare, sketch
from deit_jax.train.run import uneven
from deit_jax.train.teacher_spec import teacher_config
from deit_jax.workdir import held_out

B, K = 16, 5
RNG = np.random.default_rng(3)
LOGITS = RNG.normal(size=(B, K)).astype(np.float32)
OTHER = RNG.normal(size=(B, K)).astype(np.float32)
WEIGHTS = (0.5, 2.0, 0.0, 1.0, 3.5)
NONE = ConfigDict({"kind": "none"})


def mixed(smoothing):
    """Return targets as the step makes them: smoothed, then mixed."""
    mixing = base.get_config().mixing
    mixing.group_size = 4
    labels, images = jnp.array(RNG.integers(0, K, B)), jnp.zeros((B, 8, 8, 3))
    return np.array(mix(jax.random.key(1), images, labels, K, smoothing, mixing)[1])


def theirs(torch, kind, logits, targets):
    """Return PyTorch's loss and its gradient."""
    x, weight = torch.tensor(logits, requires_grad=True), torch.tensor(WEIGHTS)
    y = torch.tensor(targets)
    if kind == "softmax":
        loss = torch.nn.CrossEntropyLoss(weight=weight)(x, y)
    else:
        loss = torch.nn.BCEWithLogitsLoss(weight=weight)(x, y.gt(0.0).type(y.dtype))
    loss.backward()
    return loss.item(), x.grad.numpy()


@pytest.mark.parametrize(
    ("kind", "smoothing"), [("softmax", 0.1), ("softmax", 0.0), ("binary", 0.0)]
)
def test_weighted_losses_are_torchs(torch, kind, smoothing):
    targets = mixed(smoothing)

    def ours(logits):
        return objective(
            Heads(logits), jnp.array(targets), None, NONE, kind, class_weights=WEIGHTS
        )[0]

    loss, gradient = jax.value_and_grad(ours)(jnp.array(LOGITS))
    expected, slope = theirs(torch, kind, LOGITS, targets)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["softmax", "binary"])
def test_both_heads_are_weighted(torch, kind):
    targets = mixed(0.0)
    heads = Heads(jnp.array(LOGITS), jnp.array(OTHER))
    given = (heads, jnp.array(targets), None, NONE, kind, "both")
    loss = objective(*given, class_weights=WEIGHTS)[0]
    expected = [theirs(torch, kind, logits, targets)[0] for logits in (LOGITS, OTHER)]
    np.testing.assert_allclose(loss, np.mean(expected), rtol=2e-6)


def test_the_teachers_term_is_not_weighted():
    distill = base.get_config().distill
    distill.kind = "hard"
    heads = Heads(jnp.array(LOGITS), jnp.array(OTHER))
    given = (heads, jnp.array(mixed(0.1)), jnp.argmax(jnp.array(OTHER), -1), distill)
    plain, weighted = objective(*given)[1], objective(*given, class_weights=WEIGHTS)[1]
    assert plain["loss_teacher"] == weighted["loss_teacher"]
    assert plain["loss_label"] != weighted["loss_label"]


@pytest.mark.parametrize("kind", LABEL_LOSSES)
def test_weights_of_one_change_nothing(kind):
    targets = jnp.array(mixed(0.0))
    loss, logits = LABEL_LOSSES[kind], jnp.array(LOGITS)
    np.testing.assert_allclose(loss(logits, targets, jnp.ones(K)), loss(logits, targets), rtol=1e-6)


def unequal(labels=(0, 0, 0, 1, 2, 2), names=("ant", "bee", "cat")):
    source = ArraySource("unequal", np.zeros((len(labels), 2, 2), np.uint8), np.array(labels))
    return Dataset(source, source, list(names))


def test_balanced_is_scikit_learns():
    labels = RNG.permutation(np.repeat(np.arange(4), (3, 50, 7, 1)))
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(class_weights("balanced", unequal(labels, "abcd")), expected)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w.json", '{"cat": 3, "ant": 1, "bee": 0.5}'),
        ("w.csv", "class,weight\ncat,3\nbee,0.5\nant,1\n"),
        ("w.csv", "cat,3\nbee,0.5\n\nant,1"),
    ],
)
def test_files_are_read_by_the_classes_names(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert class_weights(str(tmp_path / name), unequal()) == (1.0, 0.5, 3.0)


def test_numbers_are_in_the_order_of_the_classes():
    assert class_weights("1,0.5,3", unequal()) == (1.0, 0.5, 3.0)
    assert class_weights("", unequal()) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2", "2 weights for 3 classes"),
        ("1,-2,1", "class bee has -2.0"),
        ("1,nan,1", "class bee has nan"),
        ("1,inf,1", "class bee has inf"),
        ("0,0,0", "all weights are 0"),
        ("balance", "neither balanced, nor numbers, nor a file"),
        ({"ant": 1, "bee": 1}, "no weight of class cat"),
        ({"ant": 1, "bee": 1, "cat": 1, "dog": 1}, "no class of the data: dog; there are ant, bee"),
        ({"ant": 1, "bee": 1, "cat": True}, "the weight of cat is True"),
        ([1, 2, 3], "it must be {name: weight}"),
        ('{"ant": 1, "bee": 1, "cat": 1, "cat": 2}', "class cat stands there twice"),
    ],
)
def test_what_is_no_weight_of_each_class_is_one_line(tmp_path, text, message):
    if not isinstance(text, str) or text.startswith("{"):
        content = text if isinstance(text, str) else json.dumps(text)
        (tmp_path / "w.json").write_text(content)
        text = str(tmp_path / "w.json")
    with pytest.raises(UserError) as error:
        class_weights(text, unequal())
    assert message in str(error.value)
    assert str(error.value).startswith(f"config.loss.class_weights={text}: ")
    assert "\n" not in str(error.value)


def test_a_class_without_images_has_no_balanced_weight():
    with pytest.raises(UserError, match="no training images of class bee"):
        class_weights("balanced", unequal((0, 2, 2)))


def test_balanced_twice_is_refused(tiny_config):
    tiny_config.data.balance, tiny_config.loss.class_weights = "equal", "balanced"
    with pytest.raises(UserError, match=r"loss.class_weights='balanced': data.balance=equal meets"):
        prepare(tiny_config)


def test_micro_batches_sum_to_the_weighted_gradient(tiny_config):
    """Mean over N, as torch has it: parts of equal size average to the whole."""
    c = tiny_config
    c.distill.kind, c.loss.class_weights = "none", "1,2,3,4,5,6,7,8,9,10"
    c.model.drop_path = 0.0
    losses = []
    for accum in (1, 2):
        c.optim.accum_steps = accum
        experiment, dataset = prepare(c)
        assert experiment.settings.class_weights == tuple(range(1, 11))
        batch = experiment.on_devices(experiment.batches(dataset)(0))
        losses.append(experiment.jit_step(None)(experiment.new_state(), None, batch)[1])
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(losses[0][key], losses[1][key], rtol=1e-5)


def test_a_teacher_learns_with_weights_too_and_a_plan_knows_of_them(tiny_config):
    tiny_config.loss.class_weights = "balanced"
    experiment, dataset = prepare(tiny_config)
    own = prepare(teacher_config(tiny_config))[0].settings.class_weights
    assert own == experiment.settings.class_weights == class_weights("balanced", dataset)
    assert sketch(tiny_config, lambda: (10, 180)).settings.class_weights == (1.0,) * 10


def test_a_run_notes_its_weights_and_is_told_of_others(tmp_path):
    assert held_out.note(tmp_path, unequal(), (1.0, 2.0, 3.0)) == []
    assert held_out.note(tmp_path, unequal(), (1.0, 2.0, 3.0)) == []
    assert held_out.note(tmp_path, unequal(), (1.0, 2.5, 3.0)) == [
        "other weights of classes than this run began with: bee: 2 then, 2.5 now"
    ]


def test_a_run_says_how_its_classes_are_met_and_weighed(tiny_config):
    tiny_config.data.balance, tiny_config.loss.class_weights = "equal", "3,1,1,1,1,1,1,1,1,0.5"
    experiment, dataset = prepare(tiny_config)
    met, weighed = uneven(experiment, dataset)
    assert met == "data.balance=equal: the first epoch meets 5 (1) to 6 (0) images of a class"
    assert weighed == "loss.class_weights: 0.5 (9) to 3 (0)"

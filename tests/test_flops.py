"""Operations counted from the program, against timm's published numbers and PyTorch's counter."""

import jax
import jax.numpy as jnp
import pytest

from deit_jax.configs import deit
from deit_jax.models import operations, registry
from deit_jax.perf import flops
from deit_jax.train.experiment import resolve


def gmacs(name):
    spec = registry.get_spec(name)
    return flops.forward_flops(registry.create_model(name), spec.image_size) / 2e9


@pytest.mark.parametrize(
    ("name", "published"),
    [  # timm's results/model_metadata-in1k.csv
        ("deit_tiny_patch16_224", 1.26),
        ("deit_small_patch16_224", 4.61),
        ("deit_base_patch16_224", 17.58),
        ("deit_base_distilled_patch16_224", 17.68),
        ("deit_base_patch16_384", 55.54),
        ("deit3_medium_patch16_224", 8.00),
        ("deit3_large_patch16_224", 61.60),
        ("deit3_huge_patch14_224", 167.40),
        ("regnety_002", 0.20),
        ("regnety_160", 15.96),
    ],
)
def test_a_model_has_timms_published_gmacs(name, published):
    assert gmacs(name) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("name", "timms"),
    [
        ("deit_tiny_distilled_patch16_224", "deit_tiny_distilled_patch16_224"),
        ("deit3_small_patch16_224", "deit3_small_patch16_224"),
        ("regnety_004", "regnety_004"),
        ("efficientnet_lite0", "tf_efficientnet_lite0"),
        ("efficientnet_lite2", "tf_efficientnet_lite2"),
    ],
)
def test_pytorch_counts_the_same_products_in_timms_model(torch, timm, name, timms):
    from torch.utils.flop_counter import FlopCounterMode

    size = registry.get_spec(name).image_size
    model = timm.create_model(timms).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # a kernel that the counter does not know
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    assert 2e9 * gmacs(name) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def per_image(config):
    return flops.flops_per_image(resolve(config, 1000, 10_000))


def test_a_training_example_is_three_passes_and_the_teachers_one():
    plain = per_image(deit.get_config("variant=tiny,distilled=True,kind=none"))
    assert plain == pytest.approx(6e9 * gmacs("deit_tiny_distilled_patch16_224"))
    config = deit.get_config("variant=tiny,distilled=True")
    assert per_image(config) - plain == pytest.approx(2e9 * gmacs("regnety_160"))
    config.teacher.tape = "replay"
    assert per_image(config) == plain


def count(function, *arguments):
    return operations.multiply_accumulates(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_loops_count_as_often_as_they_run_and_of_branches_the_dearest():
    x = jnp.ones((4, 4))
    assert count(lambda x: x @ x, x) == 64
    assert count(jax.jit(jax.checkpoint(lambda x: x @ x)), x) == 64
    assert count(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0], x) == 320
    branches = (lambda x: x @ x @ x, lambda x: x @ x, lambda x: x)
    assert count(lambda x: jax.lax.switch(x[0, 0].astype(int), branches, x), x) == 128

    def chosen(x):
        return jax.lax.platform_dependent(x, cpu=jnp.sin, default=lambda x: x @ x)

    assert count(chosen, x) == 64

    def convolve(images, kernel):
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=3,
        )

    assert count(convolve, jnp.ones((1, 8, 8, 6)), jnp.ones((3, 3, 2, 9))) == 8 * 8 * 9 * 3 * 3 * 2

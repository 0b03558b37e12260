"""Teacher folders: a JAX function comes back as it was, and damage is refused in a line."""

import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from deit_jax import Teacher, write_teacher
from deit_jax.errors import UserError
from deit_jax.teachers import folder
from deit_jax.teachers.folder import is_folder, open_folder
from deit_jax.teachers.open import in_dtype
from deit_jax.teachers.programs import answer

RNG = np.random.default_rng(0)
PARAMS = {
    "stem": {"kernel": RNG.normal(size=(3, 3, 3, 5)).astype("f4")},
    "head": [RNG.normal(size=(5, 4)).astype("f4"), np.float64(0.5)],
    "order": np.array([2, 0, 1, 3]),
}
IMAGES = RNG.normal(size=(6, 8, 10, 3)).astype("f4")
CLASSES = ("red", "green", "blue", "grey")


def apply(params, images):
    kernel = params["stem"]["kernel"]
    y = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    features = jax.nn.relu(y).mean((1, 2))
    weight, bias = params["head"]
    return {"logits": (features @ weight + bias)[:, params["order"]], "features": features}


def by_numpy(images):
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(1, 2))
    y = np.einsum("bhwcij,ijcd->bhwd", windows, PARAMS["stem"]["kernel"])
    features = np.maximum(y, 0).mean((1, 2))
    return (features @ PARAMS["head"][0] + 0.5)[:, [2, 0, 1, 3]], features


def teacher(**changes):
    known = {"apply": apply, "params": PARAMS, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return Teacher(**known | {"classes": CLASSES, "image_size": (8, 10), "name": "toy"} | changes)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "toy"
    write_teacher(teacher(), path, crop_ratio=0.9)
    return path


def test_a_function_comes_back_with_its_answers(written):
    assert is_folder(written)
    assert not is_folder(written.parent)
    opened = open_folder(written, "float32")
    said = jax.jit(opened.apply)(opened.params, IMAGES)
    logits, features = by_numpy(IMAGES)
    np.testing.assert_allclose(said["logits"], logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(said["features"], features, rtol=1e-5, atol=1e-5)
    assert (opened.classes, opened.image_size, opened.name) == (CLASSES, (8, 10), "toy")
    assert (opened.mean, opened.std, opened.multi_label) == ((0.5,) * 3, (0.25,) * 3, None)
    described = json.loads((written / "teacher.json").read_text())
    assert (described["features"], described["crop_ratio"]) == (5, 0.9)
    assert described["versions"]["jax"] == jax.__version__


def test_bfloat16_computes_in_it_and_answers_in_float32(written):
    opened = open_folder(written, "bfloat16")
    kinds = {x.dtype.name for x in opened.params.values()}
    assert kinds == {"bfloat16", "int32"}
    said = jax.jit(opened.apply)(opened.params, IMAGES.astype(jnp.bfloat16))
    assert {x.dtype.name for x in said.values()} == {"float32"}
    np.testing.assert_allclose(said["logits"], by_numpy(IMAGES)[0], atol=0.1)
    assert not (np.asarray(said["logits"]) == by_numpy(IMAGES)[0]).all()


def test_a_function_computes_in_bfloat16_as_its_folder_does(written):
    half = in_dtype(teacher(), "bfloat16")
    folder = open_folder(written, "bfloat16")
    own, its = (answer(x.apply(x.params, jnp.array(IMAGES))) for x in (half, folder))
    np.testing.assert_array_equal(own["features"], its["features"])


def test_shapes_come_from_the_header_alone(written):
    whole = open_folder(written, "bfloat16")
    file = written / "weights.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[:header])  # the numbers are gone
    opened = open_folder(written, "bfloat16", abstract=True)
    shapes = {k: (x.shape, x.dtype) for k, x in opened.params.items()}
    assert shapes == {k: (x.shape, x.dtype) for k, x in whole.params.items()}
    said = jax.eval_shape(opened.apply, opened.params, jax.ShapeDtypeStruct((7, 8, 10, 3), "f4"))
    assert said["logits"].shape == (7, 4)
    with pytest.raises(UserError, match=r"weights\.safetensors is damaged"):
        open_folder(written, "bfloat16")


@pytest.mark.eight_devices
def test_eight_devices_answer_as_one_in_parts_too(written):
    opened = open_folder(written, "float32")
    images = RNG.normal(size=(32, 8, 10, 3)).astype("f4")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    shared = jax.device_put(images, jax.sharding.NamedSharding(mesh, spec("data")))
    params = jax.device_put(opened.params, jax.sharding.NamedSharding(mesh, spec()))

    def in_parts(params, x):
        parts = x.reshape(8, 2, 2, *x.shape[1:]).swapaxes(0, 1).reshape(2, 16, *x.shape[1:])
        out = jax.lax.map(lambda part: opened.apply(params, part)["logits"], parts)
        return out.reshape(2, 8, 2, 4).swapaxes(0, 1).reshape(32, 4)

    compiled = jax.jit(in_parts).lower(params, shared).compile()
    np.testing.assert_allclose(compiled(params, shared), by_numpy(images)[0], atol=1e-4)


def test_any_size_and_one_output(tmp_path):
    def mean(params, images):
        return images.mean((1, 2)) @ params

    write_teacher(
        teacher(apply=mean, params=np.eye(3), classes=(), image_size=None), tmp_path / "t"
    )
    opened = open_folder(tmp_path / "t", "float32")
    assert opened.classes == ("class 0", "class 1", "class 2")
    said = opened.apply(opened.params, IMAGES[:, :5])
    assert set(said) == {"logits"}
    np.testing.assert_allclose(said["logits"], IMAGES[:, :5].mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("std", (1.0, 0.0, 1.0)),
        ("mean", (float("nan"), 0.0, 0.0)),
        ("mean", (0.5,)),
        ("also_called", ("one",)),
        ("channels", 4),
    ],
)
def test_conventions_that_make_no_sense_are_not_written(key, value, tmp_path):
    with pytest.raises(UserError, match=f"^toy: .*{key}|apply.*fails for images"):
        write_teacher(teacher(**{key: value}), tmp_path / "t")
    assert not list(tmp_path.iterdir())


def features_alone(params, images):
    return {"features": images.mean((1, 2))}


def test_features_alone_have_no_classes(tmp_path):
    write_teacher(teacher(apply=features_alone, classes=()), tmp_path / "t")
    opened = open_folder(tmp_path / "t", "bfloat16")
    assert opened.classes == ()
    assert set(opened.apply(opened.params, IMAGES)) == {"features"}
    with pytest.raises(UserError, match="no logits for its 4 classes"):
        write_teacher(teacher(apply=features_alone), tmp_path / "u")


REFUSED = {
    "tuple": (lambda p, x: (x.mean((1, 2)), x), "returns a tuple of 2, not logits"),
    "rank": (lambda p, x: x, r"returns float32\[2 8 10 3\], not logits"),
    "keys": (lambda p, x: {"out": x.mean((1, 2))}, r"returns \{'out': float32\[2 3\]\}"),
    "whole": (lambda p, x: jnp.zeros((len(x), 4), int), r"returns int32\[2 4\], not"),
    "batch": (lambda p, x: jnp.zeros((3, 4)), r"returns float32\[3 4\], not"),
    "count": (lambda p, x: x.mean((1, 2)), "3 logits, and `classes` has 4 names"),
    "numpy": (lambda p, x: np.asarray(x), "apply.* fails for images .*2 8 10 3"),
    "raises": (lambda p, x: 1 / 0, "ZeroDivisionError|division by zero"),
    "fixed": (lambda p, x: x.reshape(2, -1)[:, :4], "for any number of images .*one an image"),
    "nan": (lambda p, x: x.mean((1, 2))[:, :1] * jnp.full(4, jnp.nan), "are not finite"),
    "mixed": (lambda p, x: x[:, 0, :1, 0] - x.mean() + jnp.arange(4.0), "depend on the other"),
    "branch": (lambda p, x: x[:, 0, 0] if x.sum() > 0 else x, "function that JAX can trace"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_teacher_is_refused_before_anything_is_written(name, tmp_path):
    function, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as error:
        write_teacher(teacher(apply=function), tmp_path / "t")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def refused(path, message):
    with pytest.raises(UserError, match=message) as error:
        open_folder(path, "float32")
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["weights.safetensors", "program_float32.bin"])
def test_a_flipped_bit_is_seen(written, name):
    data = bytearray((written / name).read_bytes())
    data[len(data) // 2] ^= 4
    (written / name).write_bytes(data)
    refused(written, f"{re.escape(name)} is damaged.*convert")


def sealed(said):
    """Return a description with the checksum of what it says."""
    said = {key: value for key, value in said.items() if key != "sha256_of_this"}
    whole = json.dumps(said, sort_keys=True).encode()
    return json.dumps(said | {"sha256_of_this": hashlib.sha256(whole).hexdigest()})


def test_a_damaged_or_foreign_description_is_refused(written):
    file = written / "teacher.json"
    text = file.read_text()
    file.write_text(text[:-30])
    refused(written, "cannot be read")
    file.write_text(text.replace('"format": 1', '"format": 2'))
    refused(written, "format 2, and this version reads format 1; install")
    file.write_text("{}")
    refused(written, "does not say its format")
    file.write_text(text.replace('"red"', '"rod"'))
    refused(written, "is not as it was written; .*convert")
    for key, value in {"channels": 4, "std": [1, 0, 1], "image_size": -1, "sha256": None}.items():
        file.write_text(sealed(json.loads(text) | {key: value}))
        refused(written, key if key != "channels" else "not of 4 channels")
    file.write_text(sealed({k: v for k, v in json.loads(text).items() if k != "mean"}))
    refused(written, "mean=None is not what it must be")


def test_a_missing_file_or_folder_is_named(written, tmp_path):
    (written / "program_float32.bin").unlink()
    refused(written, r"program_float32\.bin: cannot be read \(No such file")
    (written / "teacher.json").unlink()
    assert is_folder(written)
    refused(written, "holds no teacher.json")
    refused(tmp_path / "nothing", "no teacher folder")


def test_a_program_of_a_newer_jax_is_refused(written, monkeypatch):
    def newer(blob):
        raise ValueError("calling convention version 99 is not supported\nby this")

    monkeypatch.setattr(export, "deserialize", newer)
    refused(written, "cannot read this program, which JAX .* wrote .*version 99.*install")


def test_weights_of_another_program_are_refused(written, tmp_path):
    write_teacher(teacher(params=PARAMS | {"more": np.zeros(2)}), tmp_path / "other")
    name = "weights.safetensors"
    (written / name).write_bytes((tmp_path / "other" / name).read_bytes())
    said = json.loads((written / "teacher.json").read_text())
    other = json.loads((tmp_path / "other" / "teacher.json").read_text())
    said["sha256"][name] = other["sha256"][name]
    (written / "teacher.json").write_text(sealed(said))
    refused(written, r"its weights are not those of its program \(more\)")


def test_writing_is_whole_or_not_at_all(written, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="exists"):
        write_teacher(teacher(), written)
    (tmp_path / "full").mkdir()
    with pytest.raises(UserError, match="no teacher folder, and is not overwritten"):
        write_teacher(teacher(), tmp_path / "full", force=True)
    before = (written / "teacher.json").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_json", full)
        with pytest.raises(UserError, match="No space left"):
            write_teacher(teacher(name="new"), written, force=True)
    assert (written / "teacher.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "toy"]
    write_teacher(teacher(name="new"), written, force=True)
    assert open_folder(written, "float32").name == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "toy"]

"""`deit export`: other runtimes answer as the model does, and know what it is and what it takes."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import export as jax_export
from PIL import Image

from deit_jax import __main__
from deit_jax.data.decode import Reading
from deit_jax.errors import UserError
from deit_jax.export import pixels, verify, write
from deit_jax.export.choices import DTYPES, Options
from deit_jax.export.flatten import flattened
from deit_jax.export.program import program_of
from deit_jax.models import kernels
from deit_jax.storage.local import LocalDisk
from tests.test_convert import DISTILLED, FAMILIES, PLAIN, SMALL, opened

CLASSES = ("cat", "dog", "owl")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def of(name, overrides, **fields):
    weights = opened(name, overrides)
    return dataclasses.replace(weights, mean=MEAN, std=STD, **fields)


def noise(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def normalised(images):
    """Return what models take, by the formula in docs/export.md."""
    return ((images / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32)


def heads(weights, images):
    """Return the model's own answers, by JAX alone."""
    said = jax.jit(functools.partial(weights.model.apply, train=False))(weights.variables, images)
    return {k: np.asarray(x) for k, x in said._asdict().items() if x is not None}


def close(a, b):
    return np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images}), strict=True))


@pytest.mark.parametrize(("name", "overrides"), FAMILIES, ids=[n for n, _ in FAMILIES])
@pytest.mark.parametrize("to", ["onnx", "stablehlo"])
def test_every_family_answers_in_its_runtime_as_in_flax(name, overrides, to, tmp_path):
    weights = of(name, overrides)
    path = tmp_path / ("m.onnx" if to == "onnx" else "m")
    made = write.export(weights, path, to, Options(heads="apart"))
    assert 0 < made.verified.difference <= 1e-5 == made.verified.allowed
    images = normalised(noise(5, weights.image_size, seed=7))  # another number than was verified
    expected = heads(weights, images)
    if to == "onnx":
        said = run_onnx(path, images)
        onnx.checker.check_model(onnx.load(path), full_check=True)
    else:
        program = jax_export.deserialize(bytearray((path / "program.bin").read_bytes()))
        assert program.platforms == ("cpu", "cuda", "rocm", "tpu")
        places = re.findall(rb"[\w./-]*/[\w-]+\.py", (path / "program.bin").read_bytes())
        assert not places  # of this machine's source files
        said = jax.device_get(program.call(images))
    assert said.keys() == expected.keys()
    assert all(close(said[k], expected[k]) for k in said)


def test_an_onnx_file_knows_its_classes_and_what_its_images_must_be(tmp_path):
    weights = of(DISTILLED, SMALL, reading=Reading(resize="squash", exif=True))
    write.export(weights, tmp_path / "m.onnx", options=Options(input="uint8", layout="NCHW"))
    file = onnx.load(tmp_path / "m.onnx")
    said = {p.key: p.value for p in file.metadata_props}
    assert json.loads(said["classes"]) == list(CLASSES)
    assert said["model"] == DISTILLED
    taken = json.loads(said["input"])
    assert taken["layout"] == "NCHW"
    assert taken["shape"] == ["b", 3, 32, 32]
    assert "upright" in taken["is"]
    made = json.loads(said["images"])
    assert (made["mean"], made["std"], made["resize"]) == (list(MEAN), list(STD), "squash")
    assert file.opset_import[0].version == 20
    kinds = [node.op_type for node in file.graph.node]
    # Operations that runtimes have fast kernels for, not what they are made of.
    assert kinds.count("LayerNormalization") == 2 * 2 + 1
    assert kinds.count("Gelu") == kinds.count("Softmax") == 2
    images = noise(2, 32)
    by_formula = heads(weights, normalised(images))
    expected = (by_formula["cls"] + by_formula["dist"]) / 2
    assert close(run_onnx(tmp_path / "m.onnx", images.transpose(0, 3, 1, 2))["logits"], expected)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [32, (32, 48)])
def test_whole_images_are_seen_as_pillow_shows_them(resize, size):
    """To 1.2 of 255: it rounds after either axis. Noise is what tells the most."""
    view = of(PLAIN, SMALL | {"image_size": size}, crop_ratio=0.875).view
    view = dataclasses.replace(view, reading=Reading(resize, fill=(124, 116, 104)))
    compute = jax.jit(lambda x: pixels.viewed(x, view))
    for height, width in ((75, 50), (50, 75), (32, 32), (7, 40), (300, 2), (64, 20)):
        image = np.random.default_rng(1).integers(0, 256, (height, width, 3)).astype(np.uint8)
        apart = np.abs(np.asarray(compute(image[None]))[0] - view(image, "image"))
        assert apart.max() < 1.2 if resize != "squash" else apart.mean() < 0.5


def test_a_file_that_takes_whole_images_answers_as_predict_does(tmp_path):
    weights = of(DISTILLED, SMALL, crop_ratio=0.8)
    options = Options(preprocess=True, heads="apart")
    for path, to in ((tmp_path / "m.onnx", "onnx"), (tmp_path / "m", "stablehlo")):
        made = write.export(weights, path, to, options)
        assert 0 < made.verified.of_predict < 0.02
    image = np.asarray(Image.fromarray(noise(1, 20)[0]).resize((90, 61)))  # smooth, as photographs
    views = np.stack([weights.view(image, "image")])
    expected = heads(weights, normalised(views))
    said = run_onnx(tmp_path / "m.onnx", image[None])
    program = jax_export.deserialize(bytearray((tmp_path / "m" / "program.bin").read_bytes()))
    for answers in (said, jax.device_get(program.call(image[None]))):
        for head, logits in expected.items():
            assert np.abs(answers[head] - logits).max() < 0.01 * np.abs(logits).max()


@pytest.mark.parametrize(("name", "overrides"), FAMILIES[2:4], ids=["deit3", "regnety"])
def test_an_onnx_file_of_float16_runs(name, overrides, tmp_path):
    weights = of(name, overrides)
    made = write.export(weights, tmp_path / "m.onnx", options=Options(dtype="float16"))
    assert 0 < made.verified.difference < DTYPES["float16"]
    images = normalised(noise(3, weights.image_size))
    said, expected = run_onnx(tmp_path / "m.onnx", images)["logits"], heads(weights, images)["cls"]
    assert said.dtype == np.float32
    assert np.abs(said - expected).max() < DTYPES["float16"] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_half_as_large_and_say_how_far_they_are(dtype, tmp_path):
    weights = of(DISTILLED, SMALL)
    whole = write.export(weights, tmp_path / "a", "stablehlo")
    half = write.export(weights, tmp_path / "b", "stablehlo", Options(dtype=dtype))
    assert half.bytes < 0.6 * whole.bytes
    assert 1e-5 < half.verified.difference < DTYPES[dtype]
    assert json.loads((tmp_path / "b" / "metadata.json").read_text())["dtype"] == dtype


def test_a_fixed_batch_of_one_platform_is_plain_stablehlo_too(tmp_path):
    weights = of(PLAIN, SMALL | {"depth": 1})
    write.export(weights, tmp_path / "m", "stablehlo", Options(batch=1, platforms=("cpu",)))
    code = (tmp_path / "m" / "module.mlirbc").read_bytes()
    assert code.startswith(b"ML\xefR")  # MLIR bytecode
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    with ir.Context() as context:
        stablehlo.register_dialect(context)
        module = stablehlo.deserialize_portable_artifact(context, code)
        images = normalised(noise(1, 32))
        # The interpreter that defines what StableHLO means.
        said = stablehlo.eval_module(module, [ir.DenseElementsAttr.get(images)])
        assert close(np.asarray(said[0]), heads(weights, images)["cls"])


def test_an_answer_that_is_not_the_models_is_not_written(tmp_path, monkeypatch):
    weights = of(DISTILLED, SMALL)
    monkeypatch.setattr(
        "deit_jax.models.portable.NORM_EPSILON", 1e-3
    )  # what a wrong converter might do
    with pytest.raises(UserError, match=r"differ from the model's by .* nothing was written"):
        write.export(weights, tmp_path / "m.onnx")
    assert not any(tmp_path.iterdir())
    made = write.export(weights, tmp_path / "m.onnx", check=False)
    assert made.verified is None


def test_answers_that_are_not_finite_are_refused(tmp_path):
    weights = of(PLAIN, SMALL)
    kernel = weights.variables["params"]["head"]["kernel"]
    weights.variables["params"]["head"]["kernel"] = kernel * 1e6  # no float16 holds them
    with pytest.raises(UserError, match=r"float16.*--dtype=float32"):
        write.export(weights, tmp_path / "m", "stablehlo", Options(dtype="float16"))
    assert not any(tmp_path.iterdir())


def test_flattening_leaves_plain_operations_and_the_same_values():
    x = jax.numpy.asarray(np.random.default_rng(0).normal(size=(3, 8)), np.float32)
    scale, bias = jax.numpy.linspace(0.5, 2, 8), jax.numpy.ones(8)

    def function(x):
        return kernels.gelu(kernels.layer_norm(x, scale, bias))

    plain = flattened(function)
    names = str(jax.make_jaxpr(plain)(x))
    assert "custom_vjp" in str(jax.make_jaxpr(function)(x))
    assert "custom_vjp" not in names
    assert "platform_index" not in names
    np.testing.assert_allclose(plain(x), function(x), rtol=1e-6, atol=1e-6)


def test_weights_beyond_a_protobuf_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("deit_jax.export.onnx_file.LARGEST", 10_000)
    weights = of(DISTILLED, SMALL)
    write.export(weights, tmp_path / "m.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    images = normalised(noise(1, 32))
    both = heads(weights, images)
    assert close(run_onnx(tmp_path / "m.onnx", images)["logits"], (both["cls"] + both["dist"]) / 2)
    monkeypatch.setattr("deit_jax.export.stablehlo.LARGEST", 10_000)
    with pytest.raises(UserError, match=r"do not fit into one program.*--dtype=bfloat16"):
        write.export(weights, tmp_path / "m", "stablehlo")


def test_what_is_there_is_not_overwritten_unless_asked(tmp_path):
    weights, path = of(PLAIN, SMALL), tmp_path / "m"
    write.export(weights, path, "stablehlo")
    before = (path / "program.bin").read_bytes()
    with pytest.raises(UserError, match="exists; choose another name, or --force"):
        write.export(weights, path, "stablehlo")
    write.export(weights, path, "stablehlo", Options(heads="apart"), force=True)
    assert (path / "program.bin").read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="no program that was exported"):
        write.export(weights, tmp_path / "mine", "stablehlo", force=True)
    (tmp_path / "mine" / "metadata.json").write_text("{}")
    (tmp_path / "mine" / "program.bin").write_text("")
    with pytest.raises(UserError, match="no program that was exported"):
        write.export(weights, tmp_path / "mine", "stablehlo", force=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m", "mine"]


def test_a_folder_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    weights, path = of(PLAIN, SMALL), tmp_path / "m"
    write.export(weights, path, "stablehlo")
    before = (path / "program.bin").read_bytes()
    rename = LocalDisk.rename

    def denied(self, old, new):
        if old.name.endswith("new.tmp"):
            raise PermissionError(13, "denied")
        rename(self, old, new)

    monkeypatch.setattr(LocalDisk, "rename", denied)
    with pytest.raises(UserError, match="cannot be written"):
        write.export(weights, path, "stablehlo", Options(heads="apart"), force=True)
    assert (path / "program.bin").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_weights_beside_a_file_are_not_overwritten_and_not_left(tmp_path, monkeypatch):
    weights, beside = of(PLAIN, SMALL), tmp_path / "m.onnx.data"
    beside.write_text("mine")
    with pytest.raises(UserError, match=r"m\.onnx\.data exists"):
        write.export(weights, tmp_path / "m.onnx")
    assert beside.read_text() == "mine"
    beside.unlink()
    monkeypatch.setattr("deit_jax.export.onnx_file.LARGEST", 10_000)
    write.export(weights, tmp_path / "m.onnx")
    assert beside.exists()
    monkeypatch.undo()
    write.export(weights, tmp_path / "m.onnx", force=True)
    assert not beside.exists()


def test_the_command_says_what_it_wrote_and_what_is_wrong(tmp_path, capsys, monkeypatch):
    from deit_jax.weights.convert import convert

    source = str(tmp_path / "w.safetensors")
    convert(of(DISTILLED, SMALL), source)
    assert __main__.main(["export", source, str(tmp_path / "m.onnx"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["format"] == "onnx"
    assert said["described"]["classes"] == list(CLASSES)
    assert said["verified"]["difference"] <= 1e-5

    words = ["export", source, str(tmp_path / "several.onnx"), "--multi_label", "--json"]
    assert __main__.main(words) == 0
    assert json.loads(capsys.readouterr().out)["described"]["probabilities"] == "sigmoid"

    def fails(*words):
        code = __main__.main(["export", source, *words])
        return code, capsys.readouterr().err.strip()

    assert fails(str(tmp_path / "m"))[1].endswith("give --to=…")
    assert fails(str(tmp_path / "m"), "--to=onnx")[1].endswith("name it ….onnx")
    assert "--opset is of ONNX" in fails(str(tmp_path / "m"), "--to=stablehlo", "--opset=18")[1]
    assert "choose among cpu" in fails(str(tmp_path / "m"), "--to=stablehlo", "--platforms=npu")[1]
    monkeypatch.setattr(write.importlib.util, "find_spec", lambda name: "there")
    for platforms, reason in (("tpu", "add cpu, or --noverify"), ("rocm", "has cpu, cuda and tpu")):
        words = (str(tmp_path / "m"), "--to=savedmodel", f"--platforms={platforms}")
        code, line = fails(*words)
        assert code == 2
        assert line.endswith(reason)
    assert "--dtype=float16" in fails(str(tmp_path / "x.onnx"), "--dtype=bfloat16")[1]
    monkeypatch.setattr(write.importlib.util, "find_spec", lambda name: None)
    code, line = fails(str(tmp_path / "x.onnx"))
    assert code == 1
    assert line.endswith("pip install 'deit_jax[onnx]' && pip install --no-deps jax2onnx")


def test_a_verification_compares_with_the_model_and_not_with_the_program(tmp_path):
    """A program whose weights are not the model's is found out, whatever it was made from."""
    weights = of(PLAIN, SMALL)
    program = program_of(weights, Options())
    wrong = jax.tree.map(lambda x: x * 1.0001, program.params)
    compute = jax.jit(program.function)
    with pytest.raises(UserError, match="nothing was written"):
        verify.verify(program, lambda x: jax.device_get(compute(wrong, x)))

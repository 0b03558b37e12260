"""Weights go out to every format, load there strictly, give the same logits and come back whole."""

import dataclasses
import os

import jax
import numpy as np
import pytest

import deit_jax
from deit_jax import __main__
from deit_jax.analysis import classify, evaluate
from deit_jax.data.decode import Reading
from deit_jax.data.view import EvalView
from deit_jax.errors import UserError
from deit_jax.models.registry import create_model
from deit_jax.shapes import input_shape
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.teacher_spec import teacher_spec
from deit_jax.weights import convert, readers
from deit_jax.weights.exporters import huggingface
from deit_jax.weights.exporters import timm as timm_lib
from deit_jax.weights.fit import LoadedWeights
from deit_jax.weights.load import open_model
from deit_jax.weights.torch_names import from_torch, to_torch
from tests.test_weights import Attack, as_zip, assert_same
from tests.timm_reference import import_transformers

SMALL = {"image_size": 32, "depth": 2}
DISTILLED, PLAIN = "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"
FAMILIES = [
    (PLAIN, SMALL),
    (DISTILLED, SMALL),
    ("deit3_small_patch16_224", SMALL),
    ("regnety_002", {"widths": (8, 16), "depths": (1, 1), "stem_width": 8}),
    ("efficientnet_lite0", {}),
]


def opened(name, overrides, classes=("cat", "dog", "owl"), std=0.1):
    """Return a model with random weights as if it had been read from somewhere."""
    model = create_model(name, num_classes=len(classes), **overrides)
    size = getattr(model, "image_size", 64)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros(input_shape(model, size)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: (
            np.abs(rng.normal(1, std, leaf.shape)).astype(np.float32)
            if len(leaf.shape) == 1
            else rng.normal(0, std, leaf.shape).astype(np.float32)
        ),
        shapes,
    )
    return LoadedWeights(
        source="memory",
        format="memory",
        name=name,
        model=model,
        variables={"batch_stats": {}, **variables},
        classes=list(classes),
        image_size=size,
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        crop_ratio=0.9,
    )


def logits(model, variables, size=32):
    images = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
    return images, jax.jit(model.apply)(variables, images)


def _clear_bias_of_keys(variables):
    """Set to zero what BEiT does not have: what it adds, the softmax takes out again."""
    for name, block in variables["params"].items():
        if name.startswith("blocks_"):
            np.split(block["attn"]["qkv"]["bias"], 3)[1][:] = 0


@pytest.mark.parametrize(("name", "overrides"), FAMILIES)
@pytest.mark.parametrize("to", ["timm", "timm_folder", "deit_jax", "huggingface"])
def test_what_describes_itself_comes_back_whole(name, overrides, to, tmp_path):
    first = opened(name, overrides)
    path = tmp_path / ("w.safetensors" if to == "timm" else "w")
    if to == "huggingface" and not hasattr(first.model, "grid_size"):
        with pytest.raises(UserError, match=rf"transformers has no {name}"):
            convert.convert(first, path, to)
        assert not path.exists()
        return
    if to == "timm_folder" and name == "regnety_002":  # whose widths timm cannot be told
        with pytest.raises(UserError, match="timm has no regnety_002 of these shapes"):
            convert.convert(first, path, to)
        return
    assert convert.convert(first, path, to) == to
    second = open_model(path)
    if to == "huggingface" and name.startswith("deit3"):
        _clear_bias_of_keys(first.variables)
    assert_same(jax.device_get(second.variables), first.variables)
    ours = (first.name, first.model, first.classes, first.image_size, first.mean, first.std)
    assert ours == (
        (second.name, second.model, second.classes, second.image_size, second.mean, second.std)
    )
    assert second.crop_ratio == pytest.approx(0.9, abs=0.02)  # a whole number of pixels


def test_the_way_in_which_images_are_read_stays_in_runs_and_is_warned_of_elsewhere(
    tmp_path, caplog
):
    reading = Reading("pad", True, 12, (26, 51, 76))
    first = dataclasses.replace(opened(PLAIN, SMALL), reading=reading)
    convert.convert(first, tmp_path / "run", "deit_jax")
    assert open_model(tmp_path / "run").reading == reading
    assert open_model(tmp_path / "run").view == EvalView(32, 0.9, reading)
    assert not caplog.records
    convert.convert(first, tmp_path / "w.safetensors")
    assert "cannot tell other programs data.resize=pad, data.exif=True" in caplog.text
    assert open_model(tmp_path / "w.safetensors").reading == reading
    caplog.clear()
    convert.convert(first, tmp_path / "w.pth")
    assert "cannot tell other programs data.resize=pad" in caplog.text


@pytest.mark.parametrize(("name", "overrides"), FAMILIES)
def test_pth_is_torchs_and_comes_back_whole(name, overrides, tmp_path, torch):
    first, path = opened(name, overrides), tmp_path / "w.pth"
    assert convert.convert(first, path) == "deit"
    theirs = torch.load(path, weights_only=True)["model"]
    expected = to_torch(first.variables, "deit")
    assert list(theirs) == list(expected)
    for key, value in expected.items():
        assert theirs[key].is_contiguous()
        np.testing.assert_array_equal(theirs[key].numpy(), value, strict=True)
    again = tmp_path / "again.pth"  # as PyTorch writes it
    torch.save({"model": theirs, "epoch": 1}, again)
    read = [readers.read(p) for p in (path, again)]
    for key, value in expected.items():
        np.testing.assert_array_equal(read[0][key], value, strict=True)
        np.testing.assert_array_equal(read[1][key], value, strict=True)
    assert_same(from_torch(read[0], name, **overrides), dict_without_empty(first.variables))


def dict_without_empty(variables):
    return {key: value for key, value in variables.items() if value}


@pytest.mark.parametrize("name", [PLAIN, DISTILLED])
def test_transformers_loads_our_folder_strictly_and_agrees(name, tmp_path):
    transformers = import_transformers()
    import torch

    first = opened(name, SMALL)
    convert.convert(first, tmp_path / "hf")
    cls = (
        "DeiTForImageClassificationWithTeacher"
        if name == DISTILLED
        else "ViTForImageClassification"
    )
    model, info = getattr(transformers, cls).from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    auto = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert auto.architectures == [cls]
    assert auto.id2label == {0: "cat", 1: "dog", 2: "owl"}
    images, heads = logits(first.model, first.variables)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).logits.numpy()
    np.testing.assert_allclose(heads.fused(), expected, atol=1e-4)
    # theirs -> ours -> theirs
    model.save_pretrained(tmp_path / "theirs")
    second = open_model(tmp_path / "theirs")
    assert_same(second.variables, first.variables)
    convert.convert(second, tmp_path / "ours")
    stored, written = (readers.read(tmp_path / d) for d in ("theirs", "ours"))
    assert stored.keys() == written.keys()
    for key, value in stored.items():
        np.testing.assert_array_equal(written[key], value, strict=True)


def test_transformers_prepares_images_as_we_do(tmp_path):
    transformers = import_transformers()
    from PIL import Image

    from deit_jax.data.decode import centre_crop

    # Where an odd number of rows is cut off, transformers crops one row higher than torchvision.
    convert.convert(dataclasses.replace(opened(PLAIN, SMALL), crop_ratio=0.8), tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)
    image = Image.fromarray(pixels).resize((300, 200))
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = np.asarray(centre_crop(image, 32, 0.8)) / 255
    ours = (ours - np.array((0.1, 0.2, 0.3))) / np.array((0.4, 0.5, 0.6))
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


@pytest.mark.parametrize(("name", "overrides"), [FAMILIES[1], FAMILIES[2], FAMILIES[4]])
def test_timm_loads_our_file_strictly(name, overrides, tmp_path, timm):
    from safetensors.torch import load_file

    first, path = opened(name, overrides), tmp_path / "w.safetensors"
    convert.convert(first, path)
    kwargs = {"img_size": 32, "depth": 2} if overrides else {}
    theirs = timm.create_model(f"tf_{name}" if not overrides else name, num_classes=3, **kwargs)
    theirs.load_state_dict(load_file(path), strict=True)
    flat = {key: value.numpy() for key, value in theirs.state_dict().items()}
    back = from_torch(flat, name, **overrides)
    assert_same(back, dict_without_empty(first.variables))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (DISTILLED, {"image_size": 32, "patch_size": 8, "width": 96, "depth": 2, "num_heads": 4}),
        ("deit3_small_patch16_224", {"image_size": 32, "depth": 1, "mlp_ratio": 2.0}),
        ("efficientnet_lite0", {}),
    ],
)
def test_timms_call_that_is_printed_gives_our_logits(name, overrides, tmp_path, timm, torch):
    first, path = opened(name, overrides), tmp_path / "w.safetensors"
    convert.convert(first, path)
    theirs = eval(timm_lib.call(first, path), {"timm": timm}).eval()
    images, heads = logits(first.model, first.variables, first.image_size)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(heads.fused(), expected, rtol=1e-4, atol=1e-4)


def test_timm_has_no_call_for_a_convnet_of_other_shapes(tmp_path):
    assert timm_lib.call(opened(*FAMILIES[3]), tmp_path / "w.safetensors") is None


def test_transformers_call_that_is_printed_gives_our_model(tmp_path):
    transformers, first = import_transformers(), opened(DISTILLED, SMALL)
    convert.convert(first, tmp_path / "hf")
    model = eval(huggingface.call(first, tmp_path / "hf"), {"transformers": transformers})
    assert model.num_parameters() == sum(x.size for x in jax.tree.leaves(first.variables))


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_others_may_read_what_is_written(to, tmp_path):
    umask = os.umask(0o022)
    try:
        convert.convert(opened(PLAIN, SMALL), tmp_path / "w.safetensors", to)
    finally:
        os.umask(umask)
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_without_its_ending_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--to=timm makes one file; name it w\.safetensors"):
        convert.convert(opened(PLAIN, SMALL), tmp_path / "w", "timm")


FULL = [PLAIN, DISTILLED, "deit3_small_patch16_224"]


@pytest.mark.parametrize("name", FULL)
def test_full_size_logits_are_timms(name, timm, torch, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if key.endswith("gamma"):  # initialised so small that the blocks would not count
                parameter.uniform_(0.1, 1.0)
    torch.save({"model": theirs.state_dict()}, tmp_path / "w.pth")
    model, params = deit_jax.load(None, tmp_path / "w.pth")
    assert model == create_model(name)
    images, heads = logits(model, {"params": params}, 224)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    assert np.abs(heads.fused() - expected).max() <= 1e-4


def test_without_weights_load_gives_random_ones():
    model, params = deit_jax.load(DISTILLED, num_classes=7, image_size=32)
    apply = jax.jit(model.apply, static_argnames="train")
    heads = apply({"params": params}, np.zeros((1, 32, 32, 3), np.float32), train=False)
    assert heads.cls.shape == heads.dist.shape == (1, 7)
    assert np.any(heads.cls != heads.dist)


def test_folding_keeps_a_convnets_logits(tmp_path):
    first = opened(*FAMILIES[3])
    convert.convert(first, tmp_path / "w.safetensors")
    model, params = deit_jax.load("regnety_002", tmp_path / "w.safetensors")
    assert model.folded
    _, before = logits(first.model, first.variables)
    _, after = logits(model, {"params": params})
    np.testing.assert_allclose(before.cls, after.cls, rtol=1e-4, atol=1e-5)


def distilled_file(folder):
    """Write a small distilled model; return the file."""
    path = folder / "d.safetensors"
    convert.convert(opened(DISTILLED, SMALL), path)
    return path


@pytest.fixture
def distilled(tmp_path):
    return distilled_file(tmp_path)


def run(capsys, *argv):
    code = __main__.main(list(map(str, argv)))
    out, err = capsys.readouterr()
    return code, out, err


def test_convert_goes_round_all_formats(distilled, tmp_path, capsys):
    steps = [("run", "--to=deit_jax"), ("hf", "--to=huggingface"), ("back.safetensors", "")]
    source = distilled
    for name, flag in steps:
        code, out, err = run(capsys, "convert", source, tmp_path / name, *filter(None, [flag]))
        assert (code, err) == (0, "")
        assert DISTILLED in out
        source = tmp_path / name
    assert_same(open_model(source).variables, open_model(distilled).variables)
    code, out, err = run(
        capsys, "convert", source, tmp_path / "p.pth", "--head=cls", "--image_size=48"
    )
    assert code == 0
    assert "position embedding resized from 2x2 to 3x3" in out
    assert "distillation token and head dropped" in out


def test_convert_overwrites_nothing_unasked(distilled, tmp_path, capsys):
    target = tmp_path / "out.pth"
    target.write_text("precious")
    code, _, err = run(capsys, "convert", distilled, target)
    assert code == 1
    assert err.count("\n") == 1
    assert "exists" in err
    assert target.read_text() == "precious"
    assert run(capsys, "convert", distilled, target, "--force")[0] == 0
    assert run(capsys, "convert", distilled, tmp_path / "run", "--to=deit_jax")[0] == 0
    assert run(capsys, "convert", distilled, tmp_path / "run", "--force")[0] == 1


@pytest.mark.parametrize("argv", [("only_one",), ("a", "b", "--to=npz"), ("a", "b", "--nonsense")])
def test_convert_explains_wrong_usage(argv, capsys):
    code, _, err = run(capsys, "convert", *argv)
    assert code == 2
    assert err.count("\n") == 1


def test_convert_refuses_code_in_a_pickle_in_one_line(tmp_path, capsys):
    import pickle

    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    as_zip(path, pickle.dumps({"model": Attack(f"touch {trace}")}, protocol=2))
    code, _, err = run(capsys, "convert", path, tmp_path / "out.safetensors")
    assert code == 1
    assert err.count("\n") == 1
    assert "no weights found among model (" in err
    assert not trace.exists()
    assert not (tmp_path / "out.safetensors").exists()
    code, _, err = run(capsys, "convert", tmp_path / "nowhere.pth", tmp_path / "out.safetensors")
    assert (code, err.count("\n")) == (1, 1)


def test_predict_evaluate_and_teacher_take_any_weights(tmp_path, tiny_config):
    from PIL import Image

    c = tiny_config
    first = opened("regnety_002", FAMILIES[3][1], [str(i) for i in range(10)])
    file, workdir = tmp_path / "w.safetensors", tmp_path / "run"
    convert.convert(first, file)
    convert.convert(first, workdir, "deit_jax")
    convert.convert(first, tmp_path / "w.pth")
    picture = str(tmp_path / "x.png")
    Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3)).save(picture)
    answers = [classify.classify(str(path), [picture]) for path in (file, workdir)]
    assert answers[0] == answers[1]
    c.data.eval_crop_ratio, c.train.eval_batch_size = 1.0, 1024
    results = [evaluate.open_evaluation(c, str(path)).results() for path in (file, workdir)]
    assert results[1].pop("step") == 0
    assert results[0] == results[1]
    assert set(results[0]) == {"examples", "cls", "fused"}
    for path in (file, workdir, tmp_path / "w.pth"):
        found, params = load_teacher(teacher_spec(c), str(path), first.classes)
        told = path.suffix != ".pth"
        assert found.mean == ((0.1, 0.2, 0.3) if told else (0.485, 0.456, 0.406))
        assert found.model.folded
        heads = jax.jit(found.model.apply)(
            {"params": params}, logits(first.model, first.variables)[0]
        )
        expected = logits(first.model, first.variables)[1]
        np.testing.assert_allclose(heads.cls, expected.cls, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="knows 10 classes"):
        load_teacher(teacher_spec(c), str(file), ["one"])

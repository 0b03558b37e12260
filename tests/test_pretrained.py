"""Published weights by their name, what they expect of images, and images made so."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import deit_jax
from deit_jax import __main__ as program
from deit_jax.errors import UserError
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.teacher_spec import teacher_spec
from deit_jax.weights.load import load_variables
from deit_jax.weights.pretrained import PUBLISHED, hub_id
from deit_jax.weights.torch_names import to_torch
from tests.timm_reference import import_timm, import_torch
from tests.tiny import make_tiny_config

TINY = "deit_tiny_patch16_224"


def test_every_published_name_is_one_of_timms():
    """Of 1000 classes, at the size and the resolution that the name says."""
    timm = import_timm()
    assert PUBLISHED.keys() <= set(deit_jax.list_models())
    for name, repository in PUBLISHED.items():
        cfg = timm.models.get_pretrained_cfg(repository.removeprefix("timm/"))
        assert cfg is not None, repository
        assert cfg.hf_hub_id == repository
        assert cfg.num_classes == 1000
        assert "22k" not in cfg.tag
        model = deit_jax.create_model(name)
        assert cfg.input_size[1] == getattr(model, "image_size", cfg.input_size[1])
        if name.startswith("vit_"):
            assert timm.models.get_pretrained_cfg(name).hf_hub_id == repository
    untrained = {n for n in deit_jax.list_models("vit_*") if n not in PUBLISHED}
    assert untrained == {"vit_small_patch8_224", "vit_large_patch14_224", "vit_large_patch32_224"}
    assert all(
        timm.models.get_pretrained_cfg(n).num_classes != 1000
        or "untrained" in timm.models.get_pretrained_cfg(n).tag
        for n in untrained
    )
    without = {n for n in deit_jax.list_models("deit*") if n not in PUBLISHED}
    assert without == {"deit3_medium_patch16_384"}
    assert timm.models.get_pretrained_cfg("deit3_medium_patch16_384") is None


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return the hub's cache with weights of the tiny model, random but as timm publishes them."""
    home = tmp_path_factory.mktemp("hub")
    folder = home / f"models--timm--{TINY}.fb_in1k"
    snapshot = folder / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)
    model = deit_jax.create_model(TINY)
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(7), jnp.zeros((1, 224, 224, 3))))
    save_file(to_torch(variables), snapshot / "model.safetensors")
    about = {"input_size": [3, 224, 224], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    about |= {"crop_pct": 0.9, "num_classes": 1000}
    described = {"architecture": TINY, "num_classes": 1000, "pretrained_cfg": about}
    (snapshot / "config.json").write_text(json.dumps(described))
    return home, variables["params"]


@pytest.fixture
def offline(cache, monkeypatch):
    """Let the hub be that cache alone; return the weights in it."""
    import huggingface_hub
    from huggingface_hub import constants

    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **options: download(repo, cache_dir=cache[0], **options),
    )
    return cache[1]


def same(have, want):
    jax.tree.map(np.testing.assert_array_equal, have, want)


def test_load_takes_them_out_of_the_cache(offline):
    model, params, spec = deit_jax.load(TINY, pretrained=True, return_spec=True)
    same(params, offline)
    assert (spec.image_size, spec.crop_ratio) == (224, 0.9)
    assert (spec.mean, spec.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert model.num_classes == 1000
    _, params = deit_jax.load(TINY, pretrained=True, num_classes=5, image_size=64, head="drop")
    assert params["head"]["kernel"].shape == (192, 5)
    assert params["pos_embed"].shape == (1, 17, 192)


def test_a_run_and_its_teacher_take_them_too(offline):
    c = make_tiny_config()
    c.model.name, c.model.image_size, c.model.patch_size = TINY, 32, 16
    c.model.width = c.model.depth = None
    opened = load_variables("pretrained", c.model, 1000, 32)
    same(opened.variables["params"]["blocks_0"], offline["blocks_0"])
    c.teacher.model, c.teacher.weights = c.model, "pretrained"
    c.teacher.model.image_size, c.teacher.image_size = None, 224
    names = [f"class {i}" for i in range(1000)]
    teacher, params = load_teacher(teacher_spec(c), "pretrained", names)
    assert teacher.mean == (0.4, 0.5, 0.6)
    same(params["norm"], offline["norm"])


def test_commands_take_a_name_for_weights(offline, tmp_path, capsys):
    picture = tmp_path / "x.png"
    Image.new("RGB", (300, 250), (200, 10, 90)).save(picture)
    assert program.main(["predict", f"--model={TINY}", "--json", str(picture)]) == 0
    (said,) = json.loads(capsys.readouterr().out)["results"]
    model, params, spec = deit_jax.load(TINY, pretrained=True, return_spec=True)
    images = jnp.asarray(deit_jax.preprocess(picture, spec))
    logits = np.asarray(jax.jit(model.apply)({"params": params}, images).cls)
    assert [p["index"] for p in said["predictions"]] == np.argsort(-logits[0])[:5].tolist()
    assert program.main(["embed", f"--model={TINY}", f"--out={tmp_path}/f.npy", str(picture)]) == 0
    assert np.load(tmp_path / "f.npy").shape == (1, 192)


def test_names_without_published_weights_or_network(offline, capsys):
    with pytest.raises(UserError, match=r"no published weights of deit3_medium_patch16_384 .*take"):
        deit_jax.load("deit3_medium_patch16_384", pretrained=True)
    with pytest.raises(UserError, match=r"pretrained: whose\? give the model's name"):
        hub_id(None)
    with pytest.raises(UserError, match="pretrained=True and weights=x: give one of them"):
        deit_jax.load(TINY, "x", pretrained=True)
    with pytest.raises(UserError) as error:
        deit_jax.load("deit_small_patch16_224", pretrained=True)
    line = str(error.value)
    assert line.startswith("hf-hub:timm/deit_small_patch16_224.fb_in1k: cannot be downloaded (")
    assert "`hf download timm/deit_small_patch16_224.fb_in1k`" in line
    assert "\n" not in line
    assert program.main(["predict", "--model=deit_small_patch16_224", "x.png"]) == 1
    assert "cannot be downloaded" in capsys.readouterr().err.splitlines()[-1]


def test_preprocess_is_torchvisions(tmp_path):
    """Of paths, bytes, Pillow's images and arrays alike."""
    torch = import_torch()
    import_timm()
    from torchvision import transforms

    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "x.png")
    _, _, spec = deit_jax.load("deit_tiny_patch16_224", image_size=48, return_spec=True)
    assert spec.crop_ratio == 0.875
    theirs = transforms.Compose(
        [
            transforms.Resize(54, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(48),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    expected = theirs(picture).numpy().transpose(1, 2, 0)
    assert isinstance(theirs(picture), torch.Tensor)
    data = (tmp_path / "x.png").read_bytes()
    images = [tmp_path / "x.png", str(tmp_path / "x.png"), data, picture, pixels]
    made = deit_jax.preprocess(images, spec)
    assert made.shape == (5, 48, 48, 3)
    assert made.dtype == np.float32
    for one in made:
        np.testing.assert_allclose(one, expected, atol=1e-5)
    np.testing.assert_array_equal(deit_jax.preprocess(picture, spec), made[:1])
    palette = deit_jax.preprocess(picture.convert("P"), spec)
    np.testing.assert_allclose(
        palette[0],
        theirs(picture.convert("P").convert("RGB")).numpy().transpose(1, 2, 0),
        atol=1e-5,
    )
    with pytest.raises(UserError, match=r"nowhere\.png: cannot be read \(No such file"):
        deit_jax.preprocess(tmp_path / "nowhere.png", spec)
    with pytest.raises(UserError, match="image 1: not a readable image"):
        deit_jax.preprocess([picture, b"x"], spec)
    with pytest.raises(UserError, match="no images given"):
        deit_jax.preprocess([], spec)

"""Weights of any origin: wrapped, prefixed, averaged, without a head, beside other things."""

import datetime
import enum
import io
import pathlib
import pickle
import random

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import deit_jax
from deit_jax import __main__
from deit_jax.configs import base
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.train.run import fitted_weights
from deit_jax.weights import pickles, readers
from deit_jax.weights.load import load_variables, open_model
from deit_jax.weights.torch_names import to_torch
from tests.test_convert import DISTILLED, FAMILIES, PLAIN, SMALL, logits, opened
from tests.test_weights import assert_same
from tests.timm_reference import import_transformers
from tests.tiny import resolved

TINY = SMALL | {"width": 24, "num_heads": 3}


@pytest.fixture(scope="module")
def tiny():
    return opened(PLAIN, TINY)


def saved(tmp_path, torch, tree):
    """Save a tree of numpy arrays as PyTorch does."""
    path = tmp_path / "w.pth"
    as_torch = jax.tree.map(lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x, tree)
    torch.save(as_torch, path)
    return path


def prefixed(flat, prefix):
    return {f"{prefix}{name}": value for name, value in flat.items()}


def config_of(overrides, name=PLAIN):
    c = base.get_model_config(name)
    c.update(overrides)
    return c


WRAPPED = [
    ((), "_orig_mod."),
    ((), "module."),
    (("model_state_dict",), "module._orig_mod."),
    (("net",), ""),
    (("state_dict",), "model.encoder.vit."),
    (("state_dict",), "student."),
    (("checkpoint", "weights", "model"), "net."),
    (("epoch_9", "model_ema"), "module.backbone."),
]


@pytest.mark.parametrize(("keys", "prefix"), WRAPPED)
@pytest.mark.parametrize("dialect", ["timm", "huggingface"])
def test_names_are_found_wherever_they_are(keys, prefix, dialect, tiny, tmp_path, torch):
    tree = prefixed(to_torch(tiny.variables, dialect), prefix)
    for key in reversed(keys):
        tree = {"epoch": 3, "optimizer": {"state": {0: np.zeros(3)}}, key: tree}
    loaded = load_variables(saved(tmp_path, torch, tree), config_of(TINY), 3)
    assert_same(loaded.variables, tiny.variables)
    told = [note for note in loaded.notes if "taken off" in note]
    assert told == ([f"names begin with {prefix}: taken off"] if prefix else [])


@pytest.mark.parametrize(("name", "overrides"), FAMILIES)
def test_every_familys_names_are_found(name, overrides, tmp_path):
    first, path = opened(name, overrides), tmp_path / "w.safetensors"
    flat = to_torch(first.variables)
    plain = {k: v for k, v in flat.items() if not k.endswith("num_batches_tracked")}
    save_file(prefixed(flat, "lightning.model.") | {"lightning.loss_fn.weight": np.ones(3)}, path)
    part = readers.read_part(path)
    read, notes = part.tensors, part.notes
    assert read.keys() == flat.keys() >= plain.keys()
    assert notes == (
        "names begin with lightning.model.: taken off",
        "left out, as no part of the model: lightning.loss_fn",
    )


def dino(flat):
    """Return a checkpoint as DINO's main_dino.py makes it: backbones and their projections."""
    other = {name: value + 1 for name, value in flat.items()}
    head = {"head.mlp.0.weight": np.ones((5, 24)), "head.last_layer.weight_g": np.ones((9, 1))}
    return {
        "student": prefixed(other, "module.backbone.") | prefixed(head, "module."),
        "teacher": prefixed(flat, "backbone.") | head,
        "optimizer": {"state": {}},
        "epoch": 1,
        "dino_loss": {"center": np.ones((1, 9))},
    }


def without_head(flat):
    return {name: value for name, value in flat.items() if not name.startswith("head")}


def test_dino_starts_a_run_from_its_teacher(tiny, tmp_path, torch):
    path = saved(tmp_path, torch, dino(without_head(to_torch(tiny.variables))))
    with pytest.raises(UserError, match=r"w\.pth: has no head; head='drop' starts a new one$"):
        load_variables(path, config_of(TINY), 10)
    with pytest.raises(
        UserError, match="has no head; `deit embed`, `deit eval --probe=knn` or num_classes=0"
    ):
        open_model(path, default=config_of(TINY))
    loaded = load_variables(path, config_of(TINY), 10, head="drop")
    params, expected = loaded.variables["params"], tiny.variables["params"]
    assert params["head"]["kernel"].shape == (24, 10)
    assert np.std(params["head"]["kernel"]) == pytest.approx(0.02, rel=0.2)
    assert_same({k: v for k, v in params.items() if k != "head"}, without_head(expected))
    assert loaded.notes == (
        "of student.module.backbone and teacher.backbone the teacher, which DINO's authors "
        "evaluate; FILE::student takes the other",
        "names begin with backbone.: taken off",
        "left out, as no part of the model: head.last_layer, head.mlp.0",
        "heads start anew: 10 classes",
    )
    other = load_variables(f"{path}::student", config_of(TINY), 10, head="drop")
    assert other.variables["params"]["cls_token"] == pytest.approx(params["cls_token"] + 1)
    with pytest.raises(
        UserError, match=r"w\.pth: no weights at 'nurse'; there are student\S* and teacher"
    ):
        load_variables(f"{path}::nurse", config_of(TINY), 10)


def test_a_teacher_of_another_kind_is_not_taken_for_dinos(tiny, tmp_path, torch):
    regnet = opened("regnety_002", FAMILIES[3][1])
    tree = prefixed(to_torch(tiny.variables), "student.")
    tree |= prefixed(to_torch(regnet.variables), "teacher.")
    path = saved(tmp_path, torch, {"state_dict": tree})
    with pytest.raises(UserError, match=r"several weights: .*student and .*teacher; say which"):
        load_variables(path, config_of(TINY), 3)
    loaded = load_variables(f"{path}::student", config_of(TINY), 3)
    assert_same(loaded.variables, tiny.variables)
    teacher = load_variables(f"{path}::teacher", config_of(FAMILIES[3][1], "regnety_002"), 3)
    assert_same(teacher.variables, regnet.variables)


def test_mae_loses_its_decoder_and_one_with_mean_pooling_is_refused(tiny, tmp_path, torch):
    flat = without_head(to_torch(tiny.variables))
    decoder = {"decoder_embed.weight": np.ones((8, 24)), "decoder_pos_embed": np.ones((1, 5, 8))}
    decoder |= {"decoder_blocks.0.norm1.weight": np.ones(8), "mask_token": np.ones((1, 1, 8))}
    path = saved(tmp_path, torch, {"model": flat | decoder})
    loaded = load_variables(path, config_of(TINY), 7, head="drop")
    names = "decoder_blocks.0.norm1, decoder_embed, decoder_pos_embed, mask_token"
    assert f"left out, as no part of the model: {names}" in loaded.notes
    pooled = {
        name.replace("norm.", "fc_norm.") if name[:5] == "norm." else name: value
        for name, value in flat.items()
    }
    path = saved(tmp_path, torch, {"model": pooled})
    with pytest.raises(UserError, match=r"fc_norm: .*mean of the patches"):
        load_variables(path, config_of(TINY), 7, head="drop")
    beit = flat | {"blocks.0.attn.relative_position_bias_table": np.ones((5, 3))}
    path = saved(tmp_path, torch, {"model": beit})
    with pytest.raises(UserError, match=r"unexpected blocks\.0\.attn\.relative_position_bias"):
        load_variables(path, config_of(TINY), 7, head="drop")


def test_features_of_weights_with_and_without_a_head(tmp_path, torch, timm):
    theirs = timm.create_model(PLAIN, img_size=32, num_classes=0).eval()
    path = tmp_path / "w.pth"
    torch.save({"model": theirs.state_dict()}, path)
    model, params = deit_jax.load(str(path), num_classes=0)
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    features = jax.jit(model.apply)({"params": params}, images).cls
    np.testing.assert_allclose(features, expected, atol=1e-5)
    full = {"head.weight": torch.ones(3, 192), "head.bias": torch.ones(3)}
    torch.save({"model": theirs.state_dict() | full}, path)
    _, again = deit_jax.load(str(path), num_classes=0)
    assert_same(again, params)
    assert deit_jax.load(str(path))[0].num_classes == 3


@pytest.mark.parametrize("name", ["regnety_002", "efficientnet_lite0"])
def test_convnets_without_a_head_give_features_and_start(name, tmp_path, torch, timm):
    theirs = timm.create_model(name.replace("eff", "tf_eff"), num_classes=0).eval()
    path = tmp_path / "w.pth"
    torch.save({"state_dict": prefixed(theirs.state_dict(), "module.")}, path)
    model, params = deit_jax.load(str(path), num_classes=0)
    images = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    features = jax.jit(model.apply)({"params": params}, images).cls
    np.testing.assert_allclose(features, expected, atol=1e-4)
    start = load_variables(path, None, 7, head="drop")
    assert start.name == name
    assert start.notes[-1] == "heads start anew: 7 classes"


def test_distilled_weights_without_heads_start_both(tmp_path, torch):
    first = opened(DISTILLED, TINY)
    path = saved(tmp_path, torch, without_head(to_torch(first.variables)))
    loaded = load_variables(path, config_of(TINY, DISTILLED), 4, head="drop")
    params = loaded.variables["params"]
    assert params["head"]["kernel"].shape == params["head_dist"]["kernel"].shape == (24, 4)
    assert np.any(params["head"]["kernel"] != params["head_dist"]["kernel"])
    np.testing.assert_array_equal(params["dist_token"], first.variables["params"]["dist_token"])


def test_a_backbone_of_transformers_loses_its_pooler(tmp_path, torch):
    transformers = import_transformers()
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.ViTConfig(**shape, intermediate_size=96, image_size=32)
    config.layer_norm_eps = 1e-6
    theirs = transformers.ViTModel(config).eval()
    theirs.save_pretrained(tmp_path)
    loaded = load_variables(tmp_path, num_classes=0)
    assert "left out, as no part of the model: pooler.dense" in loaded.notes
    images, heads = logits(loaded.model, loaded.variables)
    with torch.no_grad():
        states = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).last_hidden_state
    np.testing.assert_allclose(heads.cls, states[:, 0].numpy(), atol=1e-4)
    flat = {f"vit.{k}": v for k, v in theirs.state_dict().items()}
    torch.save(flat, tmp_path / "w.pth")
    again = load_variables(tmp_path / "w.pth", config_of(TINY), 0)
    assert_same(again.variables, loaded.variables)


def test_the_layer_before_the_head_goes_with_it(tiny, tmp_path, torch):
    flat = to_torch(tiny.variables) | {"pre_logits.fc.weight": np.ones((24, 24))}
    path = saved(tmp_path, torch, flat)
    with pytest.raises(UserError, match="pre_logits: a layer before the head; head='drop'"):
        load_variables(path, config_of(TINY), 3)
    loaded = load_variables(path, config_of(TINY), 3, head="drop")
    assert "pre_logits, the layer before the head: left out" in loaded.notes


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema", "ema_state_dict"])
def test_a_moving_average_in_a_file_is_told_of_and_taken_if_asked(key, tiny, tmp_path, torch):
    flat = to_torch(tiny.variables)
    average = {name: value + 1 for name, value in flat.items()}
    path = saved(tmp_path, torch, {"model": flat, key: average, "epoch": 1})
    model = config_of(TINY)
    loaded = load_variables(path, model, 3)
    assert_same(loaded.variables, tiny.variables)
    assert len(loaded.notes) == 1
    assert f"a moving average of the weights is there too ({key})" in loaded.notes[0]
    for source, ema in ((path, True), (f"{path}::{key}", False)):
        taken = load_variables(source, model, 3, ema=ema)
        assert_same(taken.variables, jax.tree.map(lambda x: x + 1, tiny.variables))
    path = saved(tmp_path, torch, {"model": flat})
    with pytest.raises(UserError, match=r"w\.pth: has no moving average of its weights$"):
        load_variables(path, model, 3, ema=True)
    path = saved(tmp_path, torch, {key: average})
    only = load_variables(path, model, 3)
    assert only.notes == (f"the weights are a moving average ({key})",)


class Colour(enum.Enum):
    RED = 1


class Meter:
    """A class of whoever trained."""

    def __init__(self):
        self.values, self.own = {1.5: 2}, Colour.RED


class AlarmingMeter(Meter):
    def __setstate__(self, state):
        raise AssertionError("an object of the file was brought to life")

    def __getstate__(self):
        return self.__dict__


class Hydra(dict):
    """A dict of a package that is not installed."""


def config_of_hydra():
    made = Hydra(a={"b": [1, 2]})
    made.parent = made
    return made


def luggage(torch):
    """Return what people keep beside weights."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    rng = random.Random(0)
    return {
        "path": pathlib.PurePosixPath("/tmp/x"),
        "lr": np.float32(1e-3),
        "best": np.float64(0.5),
        "history": np.arange(5),
        "names": np.array(["a", "b"]),
        "objects": np.array([{1: 2}, None], dtype=object),
        "optimizer": optimizer.state_dict(),
        "cfg": config_of_hydra(),
        "when": datetime.datetime(2026, 1, 1),
        "took": datetime.timedelta(seconds=3),
        "tags": {"a", "b"},
        "frozen": frozenset({(1, 2)}),
        "colour": Colour.RED,
        "meter": AlarmingMeter(),
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "size": torch.Size([1, 2]),
        "rng": rng.getstate(),
        "numpy_rng": np.random.default_rng(0),
        "function": len,
        "kind": Meter,
        "complex": 1j,
        "slice": slice(1, 2),
        "bytes": bytearray(b"abc"),
        ("a", "tuple"): {Colour.RED: 1},
        "range": range(3),
        "complex_tensor": torch.ones(2, dtype=torch.complex64),
        "sparse": torch.ones(2, 2).to_sparse(),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_lies_beside_the_weights_stays_inert(zipped, protocol, tiny, tmp_path, torch):
    flat, path = to_torch(tiny.variables), tmp_path / "w.pth"
    weights = {name: torch.from_numpy(value) for name, value in flat.items()}
    torch.save(
        luggage(torch) | {"model": weights},
        path,
        _use_new_zipfile_serialization=zipped,
        pickle_protocol=protocol,
    )
    read = readers.read(path)
    assert read.keys() == flat.keys()
    assert all(np.array_equal(read[name], flat[name]) for name in flat)


@pytest.mark.parametrize("kind", ["torch", "legacy", "protocol 4", "pickle", "pickle 2"])
def test_numpy_arrays_in_a_pickle_are_weights_too(kind, tiny, tmp_path, torch):
    flat, path = to_torch(tiny.variables), tmp_path / "w.pkl"
    flat["blocks.0.attn.qkv.weight"] = np.asfortranarray(flat["blocks.0.attn.qkv.weight"])
    flat["norm.weight"] = flat["norm.weight"].astype(">f8")
    tree = {"model": flat, "names": np.array(["a"]), "step": np.int64(3)}
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(tree, protocol=2 if kind == "pickle 2" else 4))
    else:
        protocol = 4 if kind == "protocol 4" else 2
        zipped = kind != "legacy"
        torch.save(tree, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    read = readers.read(path)
    assert read.keys() == flat.keys()
    for name, value in flat.items():
        np.testing.assert_array_equal(read[name], value, strict=True)


def test_a_whole_module_is_refused_with_the_way_out(tmp_path, torch):
    path = tmp_path / "w.pth"
    for zipped in (True, False):
        for tree, how in ((torch.nn.Linear(2, 2), ""), ({"model": torch.nn.Linear(2, 2)}, "model")):
            torch.save(tree, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(ValueError, match="a whole PyTorch module") as caught:
                readers.read(path)
            text = str(caught.value)
            assert "torch.nn.modules.linear.Linear" in text
            lines = text.rpartition("installed: ")[2].replace("FILE", "path").split("; ")
            scope = {"torch": torch, "path": path}
            lines[1] = lines[1].replace("'weights.pth'", "str(path) + 'w'")
            assert (f"['{how}']" in lines[0]) == bool(how)
            exec("\n".join(lines), scope)  # as told
            assert torch.load(f"{path}w", weights_only=True).keys() == {"weight", "bias"}


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cantigravity2\nfly\nX\x01\x00\x00\x00x\x85R.",
        b"(X\x01\x00\x00\x00xiantigravity2\nfly\n.",
        b"(cantigravity2\nfly\nX\x01\x00\x00\x00xo.",
        b"cantigravity2\nfly\n)\x81.",
        b"cantigravity2\nfly\n)}\x92.",
        b"X\x0c\x00\x00\x00antigravity2X\x03\x00\x00\x00fly\x93.",
    ],
)
def test_nothing_is_imported_or_called_in_any_way_of_asking(opcodes, tmp_path, monkeypatch):
    (tmp_path / "antigravity2.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    made = pickles.Unpickler(io.BytesIO(b"\x80\x04" + opcodes)).load()
    assert type(made) is pickles.Inert
    assert made.kind == "antigravity2.fly"
    for extension in (b"\x82\x01.", b"\x83\x01\x00.", b"\x84\x01\x00\x00\x00."):
        with pytest.raises(KeyError):
            pickles.Unpickler(io.BytesIO(b"\x80\x04" + extension)).load()


def test_a_backbone_is_converted_without_a_head(tiny, tmp_path, torch, capsys):
    path = saved(tmp_path, torch, dino(without_head(to_torch(tiny.variables))))
    target = tmp_path / "w.safetensors"
    words = ["convert", str(path), str(target), "--num_classes=0", f"--model={PLAIN}"]
    assert __main__.main(words) == 1  # of another width than the name's
    assert "weights do not fit" in capsys.readouterr().err
    backbone = opened(PLAIN, {"image_size": 32})
    saved(tmp_path, torch, dino_of(without_head(to_torch(backbone.variables))))
    assert __main__.main(words) == 0
    assert "of student.module.backbone and teacher.backbone the teacher" in capsys.readouterr().out
    for to in ("deit", "huggingface", "deit_jax"):
        again = tmp_path / ("again.pth" if to == "deit" else to)
        words = ["convert", str(target), str(again), "--num_classes=0", f"--to={to}"]
        assert __main__.main(words) == 0
        model, params = deit_jax.load(str(again), num_classes=0)
        assert model.num_classes == 0
        assert_same(jax.device_get(params), without_head(backbone.variables["params"]))


def test_embed_takes_backbones_with_and_without_a_head(tmp_path, torch):
    backbone = opened(PLAIN, {"image_size": 32})
    flat = to_torch(backbone.variables)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    image.save(tmp_path / "i.png")
    written = []
    for name, tree in (("full", flat), ("dino", dino_of(without_head(flat)))):
        path = saved(tmp_path, torch, tree)
        out = tmp_path / f"{name}.npy"
        words = ["embed", f"--weights={path}", f"--out={out}", str(tmp_path / "i.png")]
        assert __main__.main(words) == 0
        written.append(np.load(out))
    assert written[0].shape == (1, 192)
    np.testing.assert_array_equal(*written)


def dino_of(flat):
    return {k: v for k, v in dino(flat).items() if k in ("student", "teacher")}


def test_what_was_fitted_is_in_the_log_and_kept(tiny, tmp_path, torch, tiny_config, caplog):
    """For the run's history, where test_report looks for it."""
    c = tiny_config
    c.model.name, c.distill.kind = PLAIN, "none"
    c.init.weights = str(saved(tmp_path, torch, dino(without_head(to_torch(tiny.variables)))))
    c.init.head = "drop"
    experiment = resolved(c, open_dataset(c.data))
    with caplog.at_level("INFO", logger="deit_jax"):
        start = fitted_weights(experiment, tmp_path / "run", [str(i) for i in range(10)])
    assert start.notes[1:] == (
        "names begin with backbone.: taken off",
        "left out, as no part of the model: head.last_layer, head.mlp.0",
        "first layer resampled from patches of 16 to 4 pixels",
        "position embedding resized from 2x2 to 4x4",
        "heads start anew: 10 classes",
    )
    assert all(note in caplog.text for note in start.notes)

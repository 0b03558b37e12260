"""Weights of other JAX code: Google's .npz files, Flax's msgpack, Orbax folders."""

import json
import zipfile

import flax.serialization
import jax
import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest

from deit_jax.configs import base
from deit_jax.errors import UserError
from deit_jax.weights import readers
from deit_jax.weights.exporters import huggingface
from deit_jax.weights.load import load_variables, open_model
from deit_jax.weights.torch_names import to_torch
from tests.test_any_weights import TINY, config_of
from tests.test_convert import FAMILIES, PLAIN, SMALL, logits, opened
from tests.test_weights import assert_same

WIDTH, HEADS, DEPTH, PATCH, SIZE, CLASSES = 24, 3, 2, 16, 32, 5
SHAPE = {"width": WIDTH, "num_heads": HEADS, "depth": DEPTH, "image_size": SIZE}


def google(big_vision=False, depth=DEPTH, width=WIDTH, heads=HEADS, classes=CLASSES):
    """Return a ViT's arrays as vision_transformer's or big_vision's models name them."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(0, 0.1, shape).astype(np.float32)

    first, mlp, second = (0, 0, 1) if big_vision else (1, 3, 2)
    positions = (SIZE // PATCH) ** 2 + (not big_vision)
    name = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"
    arrays = {
        "cls": normal(1, 1, width),
        name: normal(1, positions, width),
        "embedding/kernel": normal(PATCH, PATCH, 3, width),
        "embedding/bias": normal(width),
        "Transformer/encoder_norm/scale": normal(width) + 1,
        "Transformer/encoder_norm/bias": normal(width),
        "head/kernel": normal(width, classes),
        "head/bias": normal(classes),
    }
    each = width // heads
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_{first}"
        for part in ("query", "key", "value"):
            arrays[f"{attention}/{part}/kernel"] = normal(width, heads, each)
            arrays[f"{attention}/{part}/bias"] = normal(heads, each)
        arrays[f"{attention}/out/kernel"] = normal(heads, each, width)
        arrays[f"{attention}/out/bias"] = normal(width)
        for norm in (0, second):
            arrays[f"{block}/LayerNorm_{norm}/scale"] = normal(width) + 1
            arrays[f"{block}/LayerNorm_{norm}/bias"] = normal(width)
        for dense, shape in enumerate([(width, 4 * width), (4 * width, width)]):
            arrays[f"{block}/MlpBlock_{mlp}/Dense_{dense}/kernel"] = normal(*shape)
            arrays[f"{block}/MlpBlock_{mlp}/Dense_{dense}/bias"] = normal(shape[1])
    return arrays


def scanned(arrays, depth=DEPTH):
    """Return big_vision's arrays with all blocks in one, as its scan=True keeps them."""
    one = {k: v for k, v in arrays.items() if "encoderblock_" not in k}
    for name in [k for k in arrays if "encoderblock_0/" in k]:
        layers = [arrays[name.replace("block_0", f"block_{i}")] for i in range(depth)]
        one[name.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
    return one


def nested(arrays):
    tree = {}
    for name, value in arrays.items():
        node = tree
        *parts, leaf = name.split("/")
        for part in parts:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def timms(path, timm, big_vision, images):
    """Return the logits of timm's model with its own reading of the file."""
    import torch

    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE,
        embed_dim=WIDTH,
        num_heads=HEADS,
        depth=DEPTH,
        num_classes=CLASSES,
        no_embed_class=big_vision,
    ).eval()
    theirs.load_pretrained(str(path))
    with torch.no_grad():
        return theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()


@pytest.mark.parametrize("kind", ["augreg", "target", "big_vision", "scan"])
def test_npz_gives_timms_logits(kind, tmp_path, timm):
    big_vision = kind in ("big_vision", "scan")
    arrays = google(big_vision)
    saved = scanned(arrays) if kind == "scan" else arrays
    prefix = {"augreg": "", "target": "opt/target/"}.get(kind, "params/")
    path = tmp_path / "w.npz"
    beside = {"opt/state/step": np.int32(9)} if kind == "target" else {}
    np.savez(path, **{f"{prefix}{name}": value for name, value in saved.items()}, **beside)
    model = config_of(SHAPE, "vit_tiny_patch16_224")
    loaded = load_variables(path, model, CLASSES)
    images, heads = logits(loaded.model, loaded.variables)
    np.testing.assert_allclose(heads.cls, timms(path, timm, big_vision, images), atol=1e-4)
    assert (loaded.format, loaded.mean, loaded.std) == (".npz file", (0.5,) * 3, (0.5,) * 3)
    assert "mean and std 0.5 of images, and exact GELU, as timm reads these weights" in loaded.notes
    assert ("the class token's position is zero: it had none" in loaded.notes) == big_vision


def test_npz_is_recognised_as_a_vit_and_starts_a_deit(tmp_path):
    path = tmp_path / "w.npz"
    arrays = google(depth=12, width=192, heads=3)
    arrays["Transformer/posembed_input/pos_embedding"] = np.ones((1, 197, 192), np.float32)
    np.savez(path, **arrays)
    loaded = open_model(path)
    assert (loaded.name, loaded.image_size) == ("vit_tiny_patch16_224", 224)
    assert loaded.crop_ratio == 0.9
    model = base.get_model_config("deit_tiny_distilled_patch16_224")
    model.image_size = 48
    start = load_variables(path, model, 7, head="drop")
    assert start.model.distilled
    assert "heads dropped: 5 -> 7 classes" in start.notes
    six = google(depth=12, width=192, heads=6)
    np.savez(path, **six | {k: v for k, v in arrays.items() if "posembed" in k})
    with pytest.raises(UserError, match="has 6 heads of attention, vit_tiny_patch16_224 has 3"):
        open_model(path)


def test_what_a_npz_file_does_not_say_is_refused_in_one_line(tmp_path):
    path, arrays = tmp_path / "w.npz", google()
    pooled = {k: v for k, v in arrays.items() if k != "cls"} | {"MAPHead_0/probe": np.ones((1, 1))}
    for case, match in (
        (pooled, "no class token"),
        ({"a/kernel": np.ones(3), "emb/kernel": np.ones((2, 3))}, "no model's names .*emb.weight"),
        (arrays | {"pre_logits/bias": np.ones(3)}, "pre_logits: a layer before the head"),
        ({"x": np.array([{}, None], dtype=object)}, "w.npz is damaged"),
    ):
        np.savez(path, **case)
        with pytest.raises(UserError, match=match) as caught:
            load_variables(path, config_of(SHAPE, "vit_tiny_patch16_224"), CLASSES)
        assert "\n" not in str(caught.value)
    np.savez_compressed(path, **arrays)
    with pytest.raises(UserError, match=r"entries of the zip file are larger|not compressed"):
        open_model(path)


def test_bfloat16_of_big_vision_is_read(tmp_path):
    path, arrays = tmp_path / "w.npz", google(big_vision=True)
    halves = {f"params/{k}": v.astype(ml_dtypes.bfloat16) for k, v in arrays.items()}
    np.savez(path, **halves)
    loaded = load_variables(path, config_of(SHAPE, "vit_tiny_patch16_224"), CLASSES)
    expected = halves["params/embedding/kernel"].astype(np.float32)
    ours = loaded.variables["params"]["patch_embed"]["proj"]["kernel"]
    np.testing.assert_array_equal(ours, expected)


TREES = ["ours", "google", "timm-like", "state"]


def tree_of(kind, first):
    if kind == "google":
        return {"params": nested(google())}
    params = first.variables["params"]
    if kind == "timm-like":  # blocks as a dict of numbers
        blocks = {str(i): params[f"blocks_{i}"] for i in range(DEPTH)}
        rest = {k: v for k, v in params.items() if not k.startswith("blocks_")}
        return {"backbone": rest | {"blocks": blocks}}
    if kind == "state":
        average = jax.tree.map(lambda x: x + 1, params)
        moments = {"0": {"mu": params, "count": np.int32(3)}}
        return {"step": 3, "params": params, "ema_params": average, "opt_state": moments}
    return first.variables


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize("container", ["msgpack", "orbax", "steps", "named"])
def test_trees_of_other_code_are_read(kind, container, tmp_path):
    first = opened(PLAIN, SHAPE)
    tree, path = tree_of(kind, first), tmp_path / "w"
    if container == "msgpack":
        path.write_bytes(flax.serialization.msgpack_serialize(tree))
    elif container == "orbax":
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    else:
        names = ("state", "meta") if container == "named" else None
        with ocp.CheckpointManager(path, item_names=names) as manager:
            args = ocp.args.StandardSave(tree)
            if names:
                args = ocp.args.Composite(state=args, meta=ocp.args.JsonSave({"a": 1}))
            for step in (9, 10):
                manager.save(step, args=args)
            manager.wait_until_finished()
    loaded = load_variables(path, config_of(SHAPE), 5 if kind == "google" else 3)
    if kind != "google":
        assert_same(loaded.variables["params"], first.variables["params"])
    if kind == "state":
        taken = load_variables(path, config_of(SHAPE), 3, ema=True)
        expected = first.variables["params"]["cls_token"] + 1
        np.testing.assert_array_equal(taken.variables["params"]["cls_token"], expected)
    expected = "Flax msgpack file" if container == "msgpack" else "Orbax checkpoint"
    assert loaded.format == expected


@pytest.mark.parametrize(("name", "overrides"), FAMILIES[3:])
def test_convnets_with_their_statistics_are_read(name, overrides, tmp_path):
    first, path = opened(name, overrides), tmp_path / "w.msgpack"
    path.write_bytes(flax.serialization.msgpack_serialize(first.variables))
    loaded = load_variables(path, config_of(overrides, name), 3)
    assert_same(loaded.variables, first.variables)


def test_hugging_faces_flax_folder_is_read(tmp_path):
    """Its names are those of the PyTorch file, slashes for dots, kernels turned."""
    first = opened(PLAIN, TINY)
    huggingface.write(first, tmp_path / "hf")
    arrays = {}
    for name, value in to_torch(first.variables, "huggingface").items():
        *modules, leaf = name.split(".")
        if leaf == "weight":
            leaf = "scale" if "norm" in modules[-1] else "kernel"
            axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim]
            value = np.ascontiguousarray(value.transpose(axes))
        arrays["/".join([*modules, leaf])] = value
    (tmp_path / "hf" / "model.safetensors").unlink()
    content = flax.serialization.msgpack_serialize(nested(arrays))
    (tmp_path / "hf" / "flax_model.msgpack").write_bytes(content)
    loaded = open_model(tmp_path / "hf")
    assert_same(loaded.variables, first.variables)
    assert (loaded.mean, loaded.classes, loaded.format) == (
        first.mean,
        first.classes,
        "Hugging Face folder",
    )


def test_a_class_position_is_folded_into_the_token_and_back(tmp_path):
    model = config_of(SMALL)
    first = opened(PLAIN, SMALL)
    path = tmp_path / "w.msgpack"
    path.write_bytes(flax.serialization.msgpack_serialize(first.variables))
    images, expected = logits(first.model, first.variables)
    from deit_jax.weights.fit import fit

    without = fit(load_variables(path, model, 3), first.model.clone(class_position=False), "cls", 0)
    heads = jax.jit(without.model.apply)(without.variables, images)
    np.testing.assert_allclose(heads.cls, expected.cls, atol=1e-5)
    again = fit(without, first.model, "cls", 0)
    heads = jax.jit(again.model.apply)(again.variables, images)
    np.testing.assert_allclose(heads.cls, expected.cls, atol=1e-5)


def test_orbax_folders_of_something_else_are_refused_in_one_line(tmp_path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", {"dense": {"kernel": np.ones((2, 3))}})
        for part in ("left", "right"):
            checkpointer.save(tmp_path / "two" / part, {"x": np.ones(2)})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "_METADATA").write_text("{")
    (tmp_path / "empty").mkdir()
    for name, match in (
        ("a", "no model's names among its arrays; .*dense.weight"),
        ("two", "several trees: left, right; give the folder of one"),
        ("broken", "broken: an Orbax checkpoint that tells of no tree"),
        ("empty", "holds neither model.safetensors"),
    ):
        with pytest.raises(UserError, match=match) as caught:
            open_model(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_msgpack_that_claims_much_takes_little(tmp_path):
    path = tmp_path / "w.msgpack"
    deep = b"\x81\xa1a" + b"\xdd\x00\x00\x27\x10" * 400
    huge = b"\x81\xa1a\xdd\xff\xff\xff\xff"
    wrong = msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([9], b"float32", b"xx")))})
    objects = msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([1], b"object", b"x" * 8)))})
    for content in (deep, huge, wrong, objects, b"\x81", b"\xdf\xff\xff\xff\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"w\.msgpack is damaged"):
            readers.read(path)


def test_a_zip_with_both_kinds_of_entries_is_no_npz(tmp_path):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"x")
        archive.writestr("b.json", json.dumps({}))
    with pytest.raises(ValueError, match=r"without data\.pkl is not a PyTorch file"):
        readers.read(path)

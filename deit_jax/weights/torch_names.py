"""Translate weights between our variables and the names and layouts of PyTorch's ecosystem.

Our parameter paths are timm's module names, so one rule (`_timm_name`) covers every family; a
family's own file in models/ lists the names by which other publishers call the same things. All
functions are pure: readers.py reads the files, load.py puts the two together.
"""

import contextlib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deit_jax.models import registry
from deit_jax.models.deit import DEIT_NAMES, HUGGING_FACE_NAMES
from deit_jax.models.family import ModelSpec
from deit_jax.models.pos_embed import grid_of
from deit_jax.models.registry import create_model, family_of
from deit_jax.models.vit import VisionTransformer
from deit_jax.shapes import input_shape, sides

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# Axes of a kernel by its rank: HWIO to OIHW and IO to OI, and back.
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}
_ANY_TRANSFORMER = "deit_tiny_patch16_224"  # all have the same names
_SHOWN = 6  # names listed in an error message

Flat = dict[str, np.ndarray]


def from_torch(flat: Mapping[str, np.ndarray], model_name: str, **overrides: Any) -> dict[str, Any]:
    """Return our float32 variables of a model from tensors under any published names.

    The numbers of classes and input channels are the file's; `overrides` are create_model's (a
    different image_size).
    Raise ValueError naming every tensor that is missing, unexpected or of another shape.
    """
    model = create_model(model_name, **overrides)
    sources = canonical_names(flat, model)
    flat = _fuse_qkv({name: flat[source] for name, source in sources.items()})
    classes = num_classes(flat, model)
    if classes is not None and "num_classes" not in overrides:
        model = model.clone(num_classes=classes)
    if (channels := input_channels(flat, model)) and "in_channels" not in overrides:
        model = model.clone(in_channels=channels)
    expected = {_timm_name(path): (path, leaf.shape) for path, leaf in leaves(shapes(model))}
    check(flat, {name: _torch_shape(*value) for name, value in expected.items()}, sources)
    variables: dict[str, Any] = {}
    for name, (path, _) in expected.items():
        *parents, leaf = path.split("/")
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, variables)
        value = np.asarray(flat[name]).astype(np.float32)
        axes = _FROM_TORCH[value.ndim] if leaf == "kernel" else range(value.ndim)
        node[leaf] = np.ascontiguousarray(value.transpose(*axes))
    return variables


def without_hidden_head(flat: Flat, anew: bool) -> tuple[Flat, list[str]]:
    """Return tensors without the layer before a head that starts `anew`, and a note on it.

    Raise ValueError for a head whose input no model here has.
    """
    if any(name.startswith("fc_norm.") for name in flat):
        raise ValueError(
            "fc_norm: its head reads the mean of the patches (global average pooling), the models "
            "here the class token; take the weights from before that fine-tuning"
        )
    hidden = [name for name in flat if name.startswith("pre_logits.")]
    if hidden and not anew:
        raise ValueError("pre_logits: a layer before the head; head='drop' leaves both out")
    note = ["pre_logits, the layer before the head: left out"] if hidden else []
    return {name: value for name, value in flat.items() if name not in hidden}, note


def transformer_fields(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return what tensors tell of the vision transformer they belong to; {} if they are no such.

    The keys are create_model's overrides; `layer_scale` is only whether there is one. The number of
    attention heads cannot be seen.
    """
    sources = canonical_names(flat, create_model(_ANY_TRANSFORMER))
    shape = {name: flat[source].shape for name, source in sources.items()}
    if not ("cls_token" in shape or "pos_embed" in shape):
        return {}
    blocks = {int(match[1]) for name in shape if (match := re.match(r"blocks\.(\d+)\.", name))}
    fields = {
        "depth": max(blocks, default=-1) + 1,
        "distilled": "dist_token" in shape or "head_dist.weight" in shape,
        "layer_scale": "blocks.0.ls1.gamma" in shape,
    }
    if fields["distilled"] and "head.weight" in shape and "head_dist.weight" not in shape:
        fields["dist_head"] = False  # Hugging Face's DeiTForImageClassification
    if "patch_embed.proj.weight" in shape:
        fields["width"], *_, fields["patch_size"] = shape["patch_embed.proj.weight"]
        fields["in_channels"] = shape["patch_embed.proj.weight"][1]
    if len(shape.get("pos_embed", ())) == 3:
        fields["positions"] = shape["pos_embed"][1]
    for prefix in (0, 1 + fields["distilled"]) if len(shape.get("pos_embed", ())) == 3 else ():
        with contextlib.suppress(ValueError):
            fields["grid"] = grid_of(shape["pos_embed"][1], prefix)
            fields["class_position"] = prefix > 0
    return fields


def candidates(flat: Mapping[str, np.ndarray], preferred: str = "deit") -> list[str]:
    """Return the registered names whose model these tensors may belong to.

    Transformers are told apart by their sizes, convnets by their number of blocks: one missing
    tensor does not hide the model. Of several with the same shapes those count whose names begin as
    is `preferred`: a file that does not say what it is is a DeiT's.
    """
    if fields := transformer_fields(flat):
        if preferred == "vit_":  # big_vision's class tokens have no position
            fields.pop("class_position", None)
        names = [name for name, spec in registry.specs().items() if _agrees(fields, spec)]
        names = [name for name in names if name.startswith(preferred)] or names
        sized = [
            name for name in names if create_model(name).grid_size == sides(fields.get("grid", 0))
        ]
        return sized or names
    names = []
    for family in registry.FAMILIES.values():
        if blocks := family.blocks_in(flat):
            models = {name: create_model(name) for name in family.specs}
            names += [n for n, model in models.items() if family.count_blocks(model) == blocks]
    return names if len(names) < 2 else [name for name in names if _fits(flat, name)]


def twin(name: str) -> str | None:
    """Return the plain ViT with the shapes of a DeiT, None without one."""
    other = f"vit_{name.removeprefix('deit_')}"
    return other if name.startswith("deit_") and other in registry.specs() else None


_OF_INPUT = ("grid", "positions", "dist_head", "in_channels")  # no part of a name


def _agrees(fields: dict[str, Any], spec: ModelSpec) -> bool:
    defaults = {"class_position": True, "distilled": False, "layer_scale": None}
    known = defaults | spec.kwargs
    known["layer_scale"] = known["layer_scale"] is not None
    same = all(known.get(key) == value for key, value in fields.items() if key not in _OF_INPUT)
    return spec.cls is VisionTransformer and same


def _fits(flat: Mapping[str, np.ndarray], name: str) -> bool:
    try:
        from_torch(flat, name)
    except ValueError:
        return False
    return True


def to_torch(variables: Mapping[str, Any], dialect: str = "timm") -> Flat:
    """Return a model's tensors under the names of `timm`, `deit` or `huggingface`.

    Raise ValueError if the dialect has no name for a tensor.
    """
    flat = {}
    for path, leaf in leaves(variables):
        name, value = _timm_name(path), np.asarray(leaf)
        flat[name] = np.ascontiguousarray(value.transpose(*_torch_axes(path, value.ndim)))
        if name.endswith(".running_mean"):  # PyTorch's strict load asks for its step counter
            counter = name.removesuffix("running_mean") + "num_batches_tracked"
            flat[counter] = np.zeros((), np.int64)
    if dialect == "timm":
        return flat
    if dialect == "deit":
        table = tuple(row[::-1] for row in DEIT_NAMES)
        return {_rename(name, table) or name: value for name, value in flat.items()}
    if dialect == "huggingface":
        return _to_hugging_face(flat)
    raise ValueError(f"unknown dialect {dialect!r}: timm, deit or huggingface")


def num_classes(flat: Flat, model) -> int | None:
    """Return how many classes the head in a file knows, 0 for a file without any head.

    `flat` has timm's names. None where it tells not: of several heads the first is missing.
    """
    heads = [head.replace("/", ".") for head in family_of(model).heads]
    if f"{heads[0]}.weight" in flat:
        return flat[f"{heads[0]}.weight"].shape[0]
    return None if any(name.rpartition(".")[0] in heads for name in flat) else 0


def input_channels(flat: Flat, model) -> int | None:
    """Return how many channels the convolution that reads the image has; None where it tells not.

    `flat` has timm's names.
    """
    kernel = flat.get(f"{family_of(model).stem.replace('/', '.')}.weight")
    if kernel is None or kernel.ndim != 4 or not hasattr(model, "in_channels"):
        return None
    return kernel.shape[1]


def shapes(model) -> dict[str, Any]:
    """Return the shapes of a model's variables, computing nothing."""
    size = getattr(model, "image_size", 64)  # the convolutional models take any size
    images = jax.ShapeDtypeStruct(input_shape(model, size), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf); a path starts with its collection (`params`, `batch_stats`)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _timm_name(path: str) -> str:
    """Translate `params/blocks_0/attn/qkv/kernel` to `blocks.0.attn.qkv.weight`."""
    _, *modules, leaf = path.split("/")
    if modules and modules[0].startswith("blocks_"):
        modules[0] = modules[0].replace("_", ".")
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def _torch_axes(path: str, ndim: int) -> tuple[int, ...]:
    return _TO_TORCH[ndim] if path.endswith("/kernel") else tuple(range(ndim))


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _torch_axes(path, len(shape)))


def canonical_names(names: Iterable[str], model) -> dict[str, str]:
    """Map timm's name of every tensor to the name that it has in the file."""
    family, sources = family_of(model), {}
    for source in names:
        name = source.removeprefix("module.")  # DistributedDataParallel's
        if name.endswith(".num_batches_tracked"):
            continue
        name = family.rewrite(name, model)
        name = _rename(name, family.aliases) or name
        if name in sources:
            raise ValueError(f"{sources[name]} and {source} are both {name}")
        sources[name] = source
    return sources


def _rename(name: str, table: tuple[tuple[str, ...], ...]) -> str | None:
    """Return the name that the first fitting row of a table gives, None if no row fits."""
    for target, *aliases in table:
        for alias in aliases:
            if match := _pattern(alias).fullmatch(name):
                *indices, rest = match.groups()
                for index in indices:
                    target = target.replace("#", index, 1)
                return target + rest
    return None


@functools.cache
def _pattern(alias: str) -> re.Pattern[str]:
    return re.compile(re.escape(alias).replace(r"\#", r"(\d+)") + r"(|\.[^.]+)")


def _fuse_qkv(flat: Flat) -> Flat:
    """Stack separate projections (`attn.q`, `attn.k`, `attn.v`) into timm's `attn.qkv`."""
    fused = {}
    for name, value in flat.items():
        match = re.fullmatch(r"(blocks\.\d+\.attn\.)([qkv])(\.\w+)", name)
        q, k, v = (f"{match[1]}{part}{match[3]}" if match else "" for part in "qkv")
        unbiased = q in flat and v in flat and k not in flat and k.endswith("bias")  # BEiT's keys
        if not match or any(part not in flat for part in (q, v, *(() if unbiased else (k,)))):
            fused[name] = value
        elif match[2] == "q":
            keys = np.zeros_like(flat[q]) if unbiased else flat[k]
            fused[f"{match[1]}qkv{match[3]}"] = np.concatenate([flat[q], keys, flat[v]])
    return fused


def _to_hugging_face(flat: Flat) -> Flat:
    """Rename a vision transformer as Hugging Face's files do.

    Those with a dist_token are DeiT, those with layer scale BEiT, which has no bias of keys: it
    adds the same to all scores of a query, and the softmax takes it out again.
    """
    model = "deit" if "dist_token" in flat else "vit"
    model = "beit" if "blocks.0.ls1.gamma" in flat else model
    split = {}
    for name, value in flat.items():
        if ".attn.qkv." in name:
            parts = dict(zip("qkv", np.split(value, 3), strict=True))
            split |= {name.replace("qkv", key): part for key, part in parts.items()}
            if model == "beit":
                split.pop(name.replace("qkv.bias", "k.bias"), None)
        else:
            split[name] = value
    # Only a model with a second head calls the first one cls_classifier.
    head = "cls_classifier" if "head_dist.weight" in flat else "classifier"
    table = tuple((row[1], row[0]) for row in HUGGING_FACE_NAMES if row[0] != "head")
    renamed = {}
    for name, value in split.items():
        new = _rename(name, (*table, (head, "head")))
        if new is None:
            raise ValueError(f"Hugging Face's {model} has no name for {name} {value.shape}")
        renamed[new if "classifier" in new else f"{model}.{new}"] = value
    return renamed


_POSITIONS = "embeddings.position_embeddings"


def with_class_position(flat: Flat, prefix: int) -> Flat:
    """Return a Hugging Face folder's tensors with positions of zeros for `prefix` tokens."""
    name = next(n for n in flat if n.endswith(_POSITIONS))
    zeros = np.zeros_like(flat[name], shape=(1, prefix, flat[name].shape[-1]))
    return flat | {name: np.concatenate([zeros, flat[name]], axis=1)}


def without_zero_position(flat: Flat) -> tuple[Flat, dict[str, Any]]:
    """Return a Hugging Face folder's tensors, a class position of zeros beside layer scale gone.

    So DeiT III, whose class token has none, comes back as it went. With layer scale the override
    `class_position` says whether there is one.
    """
    name = next((n for n in flat if n.endswith(_POSITIONS)), None)
    if name is None or not any(".lambda_1" in n for n in flat):
        return flat, {}
    if flat[name][:, 0].any():
        return flat, {"class_position": True}
    return flat | {name: flat[name][:, 1:]}, {"class_position": False}


def check(
    flat: Mapping[str, Any], expected: dict[str, tuple[int, ...]], sources: Mapping[str, str]
) -> None:
    """Raise ValueError unless exactly the expected names are there, with the expected shapes."""
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in flat]
    for name, value in flat.items():
        label = f"{sources.get(name, name)} {value.shape}"
        if name not in expected:
            problems.append(f"unexpected {label}")
        elif value.shape != expected[name]:
            problems.append(f"{label} should be {expected[name]}")
    if problems:
        more = len(problems) - _SHOWN
        tail = f", and {more} more" if more > 0 else ""
        raise ValueError(f"weights do not fit: {', '.join(problems[:_SHOWN])}{tail}")

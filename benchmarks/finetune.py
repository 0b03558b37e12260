"""Fine-tune on a thousand images with configs/finetune.py, and the same with timm and PyTorch.

    python benchmarks/finetune.py --idx=/usr/share/datasets/fashion-mnist [--seeds=3] > RESULT.json

No published weights are at hand, so a small DeiT is first trained on Fashion-MNIST (Debian's
package dataset-fashion-mnist) and then fine-tuned on scikit-learn's handwritten digits, of which
two fifths are held out: 1079 images to learn from. PyTorch has timm's model, its groups of layer
decay, its cosine schedule and its label smoothing, with the weights and the batches that ours
begins with; the model has no stochastic depth, whose draws would differ. A few minutes on two CPU
cores.
"""

import argparse
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from deit_jax.configs import base, finetune  # noqa: E402
from deit_jax.data.batches import EvalBatches  # noqa: E402
from deit_jax.data.view import EvalView, reading_of  # noqa: E402
from deit_jax.storage import read_lines  # noqa: E402
from deit_jax.train import run as run_lib  # noqa: E402
from deit_jax.train.experiment import prepare  # noqa: E402
from deit_jax.train.run import starting_weights, train  # noqa: E402
from deit_jax.weights.torch_names import to_torch  # noqa: E402
from tests.timm_reference import import_timm  # noqa: E402

SIDE, PATCH, WIDTH, DEPTH, HEADS = 32, 8, 96, 6, 3
SHAPE = {"image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "depth": DEPTH}
ARMS = {
    "configs/finetune.py": {},
    "from scratch": {"init.weights": "", "init.required": False, "optim.layer_decay": 1.0},
    "without layer decay": {"optim.layer_decay": 1.0},
    "linear probe": {"optim.tune": "linear_probe", "optim.layer_decay": 1.0},
    "attention only": {"optim.tune": "attention_only"},
    "blocks 0 to 2 and patches frozen": {"optim.freeze": "blocks_[0-2],patch_embed"},
}


def pretraining(idx: str):
    """Return the config of the model that everything begins with."""
    c = base.get_config()
    c.model.name, c.model.num_heads, c.model.drop_path = "deit_tiny_patch16_224", HEADS, 0.0
    c.model.update(SHAPE)
    c.data.source, c.data.dir, c.data.eval_crop_ratio = "fashion_mnist", idx, 1.0
    c.data.eval_split = "test"
    c.batch_size, c.epochs, c.optim.lr, c.optim.warmup_epochs = 128, 4.0, 1e-3, 0.5
    c.augment.auto, c.augment.repeats, c.augment.crop_scale = "", 1, (0.5, 1.0)
    c.mixing.prob, c.augment.erase_prob, c.optim.ema_decay = 0.0, 0.0, 0.0
    return c


def tuning(weights: Path, seed: int, changes: dict):
    """Return configs/finetune.py for digits, which are not mirrored, and the small model."""
    c = finetune.get_config("data=digits,variant=tiny")
    c.model.num_heads, c.model.drop_path = HEADS, 0.0
    c.model.update(SHAPE)
    c.init.weights, c.seed = str(weights), seed
    c.data.eval_fraction, c.data.eval_crop_ratio, c.augment.flip_prob = 0.4, 1.0, 0.0
    c.epochs, c.train.patience_epochs = 30.0, 0.0  # all arms as long
    c.update_from_flattened_dict(changes)
    return c


def with_torch(config, folder: Path) -> dict:
    """Fine-tune as the config says with timm and PyTorch; return top-1 and every step's loss."""
    timm = import_timm()
    import torch
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import param_groups_layer_decay
    from timm.scheduler import CosineLRScheduler

    torch.set_num_threads(1)  # more would wait for each other where others use the cores
    experiment, dataset = prepare(config)
    start = starting_weights(experiment, folder, dataset.classes)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=10,
    )
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in to_torch(start).items()})
    optim, per_epoch = experiment.config.optim, experiment.order.steps_per_epoch
    groups = param_groups_layer_decay(
        model, optim.weight_decay, model.no_weight_decay(), layer_decay=optim.layer_decay
    )
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.b1, optim.b2), eps=optim.eps)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=experiment.total_steps,
        lr_min=optim.min_lr,
        warmup_lr_init=optim.warmup_lr,
        warmup_t=int(optim.warmup_epochs * per_epoch),
        t_in_epochs=False,
    )
    loss_of, losses = LabelSmoothingCrossEntropy(config.loss.smoothing), []
    model.train()
    batches = experiment.loaded(experiment.batches(dataset), 0, experiment.total_steps)
    for step, batch in enumerate(batches):
        schedule.step_update(step)
        loss = loss_of(
            model(pixels(torch, batch, experiment)), torch.from_numpy(batch["label"]).long()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    view = EvalView(SIDE, config.data.eval_crop_ratio, reading_of(config.data))
    held_out = EvalBatches(dataset.eval, len(dataset.eval), view, list(range(len(dataset.eval))))
    batch = held_out(0)
    model.eval()
    with torch.no_grad():
        said = model(pixels(torch, batch, experiment)).argmax(1).numpy()
    return {"top1": 100.0 * float(np.mean(said == batch["label"])), "losses": losses}


def pixels(torch, batch, experiment):
    """Return images as PyTorch takes them, normalised."""
    mean, std = (np.float32(x) for x in (experiment.settings.mean, experiment.settings.std))
    images = (batch["image"].astype(np.float32) / 255 - mean) / std
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def measure(name: str, weights: Path, seed: int, folder: Path) -> dict:
    """Train one arm; return its accuracy, steps and losses."""
    workdir = folder / f"{name.replace('/', '-')}-{seed}"
    results = train(tuning(weights, seed, ARMS[name]), workdir)
    losses = [r["loss"] for r in read_lines(workdir / "metrics.jsonl") if "loss" in r]
    return {"top1": results["fused"]["top1"], "steps": results["step"], "losses": losses}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--idx", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", default="", help="keep the runs there, and go on from them")
    parser.add_argument("--arms", type=int, default=len(ARMS), help="only the first so many")
    given = parser.parse_args()
    run_lib._draw = lambda trainer, results: None
    folder = Path(given.folder or tempfile.mkdtemp())
    pretrained = train(pretraining(given.idx), folder / "pretrained")
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {processor()}",
        "pretrained_top1": pretrained["fused"]["top1"],
        "arms": {},
    }
    for name in list(ARMS)[: given.arms]:
        runs = [measure(name, folder / "pretrained", s, folder) for s in range(given.seeds)]
        result["arms"][name] = {key: [r[key] for r in runs] for key in ("top1", "steps")}
        print(name, result["arms"][name], file=sys.stderr)
        if name == "configs/finetune.py":
            theirs = [
                with_torch(tuning(folder / "pretrained", s, {}), folder) for s in range(given.seeds)
            ]
            differences = [
                max(abs(a - t["losses"][10 * i + 9]) for i, a in enumerate(r["losses"][:-1]))
                for r, t in zip(runs, theirs, strict=True)
            ]
            result["timm"] = {
                "top1": [t["top1"] for t in theirs],
                "largest_difference_of_losses": differences,
            }
            print("timm", result["timm"], file=sys.stderr)
    print(json.dumps(result, indent=1))


def processor() -> str:
    """Return the CPU's name, as far as it tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


if __name__ == "__main__":
    main()

"""The whole recipe in timm and PyTorch: from the same files, by the same numbers of a config.

Everything is timm's own: loader and transforms, RandAugment, erasing, sampler of repeated
augmentation, mixup and cutmix, model, TokenDistillationTask, AdamW with its groups, schedule and
moving average. Of ours are the config that the numbers are read from, the teacher's weights and,
where a study asks for it, what the epochs are shuffled by.
"""

import random
from pathlib import Path
from unittest import mock

import numpy as np
import portalocker
from PIL import Image
from study import open_dataset

from deit_jax.cli import convert
from deit_jax.data.order import EpochOrder
from tests import timm_reference

torch = timm_reference.import_torch()
timm = timm_reference.import_timm()

from timm import data as timm_data  # noqa: E402
from timm import utils as timm_utils  # noqa: E402
from timm.data import auto_augment  # noqa: E402
from timm.data.distributed_sampler import RepeatAugSampler  # noqa: E402
from timm.layers import ClassifierHead, ConvNormAct  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.models.regnet import RegStage  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.task import TokenDistillationTask  # noqa: E402

CPU = torch.device("cpu")


def posterize(image, bits: int, **fill):
    """Posterize as timm does on Pillow 12: 0 bits, which Pillow 13 refuses, are black."""
    return auto_augment.posterize(image, bits) if bits else Image.new("RGB", image.size)


auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize


class Images(torch.utils.data.Dataset):
    """A source's images as Pillow's, through a transform that timm's loader puts in."""

    def __init__(self, source):
        self.source, self.transform = source, None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.source[index]["image"]).convert("RGB")
        return self.transform(image), int(self.source.labels[index])


class Convnet(torch.nn.Module):
    """The teacher of study.py, of timm's parts: its own RegNets have four stages, this one two."""

    def __init__(self, config, classes: int):
        super().__init__()
        self.stem = ConvNormAct(3, config.stem_width, 3, stride=2)
        widths = (config.stem_width, *config.widths)
        for i, depth in enumerate(config.depths):
            stage = RegStage(
                depth,
                widths[i],
                widths[i + 1],
                stride=2,
                dilation=1,
                group_size=min(config.group_width, widths[i + 1]),
                bottle_ratio=1.0,
                se_ratio=0.25,
            )
            self.add_module(f"s{i + 1}", stage)
        self.head = ClassifierHead(widths[-1], classes)

    def forward(self, x):
        """Return logits [B K] of normalised images [B 3 H W]."""
        for stage in list(self.children()):
            x = stage(x)
        return x


def teacher(workdir: Path, model, classes: int):
    """Return the network of a run of study.py, frozen; its weights go through `deit convert`."""
    path = workdir / "timm.safetensors"
    if not path.exists():
        convert.main([str(workdir), str(path), "--to=timm"])
    from safetensors.torch import load_file

    network = Convnet(model, classes)
    network.load_state_dict(load_file(path))
    return network.eval()


def student(config, classes: int):
    """Return timm's distilled DeiT at the sizes of a config."""
    m = config.model
    return timm.create_model(
        "deit_tiny_distilled_patch16_224",
        img_size=m.image_size,
        patch_size=m.patch_size,
        embed_dim=m.width,
        depth=m.depth,
        num_heads=m.num_heads,
        drop_path_rate=m.drop_path,
        num_classes=classes,
    )


def train_loader(config, source, workers: int):
    """Return timm's loader of training batches; erasing is part of its transforms, as in DeiT."""
    a, size = config.augment, config.model.image_size
    return timm_data.create_loader(
        Images(source),
        (3, size, size),
        config.batch_size,
        is_training=True,
        re_prob=a.erase_prob,
        re_mode="pixel",
        scale=tuple(a.crop_scale),
        ratio=tuple(a.crop_ratio),
        hflip=a.flip_prob,
        color_jitter=a.color_jitter,
        auto_augment=a.auto,
        num_aug_repeats=a.repeats,
        interpolation="bicubic",
        num_workers=workers,
        distributed=True,  # or there is no repeated augmentation
        use_prefetcher=False,
        device=CPU,
    )


class OurOrder(RepeatAugSampler):
    """timm's sampler over the shuffles of our run of the same seed.

    By itself it shuffles by the number of the epoch alone: runs of all seeds share their order.
    """

    def __init__(self, source, config):
        super().__init__(source, num_repeats=config.augment.repeats)
        sizes = (len(source), config.batch_size, config.augment.repeats)
        self.shuffled = EpochOrder(*sizes, config.seed).shuffled()

    def __iter__(self):
        def permutation(count, generator):
            first = self.epoch * count
            return torch.tensor([int(self.shuffled[first + i]) for i in range(count)])

        with mock.patch.object(torch, "randperm", permutation):
            return super().__iter__()


def eval_loader(config, source):
    """Return timm's loader of whole test images."""
    size = config.model.image_size
    return timm_data.create_loader(
        Images(source),
        (3, size, size),
        500,
        interpolation="bicubic",
        crop_pct=config.data.eval_crop_ratio,
        num_workers=0,
        use_prefetcher=False,
        device=CPU,
    )


def mixup(config, classes: int):
    """Return timm's mixup and cutmix, which smooths the labels too."""
    m = config.mixing
    return timm_data.Mixup(
        mixup_alpha=m.mixup_alpha,
        cutmix_alpha=m.cutmix_alpha,
        prob=m.prob,
        switch_prob=m.switch_prob,
        label_smoothing=config.loss.smoothing,
        num_classes=classes,
    )


class Training:
    """A run by timm: what timm's train.py makes of its arguments, and one update.

    `network` is the teacher; without workers one core does all, as on our side. With `our_order`
    images are met in the order of our run of the seed.
    """

    def __init__(self, config, dataset, network, workers: int = 0, our_order: bool = False):
        classes, o = len(dataset.classes), config.optim
        start_process_group()
        timm_utils.random_seed(config.seed, 0)
        self.loader = train_loader(config, dataset.train, workers)
        self.order = self.loader.batch_sampler.sampler
        if our_order:
            self.order = self.loader.batch_sampler.sampler = OurOrder(dataset.train, config)
        self.mixup = mixup(config, classes)
        self.model = student(config, classes)
        self.task = TokenDistillationTask(
            student_model=self.model,
            teacher_model=network.eval().requires_grad_(False),
            criterion=SoftTargetCrossEntropy(),
            distill_type="hard",
            task_loss_weight=1 - config.distill.alpha,
            device=CPU,
            verbose=False,
        ).train()
        self.optimizer = create_optimizer_v2(
            self.model, "adamw", lr=o.lr, weight_decay=o.weight_decay, eps=o.eps
        )
        self.average = timm_utils.ModelEmaV3(self.model, decay=o.ema_decay)
        self.schedule, _ = create_scheduler_v2(
            self.optimizer,
            "cosine",
            num_epochs=int(config.epochs),
            min_lr=o.min_lr,
            warmup_lr=o.warmup_lr,
            warmup_epochs=o.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=len(self.loader),
        )
        self.updates = 0

    def update(self, images, labels) -> float:
        """Take one step and return its loss."""
        loss = self.task(*self.mixup(images, labels))["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.model)
        self.updates += 1
        self.schedule.step_update(self.updates)
        return loss.item()

    def epoch(self, number: int) -> float:
        """Train for an epoch and return its mean loss."""
        self.order.set_epoch(number)
        return float(np.mean([self.update(*batch) for batch in self.loader]))

    def state(self) -> dict:
        """Return all that a run goes on from."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.module.state_dict(),
            "updates": self.updates,
            "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        }

    def load(self, state: dict) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.module.load_state_dict(state["average"])
        self.updates = state["updates"]
        own, numpys, torchs = state["random"]
        random.setstate(own)
        np.random.set_state(numpys)
        torch.set_rng_state(torchs)


def start_process_group() -> None:
    """Make this process a group of one: timm repeats augmentation in distributed training alone."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


@torch.inference_mode()
def accuracy(model, loader) -> dict[str, float]:
    """Return top-1 of each head and of both, as timm's model averages them."""
    model.eval()
    right, count = {"cls": 0, "dist": 0, "fused": 0}, 0
    for images, labels in loader:
        tokens = model.forward_features(images)
        said = {"cls": model.head(tokens[:, 0]), "dist": model.head_dist(tokens[:, 1])}
        said["fused"] = model(images)
        for name, logits in said.items():
            right[name] += (logits.argmax(1) == labels).sum().item()
        count += len(labels)
    return {name: 100 * number / count for name, number in right.items()}


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    """Return the parameters that a run ended with, by timm's names."""
    model = torch.load(workdir / "last.pt", weights_only=False)["model"]
    return {name: value.numpy() for name, value in model.items()}


def judge(module, loader) -> float:
    """Return top-1 of a network of one head."""
    found = [(module(images).argmax(1) == labels).float() for images, labels in loader]
    return 100 * torch.cat(found).mean().item()


def train_once(
    config, teacher_run: Path, teacher_model, workdir: Path, our_order: bool = False
) -> dict:
    """Train a run by timm, or go on from its last epoch; return its accuracies."""
    print(f"== {workdir}", flush=True)
    workdir.mkdir(parents=True, exist_ok=True)
    with portalocker.Lock(workdir / "lock", timeout=1):
        dataset = open_dataset(config.data)
        network = teacher(teacher_run, teacher_model, len(dataset.classes))
        run = Training(config, dataset, network, our_order=our_order)
        path = workdir / "last.pt"
        if path.exists():
            run.load(torch.load(path, weights_only=False))
        for number in range(run.updates // len(run.loader), int(config.epochs)):
            loss = run.epoch(number)
            print(f"epoch {number + 1}/{config.epochs:g}: loss {loss:.4f}", flush=True)
            torch.save(run.state(), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        loader = eval_loader(config, dataset.eval)
        with torch.inference_mode():
            known = judge(network, loader)
        heads = accuracy(run.model, loader)
        return heads | {"ema": accuracy(run.average.module, loader), "teacher": known}

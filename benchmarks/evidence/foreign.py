"""A teacher of another framework: timm's ResNet-18, trained by PyTorch on the students' images.

    python benchmarks/evidence/foreign.py --scale=cpu

It needs torch and timm (the extra `torch`). The network is turned into a teacher folder; students
learn its decisions through the distillation token, its features besides, or its features instead.
"""

from pathlib import Path

import numpy as np
from study import DATA, NONE, TOKEN, Arm, Study, base, open_dataset

from deit_jax.cli import convert

EXPECTED = """Written before the first run with a teacher. The paper teaches by RegNetYs and
says that convnets are the better teachers. Expected here: the student of the distillation token
is better than the one without a teacher in every seed, as with our own convnet (table 3);
features beside the decisions change little; features instead of them gain less, since nobody
tells the heads."""

NAME = "resnet18"
FEATURES = {"distill.feature_loss": "cosine"}
ARMS = [
    NONE,
    Arm("token-of-resnet18", TOKEN.changes, teacher=NAME),
    Arm(
        "token-and-features-of-resnet18",
        {**FEATURES, "distill.kind": "hard+feature"},
        teacher=NAME,
    ),
    Arm("features-of-resnet18", {**FEATURES, "distill.kind": "feature"}, teacher=NAME),
]
BATCH, LR, DECAY = 128, 0.1, 5e-4


class Foreign(Study):
    """A study whose teachers are timm's."""

    def teacher(self, name: str) -> Path:
        """Train a model of timm and write it as a teacher folder, unless it is there."""
        folder = self.runs / f"teacher-{name}"
        if not folder.exists():
            weights = self.runs / f"{name}.pth"
            train_in_torch(name, self.data, self.scale.teacher_epochs, weights)
            convert.main([f"timm:{name}@{weights}", str(folder), "--image_size=32"])
        return folder


def train_in_torch(name: str, data: Path, epochs: float, path: Path) -> None:
    """Train as torchvision's recipe for CIFAR has it: SGD, cosine, padded crops and flips."""
    import timm
    import torch

    config = base.get_config().data
    config.source, config.dir = DATA, str(data)
    source = open_dataset(config).train
    images = np.stack([source[i]["image"] for i in range(len(source))])
    pixels = torch.tensor(np.pad(images, ((0, 0), (2, 2), (2, 2))))[:, None].expand(-1, 3, -1, -1)
    labels = torch.tensor(np.asarray(source.labels, np.int64))
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=DECAY)
    steps = int(epochs * len(labels) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        chosen = torch.randint(len(labels), (BATCH,))
        x = (pixels[chosen].float() / 255 - mean) / std
        x = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
        top, left = torch.randint(5, (2,)).tolist()
        x = x[:, :, top : top + 32, left : left + 32]
        x = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, x.flip(-1), x)
        loss = torch.nn.functional.cross_entropy(model(x), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{name}: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    torch.save(model.state_dict(), path)


if __name__ == "__main__":
    Foreign("foreign", EXPECTED, __doc__).run(ARMS)

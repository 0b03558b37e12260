"""Random networks of torch that say something, and how their answers are compared."""

import jax
import numpy as np

RNG = np.random.default_rng(0)


def randomised(torch, model, size):
    """Return a network whose numbers matter everywhere: scales, gates, averages of batch norm."""
    torch.manual_seed(0)
    for name, value in model.state_dict().items():
        if value.ndim == 1 and value.is_floating_point() and "running" not in name:
            value.uniform_(0.6, 1.4) if name.endswith("weight") else value.normal_(0, 0.1)
        elif value.ndim > 1 and value.float().std() < 1e-3:  # heads with nothing to say at first
            value.normal_(0, 0.1)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(16, 3, size, size))  # or all that it says vanishes in its depth
        for norm in norms:
            norm.running_mean += 0.3 * torch.randn_like(norm.running_mean) * norm.running_var**0.5
            norm.running_var *= 0.7 + 0.6 * torch.rand_like(norm.running_var)
            norm.running_var += 0.1 * norm.running_var.mean()
    return model.eval()


def as_file(torch, timm, tmp_path, name, size, **options):
    """Return a random model of timm, and a file with its weights."""
    torch.manual_seed(0)
    model = randomised(torch, timm.create_model(name, **options), size)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / f"{name}.pth")
    return model, f"{tmp_path / name}.pth"


def answers(teacher, images):
    return {k: np.asarray(x) for k, x in jax.jit(teacher.apply)(teacher.params, images).items()}


def noise(count, size, channels=3):
    return RNG.normal(size=(count, size, size, channels)).astype(np.float32)


def by_torch(torch, function, images):
    with torch.no_grad():
        return function(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def close(said, wanted, tolerance=1e-4):
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(said / scale, wanted / scale, atol=tolerance)


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3)
        self.fc = nn.Linear(6, 4)
        self.register_buffer("count", torch.zeros(()))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.fc(self.drop(self.conv(x).relu()).mean((2, 3)))

def plain():
    torch.manual_seed(0)
    return Net()

def five():
    torch.manual_seed(0)
    return Net(5), {"classes": list("abcd"), "mean": [0.5] * 5, "std": [0.1] * 5, "channels": 5,
                    "image_size": (8, 12), "multi_label": True}
"""

"""What makes no teacher is refused in a line, and what is missing is named."""

import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from deit_jax.errors import UserError
from deit_jax.teachers.open import open_teacher
from tests.test_cli import deit as run
from tests.torch_networks import NET, noise

BAD = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.register_buffer("seen", torch.zeros(3))
        self.function = function
    def forward(self, x):
        return self.function(self, x)

def pooled(self, x):
    return self.fc(x.mean((2, 3)))

def made(function, **said):
    return Net(function), {"image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3, **said}

def counts(self, x):
    self.seen += x.mean((0, 2, 3))
    return pooled(self, x)

def branches(self, x):
    return pooled(self, x if x.sum() > 0 else -x)

def searches(self, x):
    return pooled(self, x[x.mean((1, 2, 3)) > 0])

def of_two(self, x):
    return pooled(self, x.reshape(2, 3, 8, 8))

def tuple_(): return made(lambda self, x: (pooled(self, x), x))
def dict_(): return made(lambda self, x: {"out": pooled(self, x)})
def rank(): return made(lambda self, x: x)
def count(): return made(counts)
def branch(): return made(branches)
def search(): return made(searches)
def two(): return made(of_two)
def drop(): return made(lambda self, x: nn.functional.dropout(pooled(self, x), 0.5, True))
def whitened(self, x):
    return nn.functional.batch_norm(pooled(self, x), None, None, training=True)

def batch(): return made(whitened)
def channels(): return made(pooled, channels=4, mean=[0.5] * 4, std=[0.5] * 4)
def names(): return made(pooled, classes=["a"])
def unknown(): return made(pooled, crop=3)
def size(): return made(pooled, image_size=-8)
def std(): return made(pooled, std=[0.5, 0, 0.5])
def lowers(): return made(lambda self, x: pooled(self, torch.special.airy_ai(x)))
def other(): return 3
def raises(): raise ValueError("no weights\\nhere")
"""
REFUSED = {
    "tuple_": "returns a tuple of 2 for images .2 3 8 8., not logits",
    "dict_": "returns a dict of out",
    "rank": r"returns float32\[2 3 8 8\]",
    "count": "changes the buffer seen",
    "branch": "cannot be traced for any number of images",
    "search": "cannot be traced for any number of images|forward returns float32|forward fails",
    "two": "cannot be traced for any number of images",
    "drop": r"draws random numbers \(aten\.",
    "batch": "to an image depends on the other images of its batch",
    "channels": r"forward fails for images \[2 4 8 8\].*channels",
    "names": "returns 4 logits, and `classes` has 1 names",
    "unknown": "unknown convention crop; known: classes",
    "size": "conventions are not what they must be .image_size=-8",
    "std": "std=.* must be above 0",
    "lowers": "the operation aten.special_airy_ai.default has no counterpart in JAX",
    "other": "returns a int, not a torch.nn.Module",
    "raises": r"raises\(\) fails: ValueError: no weights",
    "nothing": "has no nothing; name one",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_teacher_is_refused_in_a_line(name, here, torch, tmp_path, capsys):
    here("bad_nets", BAD)
    code, out, err = run(capsys, "convert", f"torch:bad_nets:{name}", "t")
    assert (code, out) == (1, "")
    assert "\n" not in err
    assert err.startswith(f"deit convert: torch:bad_nets:{name}: ")
    assert re.search(REFUSED[name], err), err
    assert not (tmp_path / "t").exists()


def test_what_is_not_finite_or_follows_the_batch_teaches_nobody(here, torch, capsys):
    here(
        "nets_c",
        NET + "\ndef bad():\n    net = plain()\n    net.fc.bias.data[1] = torch.nan\n"
        "    return net, {'image_size': 8}\n"
        "def mixed():\n    net, forward = plain(), type(plain()).forward\n"
        "    class Mixed(type(net)):\n        def forward(self, x):\n"
        "            return forward(self, x - x.mean(0, keepdim=True))\n"
        "    net.__class__ = Mixed\n    return net, {'image_size': 8}\n"
        "def sure():\n    net = plain()\n"
        "    return torch.nn.Sequential(net, torch.nn.Softmax(-1)), {'image_size': 8}\n",
    )
    code, _, err = run(capsys, "convert", "torch:nets_c:bad", "t")
    assert code == 1
    assert "its logits of an image of noise are not finite, as its weights fc.bias are" in err
    code, _, err = run(capsys, "convert", "torch:nets_c:mixed", "t")
    assert code == 1
    assert "depends on the other images of its batch" in err
    code, out, _ = run(capsys, "convert", "torch:nets_c:sure", "t")
    assert code == 0
    assert "these are probabilities" in out


def test_python_functions_and_wrong_names(here, capsys):
    here(
        "jax_nets",
        "import deit_jax, jax.numpy as jnp\n"
        "def make():\n    return deit_jax.Teacher(apply=lambda p, x: x.mean((1, 2)) @ p,\n"
        "        params=jnp.eye(3), mean=(0.5,) * 3, std=(0.5,) * 3, image_size=8)\n"
        "def other():\n    return 3\n",
    )
    images = noise(2, 8)
    teacher = open_teacher("python:jax_nets:make", "float32")
    assert teacher.classes == ("class 0", "class 1", "class 2")
    assert run(capsys, "convert", "python:jax_nets:make", "t")[0] == 0
    for opened in (teacher, open_teacher("t", "float32")):
        said = opened.apply(opened.params, jnp.asarray(images))
        said = said["logits"] if isinstance(said, dict) else said
        np.testing.assert_allclose(said, images.mean((1, 2)), atol=1e-6)
    assert open_teacher("python:jax_nets:make", "bfloat16").params.dtype == jnp.bfloat16
    assert open_teacher("runs/mine", "float32") is None
    for text, message in {
        "python:jax_nets:other": "returns a int, not a deit_jax.Teacher",
        "python:nowhere:make": "there is no module nowhere, neither installed nor in",
        "python:jax_nets": "write python:MODULE:FUNCTION",
    }.items():
        with pytest.raises(UserError, match=message):
            open_teacher(text, "float32")
    for flag in ("--to=timm", "--head=drop", "--num_classes=3", "--ema"):
        code, _, err = run(capsys, "convert", "python:jax_nets:make", "u", flag)
        assert code == 1
        assert flag.partition("=")[0] in err


def test_nobody_imports_torch_who_does_not_ask_for_it():
    import subprocess

    code = (
        "import sys, deit_jax.cli.convert, deit_jax.cli.train, deit_jax.teachers.open as o\n"
        "o.open_teacher('runs/mine', 'float32')\n"
        "print({'torch', 'torchax', 'timm', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("missing", ["torch", "torchax.export", "timm"])
def test_what_is_not_installed_is_named_with_its_extra(missing, torch, timm, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    name = missing.partition(".")[0]
    message = rf"^timm:resnet18@{__file__}: needs {name}, pip install 'deit_jax\[torch\]'"
    if missing == "torchax.export":
        message = rf"^torch:net: needs {name}, pip install 'deit_jax\[torch\]'"
        from deit_jax.teachers import torch_graph

        with pytest.raises(UserError, match=message):
            torch_graph.capture(torch.nn.Flatten(), 8, 3, "torch:net")
        return
    with pytest.raises(UserError, match=message):
        open_teacher(f"timm:resnet18@{__file__}", "float32")


def test_a_broken_torchvision_is_said_in_a_line(torch, monkeypatch):
    from deit_jax.teachers import torch_import

    def broken(name):
        raise RuntimeError("operator torchvision::nms\ndoes not exist")

    monkeypatch.setattr(torch_import.importlib, "import_module", broken)
    with pytest.raises(UserError, match=r"timm cannot be imported \(operator .* exist\); install"):
        torch_import.import_package("timm", "timm:resnet18")

"""A torch module made a Teacher, and compared with what PyTorch says of the same images."""

import contextlib
import dataclasses
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from deit_jax.errors import UserError
from deit_jax.shapes import Size, sides
from deit_jax.teachers import torch_graph
from deit_jax.teachers.programs import APART, first_line, probabilities
from deit_jax.teachers.teacher import FEATURES, LOGITS, Teacher
from deit_jax.teachers.torch_lowering import Lowered

_PACKAGES = ("torch", "torchax", "timm", "transformers")
_MOST = 1e-2  # of the largest answer: what a converted network may differ from PyTorch's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A torch module, what its images must be and what it knows.

    `module` takes images [B C H W]; it returns logits [B K], or features [B D] where it has no
    classes. `features` returns both, where the network itself says what its features are.
    """

    asked: str
    name: str
    module: torch.nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: Size
    channels: int = 3
    classes: Sequence[str] = ()
    also_called: Sequence[str] = ()
    crop_ratio: float | None = None
    interpolation: str | None = None
    multi_label: bool | None = None
    with_features: torch.nn.Module | None = None
    features_alone: bool = False
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """A teacher of a torch module, in float32, with what is known of it besides.

    `difference` is the largest one between PyTorch's answers and JAX's, by the largest answer.
    """

    in_float32: Teacher
    source: str
    crop_ratio: float | None
    interpolation: str | None
    difference: float
    notes: tuple[str, ...]
    versions: dict[str, str]

    def teacher(self, dtype: str = "float32") -> Teacher:
        """Return the teacher with its weights in a dtype, in which it then computes."""
        params = {
            name: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
            for name, x in self.in_float32.params.items()
        }
        return dataclasses.replace(self.in_float32, params=params)


def convert_module(source: Source) -> Converted:
    """Return a module as a Teacher; raise UserError, with nothing written, where it cannot be."""
    source.module.cpu().eval().requires_grad_(False).float()
    keys, answers, images = _ask(source)
    network = torch_graph.capture(
        source.with_features or source.module, source.image_size, source.channels, source.asked
    )
    _check_finite(source, answers)
    _check_apart(source, images)
    notes = list(source.notes)
    if keys == (LOGITS,):
        if (features := torch_graph.last_linear(network)) is None:
            notes.append("no single linear layer makes its logits: it has no features")
        else:
            network.outputs = (*network.outputs, features)
            keys = (LOGITS, FEATURES)
    elif source.with_features is not None:
        network.outputs = network.outputs[: len(keys)]
    torch_graph.fold_batch_norm(network)
    torch_graph.split_products(network)
    if names := torch_graph.not_finite(network):
        notes.append(f"{len(names)} of its weights are not finite: {', '.join(names[:3])}")
    if note := probabilities(answers.get(LOGITS)):
        notes.append(note)
    apply = Lowered(network, keys, source.asked)
    teacher = Teacher(
        apply=apply,
        params=apply.weights,
        mean=tuple(map(float, source.mean)),
        std=tuple(map(float, source.std)),
        classes=_classes(source, answers),
        also_called=tuple(source.also_called),
        image_size=source.image_size,
        channels=source.channels,
        multi_label=source.multi_label,
        name=source.name,
    )
    return Converted(
        in_float32=teacher,
        source=source.asked,
        crop_ratio=source.crop_ratio,
        interpolation=source.interpolation,
        difference=_difference(source, teacher, images, answers),
        notes=tuple(notes),
        versions=_versions(),
    )


def _ask(source: Source) -> tuple[tuple[str, ...], dict[str, np.ndarray], torch.Tensor]:
    """Return what the network answers with, and what PyTorch answers to some images."""
    height, width = sides(source.image_size)
    numbers = np.random.default_rng(0).normal(size=(2, source.channels, height, width))
    images = torch.from_numpy(numbers.astype(np.float32))
    shape = f"[2 {source.channels} {height} {width}]"
    try:
        with torch.no_grad():
            said = source.module(images)
            both = None if source.with_features is None else source.with_features(images)
    except Exception as error:  # the module is a program, and may raise anything
        raise UserError(
            f"{source.asked}: forward fails for images {shape} ({first_line(error)}); say its "
            "image_size and channels"
        ) from error
    if not _is_rows(said):
        what = "features [B D]" if source.features_alone else "logits [B K]"
        raise UserError(
            f"{source.asked}: forward returns {_in_words(said)} for images {shape}, not {what}; "
            "wrap it in a module that returns them alone"
        )
    if source.features_alone:
        return (FEATURES,), {FEATURES: said.numpy()}, images
    answers = {LOGITS: said.numpy()}
    if both is not None and _is_rows(both[1]):
        return (LOGITS, FEATURES), answers | {FEATURES: both[1].numpy()}, images
    return (LOGITS,), answers, images


def _check_finite(source: Source, answers: dict[str, np.ndarray]) -> None:
    for key, values in answers.items():
        if not np.isfinite(values).all():
            names = [k for k, x in source.module.state_dict().items() if not x.isfinite().all()]
            of = f", as its weights {', '.join(names[:3])} are" if names else ""
            raise UserError(
                f"{source.asked}: its {key} of an image of noise are not finite{of}; nobody can "
                "learn from it"
            )


def _check_apart(source: Source, images: torch.Tensor) -> None:
    """Raise UserError where what is said of an image depends on the others."""
    other = torch.stack([images[0], 3 * images[1] + 2])
    with torch.no_grad():
        both, twice = (source.module(x)[0] for x in (images, other))
    if float((both - twice).abs().max()) > APART * max(float(both.abs().max()), 1e-6):
        raise UserError(
            f"{source.asked}: the answer to an image depends on the other images of its batch; a "
            "teacher must answer each by itself: let batch norm track its averages"
        )


def _is_rows(said: Any) -> bool:
    known = isinstance(said, torch.Tensor) and said.ndim == 2 and said.shape[0] == 2
    return known and said.is_floating_point()


def _in_words(said: Any) -> str:
    if isinstance(said, torch.Tensor):
        dtype = str(said.dtype).removeprefix("torch.")
        return f"{dtype}[{' '.join(map(str, said.shape))}]"
    if isinstance(said, dict):
        return f"a {type(said).__name__} of {', '.join(map(str, said))}"
    if isinstance(said, tuple | list):
        return f"a {type(said).__name__} of {len(said)}"
    return f"a {type(said).__name__}"


def _classes(source: Source, answers: dict[str, np.ndarray]) -> tuple[str, ...]:
    if LOGITS not in answers:
        return ()
    count = answers[LOGITS].shape[1]
    if source.classes and len(source.classes) != count:
        raise UserError(
            f"{source.asked}: forward returns {count} logits, and `classes` has "
            f"{len(source.classes)} names; they must be as many"
        )
    return tuple(source.classes) or tuple(f"class {i}" for i in range(count))


def _difference(source: Source, teacher: Teacher, images: torch.Tensor, answers) -> float:
    """Return how far JAX is from PyTorch; raise UserError where that is no rounding."""
    shown = jnp.asarray(images.permute(0, 2, 3, 1).numpy())
    with jax.default_matmul_precision("highest"), _on_cpu() as options:
        lowered = jax.jit(teacher.apply).lower(teacher.params, shown)
        said = lowered.compile(compiler_options=options)(teacher.params, shown)
    worst = 0.0
    for key, wanted in answers.items():
        largest = max(float(np.abs(wanted).max()), 1e-6)
        share = float(np.abs(np.asarray(said[key]) - wanted).max()) / largest
        if not share <= _MOST:
            raise UserError(
                f"{source.asked}: in JAX its {key} differ by {share:.2g} of the largest from "
                "PyTorch's; this is a fault of the conversion, please report it"
            )
        worst = max(worst, share)
    return worst


@contextlib.contextmanager
def _on_cpu() -> Iterator[dict[str, Any]]:
    """Compute on the CPU where JAX has it; what the compiler is told there is not to take long."""
    try:
        device = jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        yield {}
        return
    with jax.default_device(device):
        yield {"xla_backend_optimization_level": 0}


def _versions() -> dict[str, str]:
    known = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return known

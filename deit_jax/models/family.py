"""Family: all that the rest of the software knows of an architecture."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

HALF = (0.5, 0.5, 0.5)

# timm's name of a module or tensor, then what others call it; # stands for an index.
Aliases = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Architecture, its arguments, and the input that published weights of this name expect."""

    cls: type[nn.Module]
    kwargs: dict[str, Any]
    image_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_ratio: float = 0.875  # evaluation: shorter side = image_size / crop_ratio


def unchanged(name: str, model: nn.Module) -> str:
    """Return a tensor's name as it is."""
    return name


@dataclasses.dataclass(frozen=True)
class Family:
    """Architectures of one class; registry.FAMILIES lists them.

    The class takes `num_classes`, `dtype` and its own fields, and its call (images, train) returns
    Heads: without classes (`num_classes=0`) what the heads would be given. Its parameters have
    timm's names, `/` for a dot. It says as `feature_layer` which of its modules gives its features.
    With batch norm it has a field `folded` for the model without, and the class
    attributes `bn_epsilon` and `fold_orders`; see models/conv.py.

    `aliases` are the names of tensors in other files, the first row that fits winning; before them
    `rewrite` may change a name by rules that no table holds. `heads` are the paths of the linear
    layers whose outputs are classes, the class head first; `stem` is that of the convolution that
    reads the image, "" if its kernel has no channels to adapt; by it the model is found in files,
    whatever they wrap it in (weights/places.py). A convnet is recognised among files
    by the number of its blocks: `block` matches the beginning of a tensor's name that belongs to
    one.
    """

    cls: type[nn.Module]
    specs: Mapping[str, ModelSpec]
    heads: tuple[str, ...]
    stem: str = ""
    aliases: Aliases = ()
    rewrite: Callable[[str, Any], str] = unchanged
    block: str = ""
    count_blocks: Callable[[Any], int] = lambda model: 0

    def blocks_in(self, names) -> int:
        """Return how many blocks the names of a file's tensors tell of."""
        if not self.block:
            return 0
        matches = (re.match(rf"(?:module\.)?{self.block}", name) for name in names)
        return len({match[1] for match in matches if match})

"""How large the studies are."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large a study is. `images` are to train on, the same number of each class; 0 = all."""

    images: int
    epochs: float
    teacher_epochs: float
    batch: int
    lr: float
    patch: int
    width: int
    depth: int
    heads: int
    seeds: int
    # (widths, depths) of the RegNetYs, and width, depth and epochs of the transformer that teaches
    convnets: tuple = (((16, 32), (1, 1)), ((32, 64), (1, 2)), ((48, 96, 192), (1, 2, 2)))
    transformer: tuple = (96, 6, 1.0)


SCALES = {
    # What two cores do in some hours: patches of 8, for those of 4 cost five times as much.
    "cpu": Scale(10_000, 20.0, 20.0, 64, 2e-3, 8, 64, 4, 4, seeds=5),
    "gpu": Scale(0, 100.0, 50.0, 512, 2e-3, 4, 192, 6, 3, seeds=5),
    "toy": Scale(200, 2.0, 1.0, 32, 2e-3, 8, 16, 2, 2, seeds=2, transformer=(16, 1, 1.0)),
}

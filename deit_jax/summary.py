"""What a run says of itself when it begins."""

import jax

from deit_jax import config as config_lib
from deit_jax import memory, parts
from deit_jax.data.resize import choose


def summary(trainer) -> str:
    """Return a line on model, data, length, devices and decoder."""
    config, dataset, mesh = trainer.config, trainer.dataset, trainer.mesh
    count = sum(x.size for x in jax.tree.leaves(trainer.state.params))
    return (
        f"{config.model.name}: {count / 1e6:.2f} M parameters; {len(dataset.train)} training and "
        f"{len(dataset.eval)} evaluation images in {len(dataset.classes)} classes; "
        f"{trainer.total_steps} steps of {config.batch_size}, {trainer.order.steps_per_epoch} an "
        f"epoch; {mesh.size} {jax.devices()[0].device_kind} device(s), "
        f"{config_lib.compute_dtype(config.dtype).name} compute; images decoded by "
        f"{choose(config.data.decoder)}{_in_parts(config, mesh, len(dataset.classes))}"
    )


def _in_parts(config, mesh, num_classes: int) -> str:
    """Return how a device takes its share of a batch, and what memory that is expected to need."""
    share, count = parts.share_of(config, mesh), parts.micro_batches(config, mesh, num_classes)
    text = "" if count == 1 else f"; a device takes its {share} images {share // count} at a time"
    if (limit := memory.limit(mesh)) is None:
        return text
    expected = parts.expected_bytes(config, mesh, num_classes)
    return f"{text}; about {expected / 1e9:.1f} of {limit / 1e9:.1f} GB a device expected"

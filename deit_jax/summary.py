"""What a run says of itself when it begins."""

import jax

from deit_jax import config as config_lib
from deit_jax.data.resize import choose


def summary(trainer) -> str:
    """Return a line on model, data, length, devices and decoder."""
    config, dataset = trainer.config, trainer.dataset
    count = sum(x.size for x in jax.tree.leaves(trainer.state.params))
    return (
        f"{config.model.name}: {count / 1e6:.2f} M parameters; {len(dataset.train)} training and "
        f"{len(dataset.eval)} evaluation images in {len(dataset.classes)} classes; "
        f"{trainer.total_steps} steps of {config.batch_size}, {trainer.order.steps_per_epoch} an "
        f"epoch; {trainer.mesh.size} {jax.devices()[0].device_kind} device(s), "
        f"{config_lib.compute_dtype(config.dtype).name} compute; images decoded by "
        f"{choose(config.data.decoder)}"
    )

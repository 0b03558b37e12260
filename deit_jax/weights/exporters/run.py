"""A workdir that holds weights: for `deit eval`, `deit predict`, and as a teacher."""

from pathlib import PurePath

import jax
import numpy as np

from deit_jax.config.serialize import to_json
from deit_jax.configs import base
from deit_jax.step.state import TrainState
from deit_jax.storage import backend, write_json
from deit_jax.weights.fit import LoadedWeights, architecture
from deit_jax.workdir.checkpoints import Checkpointer


def write(opened: LoadedWeights, workdir: PurePath) -> None:
    """Write a workdir whose only checkpoint, of step 0, holds the weights and no optimizer."""
    opened.check_convention()
    config = _run_config(opened)
    backend(workdir).make_folder(workdir)
    write_json(workdir / "classes.json", opened.classes)
    write_json(workdir / "config.json", to_json(config))
    variables = opened.variables
    params, stats = jax.device_get((variables["params"], variables["batch_stats"]))
    saver = Checkpointer(workdir, keep=1)
    saver.save(0, TrainState(np.int32(0), params, stats, (), None), None)
    saver.close()


def _run_config(opened: LoadedWeights):
    """Return the default config with the weights' model and the input that they expect."""
    config = base.get_config()
    config.model = base.get_model_config(opened.name)
    fields = architecture(opened.model, opened.name)
    if not hasattr(opened.model, "image_size"):
        fields["image_size"] = opened.image_size
    for key, value in fields.items():
        config.model[key] = value
    config.data.channels = getattr(opened.model, "in_channels", 3)
    config.data.mean, config.data.std = opened.mean, opened.std
    config.data.eval_crop_ratio, reading = opened.crop_ratio, opened.reading
    if opened.multi_label:
        config.data.multi_label, config.loss.kind, config.loss.smoothing = True, "binary", 0.0
    config.data.resize, config.data.exif, config.data.bits = (
        reading.resize,
        reading.exif,
        reading.bits,
    )
    return config

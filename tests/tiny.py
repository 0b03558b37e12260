"""A small config with the whole recipe, for tests and for the processes that they start."""

from deit_jax.configs import base


def make_tiny_config():
    """Return the config; base.py lists the fields."""
    c = base.get_config()
    c.batch_size, c.epochs = 32, 2.0
    c.data.source, c.data.eval_crop_ratio = "digits", 1.0
    c.data.eval_fraction = 0.9  # leaves 180 images to train on: five steps an epoch
    c.data.threads = 2
    c.model.name = "deit_tiny_distilled_patch16_224"
    c.model.image_size, c.model.patch_size, c.model.width, c.model.depth = 16, 4, 24, 2
    c.teacher.model.name = "regnety_002"
    c.teacher.model.widths, c.teacher.model.depths = (8, 16), (1, 1)
    c.teacher.model.stem_width = 8
    c.teacher.epochs = 1.0
    c.distill.kind = "hard"
    c.mixing.group_size = 8
    c.optim.warmup_epochs, c.optim.lr, c.optim.ema_decay = 1.0, 1e-3, 0.9
    c.train.log_every_steps, c.train.eval_batch_size = 1, 256
    return c


def resolved(config, dataset):
    """Return what a config means for a data set on the devices at hand, unchecked."""
    from deit_jax.train.experiment import resolve

    return resolve(config, len(dataset.classes), len(dataset.train))


def measured(config, seconds=0.1, **options):
    """Return what `deit bench` measures of a config's step."""
    from deit_jax.perf import step_time
    from deit_jax.train.experiment import sketch

    dataset, missing = step_time.data_or_random(config.data, config.batch_size)
    experiment = sketch(config, lambda: (len(dataset.classes), len(dataset.train)))
    return step_time.measure(experiment, dataset, missing, seconds, **options)


def save_weights(path, name, model, variables, **told):
    """Write a model's weights to a file that says what is `told` of them: classes, mean, …"""
    from deit_jax.weights.convert import convert
    from deit_jax.weights.fit import LoadedWeights

    whole = {"batch_stats": {}, **variables}
    about = {"source": "", "format": "", "image_size": model.image_size, **told}
    convert(LoadedWeights(name=name, model=model, variables=whole, **about), path)
    return path


def train_without_picture(config, workdir):
    """Train; the picture at the end would take as long as a tiny training."""
    import pytest

    from deit_jax.train import run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_draw", lambda trainer, results: None)
        return run.train(config, workdir)

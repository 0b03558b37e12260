"""`deit bench`: the speed of the training step and of the input pipeline on this machine."""

import functools
import json
import sys

from deit_jax.cli.flags import Command, UsageError, no_words
from deit_jax.storage import on_disk

BENCH_DOC = """usage: deit bench --config=FILE[:ARGS] [--profile=DIR] [--compare] [--seconds=10]
       deit bench --config=FILE[:ARGS] --input-only [--device=v5e-8] [--seconds=10]

Measure the training step on the devices at hand, fed with random images, and then, where the
config's data is there, how long it waits for its real input. --profile writes a trace of a few
steps; --compare times the step with each kernel of attention. With --input-only, measure instead
how fast the config's images can be loaded, where the time goes, and how that compares with what the
config's model needs on a device.

  deit bench --config=configs/quickstart.py --profile=/tmp/trace
  deit bench --config=configs/deit.py:variant=small --input-only --device=h100x8"""


def main(argv: list[str]) -> None:
    """Run `deit bench`."""
    command = Command("bench", BENCH_DOC)
    command.add_config(argv)
    command.boolean("input_only", False, "measure the input pipeline instead")
    command.number("seconds", 10.0, "how long to measure", 0.0)
    command.string("profile", "", "write a trace of a few steps into this directory")
    command.string("device", "v5e-8", "KIND-NUMBER to feed, with --input-only")
    command.number("mfu", 0.0, "its assumed share of the peak; 0 = by the model", 0, 1)
    command.boolean("compare", False, "time the step with each kernel of attention")
    command.boolean("json", False, "print one JSON object")
    no_words(command.parse(argv, required=("config",)))
    config, values = command.required_config(), command.flags
    if values.input_only and (values.profile or values.compare):
        flag = "--profile" if values.profile else "--compare"
        raise UsageError(f"{flag} is of the training step: leave out --input-only")
    import jax

    from deit_jax.data.sources.registry import open_dataset
    from deit_jax.perf import input_rate, step_time
    from deit_jax.train.experiment import sketch

    if values.input_only:
        input_rate.parse_device(values.device)  # a mistake in it is told before anything is read
        opened = functools.cache(lambda: open_dataset(config.data))
        experiment = sketch(config, lambda: _size(opened()), devices=jax.devices()[:1], whole=True)
        result = input_rate.measure(experiment, opened(), values.seconds, values.device, values.mfu)
        report = input_rate.report
    else:
        data = functools.cache(lambda: step_time.data_or_random(config.data, config.batch_size))
        experiment = sketch(config, lambda: _size(data()[0]))
        dataset, missing = data()
        profile = on_disk("--profile", values.profile) if values.profile else None
        result = step_time.measure(
            experiment, dataset, missing, values.seconds, profile, values.compare
        )
        report = step_time.report
    if values.json:
        json.dump(result, sys.stdout)
        print()
    else:
        print(report(result))


def _size(dataset) -> tuple[int, int]:
    return len(dataset.classes), len(dataset.train)

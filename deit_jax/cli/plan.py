"""`deit plan`: what a training step needs on TPUs that are not there."""

import json
import sys

from deit_jax.cli.flags import Command, no_words, write_output

PLAN_DOC = """usage: deit plan --config=FILE[:ARGS] --topology=KIND:SIZE [--sweep] [--out=FILE]

Compile the config's training step, teacher included, for TPUs that need not be there, and tell what
it needs: memory, operations, communication, and the compiler's own estimate of its time.
No data, no weights and no TPU are needed; compiling takes a minute or a few.

  deit plan --config=configs/deit.py:variant=base,distilled=True --topology=v5e:4x4
  deit plan --config=configs/deit3.py:size=huge --topology=v5e:8x8 --config.mesh.fsdp=8 --sweep

KIND is v4, v5e, v5p, v6e or tpu7x; SIZE counts chips: 2x2 to 16x16, or 2x2x1 and on for v4, v5p and
tpu7x (v4-64 and v5p-64 are 32 chips, 4x4x2). --config.mesh.slices=N plans N such slices. With
--sweep, less hungry variants of the config are compiled as well."""


def main(argv: list[str]) -> None:
    """Run `deit plan`."""
    command = Command("plan", PLAN_DOC)
    command.add_config(argv)
    command.string("topology", "", "KIND:SIZE of the TPU slice, as in v5e:4x4")
    command.boolean("sweep", False, "plan less hungry variants of the config as well")
    command.integer("classes", 0, "number of classes, where the data is not here", 0)
    command.integer("images", 0, "number of training images, likewise", 0)
    command.string("out", "", "write the figures to this JSON file")
    command.boolean("json", False, "print one JSON object")
    no_words(command.parse(argv, required=("config", "topology")))
    values, config = command.flags, command.required_config()
    import jax

    from deit_jax.perf.plan import alternatives, plan, planned, sweep
    from deit_jax.perf.plan_report import advice, report, sweep_report

    jax.config.update("jax_platforms", "cpu")  # compiling needs no device, and must take none
    experiment = planned(config, values.topology, values.classes, values.images)
    result = plan(experiment, values.topology)
    if values.sweep:
        result["sweep"] = sweep(experiment, values.topology)
    if values.out:
        write_output(values.out, json.dumps(result, indent=2) + "\n")
    if values.json:
        json.dump(result, sys.stdout)
        print()
        return
    print(report(result))
    if values.sweep:
        print(sweep_report(result["sweep"]))
    elif text := advice(result, list(alternatives(experiment))):
        print(text)

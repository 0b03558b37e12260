"""The processes of one run: how they find each other, and who speaks."""

import logging

import jax
from absl import flags

from deit_jax.errors import UserError

log = logging.getLogger("deit_jax")


def add_flags(command) -> None:
    """Define the flags that make a process one of several."""
    own, found = {"flag_values": command.flags}, "where TPU, Slurm or Open MPI do not tell"
    flags.DEFINE_boolean("multihost", False, "this is one of several processes of the run", **own)
    flags.DEFINE_string("coordinator", None, f"HOST:PORT of process 0, {found}", **own)
    flags.DEFINE_integer("num_processes", None, f"how many there are, {found}", **own)
    flags.DEFINE_integer("process_id", None, f"which one this is, {found}", **own)


def join(options) -> None:
    """Connect the processes of a run, if it has several; only the first one logs."""
    if not options.multihost:
        return
    try:
        jax.distributed.initialize(
            coordinator_address=options.coordinator,
            num_processes=options.num_processes,
            process_id=options.process_id,
        )
    except (ValueError, RuntimeError) as error:
        first_line = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"--multihost: {first_line}; give --coordinator=HOST:PORT, --num_processes=N and "
            "--process_id=I"
        ) from error
    if jax.process_index() != 0:
        log.setLevel(logging.WARNING)

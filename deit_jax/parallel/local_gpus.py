"""Which GPUs of a machine a process takes: all that it sees, or its share beside others.

JAX gives a process of Slurm or Open MPI the one device of its local number. So one process for all
GPUs of a node would compute on a single one of them without a word, and a process to which Slurm
shows one GPU alone would look for another.
"""

import glob
import os

from deit_jax.errors import UserError
from deit_jax.parallel.roll_call import tasks_by_node

DEVICES = "/dev/nvidia[0-9]*"


def taken() -> list[int] | None:
    """Return the numbers of the GPUs that this process takes, None to leave it to JAX.

    Raise UserError where the processes of this machine do not go into its GPUs.
    """
    ours = _local()
    seen = visible()
    if ours is None or not seen:
        return None
    rank, count = ours
    if count == 1 or seen == 1 or _each_its_own(seen, count):
        return list(range(seen))
    here = len(glob.glob(DEVICES))
    if "SLURM_LOCALID" not in os.environ and seen < here and seen * count <= here:
        raise UserError(
            f"--multihost: {count} processes on this machine see {seen} of its {here} GPUs; "
            "whether these are the same or each one's own is not known: let CUDA_VISIBLE_DEVICES "
            "show each a single one, or leave it unset"
        )
    if seen % count:
        raise UserError(
            f"--multihost: {count} processes on this machine see {seen} GPUs; start one for all of "
            "them, one for each, or a number between that divides them"
        )
    share = seen // count
    return list(range(rank * share, (rank + 1) * share))


def _local() -> tuple[int, int] | None:
    """Return the number of this process among those of this machine, and how many these are."""
    environment = os.environ
    if "SLURM_LOCALID" in environment and "SLURM_STEP_TASKS_PER_NODE" in environment:
        node, tasks = int(environment.get("SLURM_NODEID", "0")), tasks_by_node()
        return (int(environment["SLURM_LOCALID"]), tasks[node]) if node < len(tasks) else None
    if "OMPI_COMM_WORLD_LOCAL_RANK" in environment:
        rank = int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])
        return rank, int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    return None


def visible() -> int:
    """Return how many NVIDIA GPUs this process may see."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(glob.glob(DEVICES))
    return len([word for word in chosen.split(",") if word.strip() not in ("", "-1", "NoDevFiles")])


def _each_its_own(seen: int, count: int) -> bool:
    """Return whether Slurm shows each process of this machine GPUs of its own (--gpus-per-task)."""
    on_node = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if on_node.isdecimal():
        return seen * count == int(on_node)
    return "SLURM_GPUS_PER_TASK" in os.environ

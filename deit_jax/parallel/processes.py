"""The processes of one run: how they find each other, who speaks, and how they end together."""

import contextlib
import logging
import os
import sys
import threading
import time
import traceback

import jax
from jax._src import distributed as jax_distributed  # Orbax, too, reaches the store through it
from jax._src.clusters import ClusterEnv

from deit_jax.errors import Interrupted, UserError
from deit_jax.parallel import local_gpus, roll_call

log = logging.getLogger("deit_jax")

FAILURE = "deit_jax/failure"  # the key under which a process tells the others why it ends
HEARTBEAT_S = 30  # without a sign of life for so long, a process is given up, and the run with it
WATCH_S = 1
GRACE_S = 3  # the first process keeps the store, so it goes last


@contextlib.contextmanager
def joined(options):
    """Connect the processes of a run, if it has several; only the first one logs.

    What is not given comes from TPU's, Slurm's or Open MPI's environment; from Kubernetes the
    number of the process, of an Indexed Job's pod (JOB_COMPLETION_INDEX). Those that have not come
    after options.startup_timeout seconds are named, and the others end.
    """
    if not options.multihost:
        yield
        return
    place = _place(options)
    gpus = local_gpus.taken()
    if place is not None:
        roll_call.attend(place, options.startup_timeout)
    else:
        place = roll_call.Place(options.coordinator, options.num_processes, options.process_id)
    try:
        jax.distributed.initialize(
            coordinator_address=place.address,
            num_processes=place.processes,
            process_id=place.process,
            local_device_ids=gpus,
            cluster_detection_method="deactivate" if place.address else None,
            initialization_timeout=round(options.startup_timeout),
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    except (ValueError, RuntimeError) as error:
        raise _unknown(error) from error
    if jax.process_index() != 0:
        log.setLevel(logging.WARNING)
    done = threading.Event()
    watch = threading.Thread(target=_end_with_others, args=(done,), name="other-processes")
    watch.start()
    try:
        with ending_all():
            yield
    finally:
        done.set()
        watch.join()


def _unknown(error: Exception) -> UserError:
    first_line = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
    return UserError(
        f"--multihost: {first_line}; give --coordinator=HOST:PORT, --num_processes=N and "
        "--process_id=I"
    )


def _place(options) -> roll_call.Place | None:
    """Return where the processes meet; None where only JAX finds out, as it connects."""
    process = options.process_id
    if process is None and options.coordinator and "JOB_COMPLETION_INDEX" in os.environ:
        process = int(os.environ["JOB_COMPLETION_INDEX"])
    given = (options.coordinator, options.num_processes, process)
    if None not in given:
        # Nothing is looked for: JAX would ask Kubernetes for permissions.
        return roll_call.Place(*given)
    for cluster in ClusterEnv._cluster_types:  # in JAX's order, by its own code
        if cluster.opt_in_only_method or not cluster.is_env_present():
            continue
        try:
            found = (
                given[0] or cluster.get_coordinator_address(options.startup_timeout, None),
                given[1] or cluster.get_process_count(),
                cluster.get_process_id() if process is None else process,
            )
        except Exception as error:
            raise _unknown(error) from error
        return roll_call.Place(*found)
    return None


@contextlib.contextmanager
def ending_all():
    """End every process of the run if this one fails: the others would wait for it for ever.

    Around code whose own clean-up waits for the others, this must be inside of that clean-up.
    """
    try:
        yield
    except Interrupted:
        raise  # which all do at the same step
    except Exception as error:
        if (client := jax_distributed.global_state.client) is None:
            raise
        known = isinstance(error, UserError) or "://" in str(getattr(error, "filename", ""))
        message = str(error) if known else f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"deit train: {message}", file=sys.stderr)
        if not known:
            traceback.print_exception(error)
        with contextlib.suppress(Exception):  # another process was first, or the store is gone
            client.key_value_set(FAILURE, f"{jax.process_index()} {message}")
        _leave()


def _end_with_others(done: threading.Event) -> None:
    """Watch for another process's failure until `done`; then say why and end this one."""
    client = jax_distributed.global_state.client
    assert client is not None  # `joined` has connected this process
    # Asked for again and again: a call that waits could not be ended before the interpreter is.
    while not done.wait(WATCH_S):
        try:
            process, _, message = client.key_value_try_get(FAILURE).partition(" ")
        except Exception as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the store is gone, and JAX itself ends this process
        if int(process) != jax.process_index():
            print(f"deit train: process {process} ended the run: {message}", file=sys.stderr)
            _leave()


def _leave() -> None:
    """Exit at once: the usual way would wait for processes that do not answer any more."""
    if jax.process_index() == 0:
        time.sleep(GRACE_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)

"""What a process is told of the others; tests/test_multihost.py has real ones."""

import os
import types

import jax
import pytest

from deit_jax.errors import UserError
from deit_jax.parallel import local_gpus, processes, roll_call


@pytest.fixture
def told(monkeypatch):
    """Record what JAX is told, and stop there."""
    calls = []

    def initialize(**kwargs):
        calls.append(kwargs)
        raise RuntimeError("no such place.\nmore lines")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(roll_call, "attend", lambda place, timeout: None)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    return calls


def options(
    multihost=True, coordinator=None, num_processes=None, process_id=None, startup_timeout=7.0
):
    return types.SimpleNamespace(**locals())


def join(told, **kwargs):
    with pytest.raises(UserError, match=r"^--multihost: no such place; give --coordinator"):
        processes.joined(options(**kwargs)).__enter__()
    return told[-1]


def test_a_single_process_joins_nobody(told):
    with processes.joined(options(multihost=False)):
        pass
    assert not told


def test_what_is_not_given_is_left_to_be_found(told):
    call = join(told)
    assert call["coordinator_address"] is call["num_processes"] is call["process_id"] is None
    assert call["cluster_detection_method"] is None


def test_what_is_given_is_not_looked_for(told):
    call = join(told, coordinator="host:1", num_processes=2, process_id=1)
    assert (call["coordinator_address"], call["num_processes"], call["process_id"]) == (
        "host:1",
        2,
        1,
    )
    assert call["cluster_detection_method"] == "deactivate"
    assert call["initialization_timeout"] == 7


def test_a_pod_of_an_indexed_job_knows_its_number(told, monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert join(told, coordinator="host:1", num_processes=4)["process_id"] == 3
    assert join(told, coordinator="host:1", num_processes=4, process_id=0)["process_id"] == 0
    assert join(told)["process_id"] is None  # on TPUs the pods' numbers are TPU's own matter


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02],big",
    "SLURM_NTASKS": "20",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
}


def test_slurm_tells_where_the_processes_meet_and_on_which_hosts(told, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    call = join(told)
    assert call["coordinator_address"].startswith("node01:")
    assert (call["num_processes"], call["process_id"]) == (20, 9)
    expected = ["node01"] * 8 + ["node02"] * 8 + ["big"] * 4
    assert roll_call.expected_hosts(20) == expected
    assert roll_call.expected_hosts(19) == []  # it is of other processes
    assert roll_call._expanded("a[1,3-4]x,b,c[007-008]") == [
        *("a1x", "a3x", "a4x", "b", "c007", "c008")
    ]


@pytest.mark.parametrize(
    ("tasks", "gpus", "more", "taken"),
    [
        ("1", 8, {}, list(range(8))),  # one process for all: JAX by itself would take one GPU
        ("8", 8, {}, [1]),  # one for each
        ("4", 8, {}, [2, 3]),
        ("8", 1, {}, [0]),  # Slurm shows each its own
        ("4", 2, {"SLURM_GPUS_ON_NODE": "8"}, [0, 1]),
        ("2", 4, {"SLURM_GPUS_ON_NODE": "4"}, [2, 3]),
        ("2", 4, {"SLURM_GPUS_ON_NODE": "8"}, [0, 1, 2, 3]),
        ("3", 8, {}, "do not go"),
        ("8", 0, {}, None),
    ],
)
def test_which_gpus_a_process_of_slurm_takes(told, monkeypatch, tasks, gpus, more, taken):
    environment = SLURM | {"SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x3)"} | more
    if tasks == "1":
        environment["SLURM_LOCALID"] = "0"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    if taken == "do not go":
        with pytest.raises(UserError, match="3 processes on this machine see 8 GPUs"):
            local_gpus.taken()
    else:
        assert local_gpus.taken() == taken
        assert join(told)["local_device_ids"] == taken


def test_which_gpus_a_process_of_open_mpi_takes(told, monkeypatch):
    monkeypatch.setattr(local_gpus.glob, "glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia1"])
    assert local_gpus.taken() is None  # started by hand: all that it sees
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
    assert local_gpus.taken() == [1]
    monkeypatch.setattr(local_gpus.glob, "glob", lambda pattern: ["/dev/nvidia"] * 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")  # of each its own, or of both?
    with pytest.raises(UserError, match="2 processes on this machine see 4 of its 8 GPUs"):
        local_gpus.taken()

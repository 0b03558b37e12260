"""What a process is told of the others; tests/test_multihost.py has real ones."""

import types

import jax
import pytest

from deit_jax.errors import UserError
from deit_jax.parallel import processes


@pytest.fixture
def told(monkeypatch):
    """Record what JAX is told, and stop there."""
    calls = []

    def initialize(**kwargs):
        calls.append(kwargs)
        raise RuntimeError("no such place.\nmore lines")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return calls


def options(multihost=True, coordinator=None, num_processes=None, process_id=None):
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


def test_a_pod_of_an_indexed_job_knows_its_number(told, monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert join(told, coordinator="host:1", num_processes=4)["process_id"] == 3
    assert join(told, coordinator="host:1", num_processes=4, process_id=0)["process_id"] == 0
    assert join(told)["process_id"] is None  # on TPUs the pods' numbers are TPU's own matter

"""The run that nobody touches, which the others are compared with."""

import fcntl
import os

import pytest

from tests.faults import driver


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return a folder with a run of 40 steps in `whole`, and its compiled programs in `cache`."""
    path, shared = tmp_path_factory.getbasetemp(), os.environ.get("PYTEST_XDIST_WORKER")
    path = (path.parent if shared else path) / "faults"
    path.mkdir(exist_ok=True)
    with (path / "lock").open("w") as lock:  # of two workers one trains it, and one waits
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (path / "whole" / "results.json").exists():
            driver.finish(driver.start(path / "whole", path / "cache", 40), path / "whole")
    return path

"""The run that nobody touches, which the others are compared with."""

import pytest

from tests.faults import driver


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return a folder with a run of 40 steps in `whole`, and its compiled programs in `cache`."""
    path = tmp_path_factory.mktemp("faults")
    driver.finish(driver.start(path / "whole", path / "cache", 40), path / "whole")
    return path

"""SIGKILL at any moment loses nothing: the run ends with the bits of one that nobody touched."""

import subprocess
import sys
from importlib import metadata

import pytest

from tests.faults import driver


@pytest.mark.slow
def test_a_run_killed_five_times_ends_with_the_same_bits(folder):
    hits = driver.torment(folder / "killed", folder / "cache", 40, kills=5, seed=1)
    assert any("saving" in hit["hit"] for hit in hits), hits
    assert len(driver.state(folder / "whole")) > 100
    assert driver.differences(folder / "whole", folder / "killed") == []
    starts = [r["step"] for r in driver.history(folder / "killed") if r["event"] == "start"]
    assert starts[-1] > 0  # it went on, rather than anew


@pytest.mark.slow
def test_the_comparison_sees_one_flipped_bit(folder, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    for path in ("metrics.jsonl", "results.json", "checkpoints"):
        (other / path).symlink_to(folder / "whole" / path)
    assert driver.differences(folder / "whole", other) == []
    true = driver.state(folder / "whole")
    flipped = {k: v.copy() for k, v in true.items()}
    key = next(k for k in flipped if "kernel" in k)
    flipped[key].view("uint8").flat[0] ^= 1
    monkeypatch.setattr(driver, "state", lambda p: flipped if p == other else true)
    assert driver.differences(folder / "whole", other) == [key]


@pytest.mark.slow
def test_a_run_is_reproduced_from_what_it_recorded(folder):
    whole, again = folder / "whole", folder / "again"
    command = [sys.executable, "-m", "deit_jax", "train"]
    command += [f"--reproduce={whole}", f"--workdir={again}"]
    environment = driver.environment(folder / "cache")
    done = subprocess.run(
        command, cwd=driver.ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert driver.differences(whole, again) == []
    assert "may differ" not in done.stderr
    (start,) = [r for r in driver.history(again) if r["event"] == "start"]
    assert start["command"][1:] == command[3:]
    assert start["packages"]["jax"] == metadata.version("jax")
    assert start["devices"] == "1 cpu"


@pytest.mark.long
def test_twenty_eight_kills(tmp_path):
    """benchmarks/results/ holds the figures of such a run."""
    result = driver.long_version(tmp_path, kills=28, seed=0)
    assert result["differences"] == []
    assert {"saving", "evaluating", "training"} <= set(result["where"])

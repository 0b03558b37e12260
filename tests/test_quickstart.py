"""The quickstart keeps its promise: a student of at least 96% on the held-out digits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_quickstart_student_reads_96_percent_of_the_digits(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": ""}  # one device, as on a stranger's machine
    command = [sys.executable, "-m", "deit_jax", "train", "--config=configs/quickstart.py"]
    run = subprocess.run(
        [*command, f"--workdir={tmp_path}/run", "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert results["examples"] == 359
    # Five seeds came to 98.05 with a standard deviation of 0.56 (docs/results.md), and another
    # machine is like another seed.
    assert results["fused"]["top1"] >= 96
    assert results["teacher"]["top1"] >= 97
    assert "picture of the run" in run.stderr

"""Two real processes over loopback train what one process trains."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deit_jax import checkpoint, metrics

ROOT = Path(__file__).parent.parent
WORDS = [
    f"--config={ROOT}/configs/quickstart.py",
    "--config.epochs=0.3",
    "--config.teacher.epochs=0.3",
    "--config.train.log_every_steps=1",
    "--config.model.depth=2",
    "--config.model.width=24",
    "--config.optim.eps=1e-4",  # Adam's first steps are signs: tame rounding around 0
]


def start(workdir, devices, *more):
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "deit_jax", "train", *WORDS, f"--workdir={workdir}", *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(*processes):
    outputs = [p.communicate(timeout=400) for p in processes]
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
    return outputs


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_processes_train_what_one_trains(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(one, 4))
    port = free_port()
    outputs = finish(
        *(
            start(
                two,
                2,
                "--multihost",
                f"--coordinator=localhost:{port}",
                "--num_processes=2",
                f"--process_id={i}",
            )
            for i in range(2)
        )
    )
    records = [
        [r for r in metrics.read_lines(run / "metrics.jsonl") if "loss" in r] for run in (one, two)
    ]
    assert len(records[0]) == 4
    for a, b in zip(*records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    states = [checkpoint.load_run(run).variables["params"] for run in (one, two)]
    np.testing.assert_allclose(
        states[0]["head_dist"]["kernel"], states[1]["head_dist"]["kernel"], atol=1e-5
    )
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    assert results[0].keys() == results[1].keys()
    (out0, _), (out1, err1) = outputs
    assert "top-1 %" in out0
    assert "top-1" not in out1  # only process 0 speaks (but for the transport itself)
    assert "step" not in err1

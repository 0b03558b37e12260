"""The launch scripts, with stand-ins for the programs that only a cloud or a GPU has.

`gcloud` here is a recording: it writes down its arguments and answers as it is told, but carries
out what it is given for a worker, in a folder. No TPU slice was ever made by these tests.
"""

import configparser
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from absl import flags

from deit_jax.cli.flags import Command, add_process_flags
from deit_jax.train.validate import validate

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"

# A shell starts them, as the path of the interpreter may hold a space, which `#!` does not bear.
DEIT = """#!/bin/sh
''':'
exec "{python}" "$0" "$@"
'''
import os, pathlib, signal, sys, time
log = pathlib.Path({log!r})
def write(text):
    with log.open("a") as f:
        f.write(text + "\\n")
write(" ".join(sys.argv[1:]) + " | " + os.environ.get("CUDA_VISIBLE_DEVICES", "-"))
print("training", flush=True)
signal.signal(signal.SIGTERM, lambda *_: (write("SIGTERM"), sys.exit(75)))
codes = {codes!r}
time.sleep({sleep})
sys.exit(codes[min(len(log.read_text().splitlines()), len(codes)) - 1])
"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def clone(tmp_path):
    """Return a folder with the launch scripts and a `deit` that notes how it was started."""
    folder = tmp_path / "clone"
    shutil.copytree(LAUNCH, folder / "launch")
    return folder


def install_deit(clone, codes=(0,), sleep=0.0):
    log = clone / "calls"
    values = {"python": sys.executable, "log": str(log), "codes": list(codes), "sleep": sleep}
    program(clone / ".venv" / "bin" / "deit", DEIT.format(**values))
    return log


def run(clone, script, *words, **environment):
    return subprocess.run(
        ["bash", f"launch/{script}", *words],
        cwd=clone,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    scripts = [str(p) for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch")]
    scripts += [str(p) for p in (LAUNCH.parent / "benchmarks").glob("*.sh")]
    assert len(scripts) == 6
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_local_starts_one_process_by_default(clone):
    log = install_deit(clone, codes=[3])
    done = run(clone, "local.sh", "--config=a b", "--workdir=w")
    assert done.returncode == 3
    assert log.read_text() == "train --config=a b --workdir=w | -\n"


def test_local_shares_the_gpus_out(clone):
    log = install_deit(clone)
    program(
        clone / ".venv" / "bin" / "nvidia-smi",
        "#!/bin/sh\nfor i in 0 1 2 3; do echo GPU $i; done\n",
    )
    assert run(clone, "local.sh", "--config=c", PROCESSES="2", PORT="999").returncode == 0
    flags = "train --config=c --multihost --coordinator=localhost:999 --num_processes=2"
    assert sorted(log.read_text().splitlines()) == [
        f"{flags} --process_id=0 | 0,1",
        f"{flags} --process_id=1 | 2,3",
    ]
    done = run(clone, "local.sh", PROCESSES="3")
    assert done.returncode == 2
    assert "PROCESSES=3 does not divide the 4 GPUs" in done.stderr


def test_local_hands_a_signal_on_once_and_waits(clone):
    log = install_deit(clone, sleep=30)
    environment = {**os.environ, "PROCESSES": "2"}
    process = subprocess.Popen(["bash", "launch/local.sh"], cwd=clone, env=environment)
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)  # until the stand-in has its handler
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert log.read_text().splitlines()[2:] == ["SIGTERM", "SIGTERM"]


GCLOUD = """#!/bin/sh
''':'
exec "{python}" "$0" "$@"
'''
import json, os, pathlib, subprocess, sys
folder = pathlib.Path({folder!r})
words = sys.argv[1:]
with (folder / "gcloud").open("a") as f:
    f.write(json.dumps(words) + "\\n")
kind, verb = words[2:4]
if verb == "describe":
    answers = json.loads((folder / "answers").read_text())
    answer = answers[kind].pop(0)
    (folder / "answers").write_text(json.dumps(answers))
    sys.exit(print(answer) if answer else "not found")
worker = folder / "worker"
if verb == "scp":
    subprocess.run(["cp", *words[4:6], worker], check=True)
if verb == "ssh":
    command = next(w for w in words if w.startswith("--command=")).removeprefix("--command=")
    os.chdir(worker)
    os.environ["HOME"] = str(worker)
    os.execvp("bash", ["bash", "-c", command])
"""


@pytest.fixture
def cloud(clone, tmp_path):
    """Return a function that runs tpu_vm.sh against answers, and its calls of gcloud."""
    worker = tmp_path / "worker"
    worker.mkdir()
    program(tmp_path / "bin" / "gcloud", GCLOUD.format(python=sys.executable, folder=str(tmp_path)))
    program(worker / ".local" / "bin" / "uv", '#!/bin/sh\necho "$@" >>"$HOME/uv"\n')
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], cwd=clone, check=True)

    def start(answers, *words, codes=(0,), **environment):
        install_deit(worker / "deit_jax", codes, sleep=0.2)
        (tmp_path / "answers").write_text(json.dumps(answers))
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = {"NAME": "n", "ZONE": "z", "TYPE": "v5litepod-16"} | environment
        done = run(clone, "tpu_vm.sh", *words, PATH=path, POLL_SECONDS="0.01", **environment)
        calls = [json.loads(line)[2:] for line in (tmp_path / "gcloud").read_text().splitlines()]
        return done, [call(words) for words in calls]

    return start


def call(words):
    """Return `kind verb` and what matters of the rest."""
    what = " ".join(words[:2])
    for word in words:
        if word.startswith("--command="):
            workers = next(w for w in words if w.startswith("--worker"))
            return f"{what} {workers}: {word[10:]}"
    return what


TRAIN = [
    "tpu-vm ssh --worker=0: bash deit_jax/launch/tpu_worker.sh running",
    "tpu-vm scp",
    "tpu-vm ssh --worker=all: tar xzf deit_jax.tar.gz && "
    "bash deit_jax/launch/tpu_worker.sh install",
    "tpu-vm ssh --worker=all: bash deit_jax/launch/tpu_worker.sh start",
    "tpu-vm ssh --worker=0: bash deit_jax/launch/tpu_worker.sh follow",
]
ASK, CREATE, DELETE = (f"queued-resources {v}" for v in ("describe", "create", "delete"))


def test_tpu_creates_installs_trains_and_deletes(cloud, tmp_path):
    answers = {"queued-resources": ["", "WAITING_FOR_RESOURCES", "ACTIVE"], "tpu-vm": []}
    done, calls = cloud(answers, "--config=a b.py", "--workdir=w", DELETE="1")
    assert done.returncode == 0, done.stderr
    assert calls == [ASK, CREATE, ASK, ASK, *TRAIN, DELETE]
    assert "training\n" in done.stdout
    started = (tmp_path / "worker" / "deit_jax" / "calls").read_text()
    assert started == "train --multihost --config=a b.py --workdir=w | -\n"
    assert "--editable .[tpu,fast,viz,gcs]" in (tmp_path / "worker" / "uv").read_text()
    words = [json.loads(line) for line in (tmp_path / "gcloud").read_text().splitlines()]
    (create,) = (w for w in words if w[3] == "create")
    assert create[4:] == [
        "n",
        "--node-id=n",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--zone=z",
        "--quiet",
    ]


def test_tpu_goes_on_after_a_preemption(cloud, tmp_path):
    answers = {"queued-resources": ["ACTIVE", "", "ACTIVE"], "tpu-vm": ["PREEMPTED"]}
    done, calls = cloud(answers, "--config=c", codes=[1, 0], SPOT="1")
    assert done.returncode == 0, done.stderr
    state = "tpu-vm describe"
    assert calls == [ASK, *TRAIN, state, DELETE, ASK, CREATE, ASK, *TRAIN]
    assert "the slice is PREEMPTED; creating it anew" in done.stderr
    words = [json.loads(line) for line in (tmp_path / "gcloud").read_text().splitlines()]
    assert "--spot" in next(w for w in words if w[3] == "create")


def test_tpu_workers_copy_data_where_they_are_told(cloud, tmp_path):
    done, _ = cloud({"queued-resources": ["ACTIVE"], "tpu-vm": []}, "--config=c", CACHE="/mnt/a b")
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "worker" / "train.sh").read_text()
    assert words == "env XDG_CACHE_HOME=/mnt/a\\ b .venv/bin/deit train --multihost --config=c "


def test_tpu_asks_again_for_a_suspended_slice(cloud):
    answers = {"queued-resources": ["SUSPENDED", "", "ACTIVE"], "tpu-vm": []}
    done, calls = cloud(answers, "--config=c")
    assert done.returncode == 0, done.stderr
    assert calls == [ASK, DELETE, ASK, CREATE, ASK, *TRAIN]


def test_tpu_trains_again_what_was_told_to_stop_but_not_what_failed(cloud):
    answers = {"queued-resources": ["ACTIVE"] * 2, "tpu-vm": ["READY", "READY"]}
    done, calls = cloud(answers, "--config=c", codes=[75, 1])
    assert done.returncode == 1
    assert "failed with exit code 1; the slice is kept" in done.stderr
    assert calls == [ASK, *TRAIN, "tpu-vm describe"] * 2


def test_tpu_delete(cloud):
    done, calls = cloud({}, "delete")
    assert done.returncode == 0
    assert calls == [DELETE]


def test_jobset_is_valid():
    """The Job inside against Kubernetes' own schema; the JobSet around it by its fields."""
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    # https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2
    assert set(jobset["spec"]) <= {"replicatedJobs", "network", "successPolicy", "failurePolicy"}
    assert set(jobset["spec"]["failurePolicy"]) == {"maxRestarts"}
    (workers,) = jobset["spec"]["replicatedJobs"]
    assert set(workers) == {"name", "replicas", "template"}
    assert set(workers["template"]) <= {"metadata", "spec"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "deit"}}
    kubernetes_validate.validate(job | workers["template"], "1.33", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job | {"spec": {"paralelism": 4}}, "1.33", strict=True)

    spec = workers["template"]["spec"]
    pod = spec["template"]["spec"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = math.prod(map(int, sides))
    (container,) = pod["containers"]
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == hosts
    check_command(container["command"] + container["args"])


def check_command(words):
    """Parse a `deit train` command line as the command does."""
    assert words[:2] == ["deit", "train"]
    command = Command("train", "")
    command.add_config(words[2:])
    flags.DEFINE_string("workdir", "", "", flag_values=command.flags)
    add_process_flags(command)
    assert not command.parse(words[2:], required=("config", "workdir"))
    validate(command.config, 16)
    return command


@pytest.mark.parametrize(("nodes", "extra"), [(1, "cuda"), (2, "cuda"), (1, "tpu")])
def test_skypilot_runs_a_command_that_deit_understands(nodes, extra, tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    # https://docs.skypilot.co/en/latest/reference/yaml-spec.html
    assert set(task) == {*("name", "num_nodes", "resources", "workdir", "envs", "setup", "run")}
    program(tmp_path / ".venv" / "bin" / "deit", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    told = {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_RANK": "1"}
    told["SKYPILOT_NODE_IPS"] = "10.0.0.1\n10.0.0.2"
    environment = os.environ | task["envs"] | told | {"EXTRA": extra}
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    command = check_command(["deit", *done.stdout.splitlines()])
    assert command.flags.workdir == "gs://my-bucket/runs/deit_base_distilled"
    assert command.config.data.dir == "gs://my-bucket/tfds"
    assert command.flags.multihost == (nodes > 1 or extra == "tpu")
    if nodes > 1:
        assert command.flags.coordinator == "10.0.0.1:12345"
        assert (command.flags.num_processes, command.flags.process_id) == (2, 1)


def test_dockerfile_has_its_targets():
    text = (LAUNCH / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\w+)$", text, re.MULTILINE)
    assert [name for _, name in stages] == ["base", "cpu", "cuda", "tpu"]
    assert {base for base, _ in stages[1:]} == {"base"}
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = re.findall(r'"\.\[([\w,]+)\]"', text)
    assert len(extras) == 3
    assert {e for group in extras for e in group.split(",")} <= set(
        parser["options.extras_require"]
    )


def test_no_launcher_sets_a_hyper_parameter():
    """They may say which config, where data and weights are, and where the run is kept."""
    allowed = {"data.dir", "teacher.weights"}
    for path in LAUNCH.iterdir():
        assert set(re.findall(r"--config\.([\w.]+)", path.read_text())) <= allowed, path

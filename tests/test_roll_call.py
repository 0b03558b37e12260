"""The processes of a run find each other before JAX connects them, or say who did not come."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deit_jax.errors import UserError
from deit_jax.parallel import roll_call
from deit_jax.parallel.roll_call import Place, attend
from tests.emulator import free_port

ROOT = Path(__file__).parent.parent


def meet(places, timeout, delays=()):
    """Let processes attend, each in a thread; return {process: None or what it was told}."""
    said = {}

    def one(place, delay):
        time.sleep(delay)
        try:
            attend(place, timeout)
            said[place.process] = None
        except UserError as error:
            said[place.process] = str(error)

    delays = delays or [0.0] * len(places)
    threads = [threading.Thread(target=one, args=pair) for pair in zip(places, delays, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return said


def places(numbers, count, port=None):
    port = port or free_port()
    return [Place(f"localhost:{port}", count, number) for number in numbers]


@pytest.mark.parametrize("delays", [(0, 0, 0, 0), (1.0, 0, 0.3, 0), (0, 0.7, 0, 1.2)])
def test_those_who_come_go_on_together(delays):
    assert meet(places(range(4), 4), 20.0, delays) == dict.fromkeys(range(4))
    attend(Place("nowhere:1", 1, 0), 1.0)  # who is alone waits for nobody


def test_the_port_is_free_for_jax_afterwards():
    port = free_port()
    for _ in range(3):
        assert meet(places(range(3), 3, port), 20.0) == dict.fromkeys(range(3))
        with socket.create_server(("", port)):
            pass


def test_who_did_not_come_is_named_by_all_who_did(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    said = meet(places((0, 2), 4), 1.5)
    line = "--multihost: 2 of 4 processes did not come in 1.5 s: 1 (b), 3 (d); there are those on "
    assert said[0] == said[2]
    assert said[0].startswith(line + socket.gethostname())
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES")
    assert "did not come in 0.5 s: 1, 2, 3, 4, 5, 6, 7, 8, …; " in meet(places((0,), 30), 0.5)[0]


def test_without_process_0_the_others_end_too():
    (place,) = places((1,), 2)
    began = time.monotonic()
    said = meet([place], 1.0)[1]
    assert time.monotonic() - began < 10
    assert said.startswith(f"--multihost: process 0 at {place.address} did not answer in 1 s (")
    assert "--startup_timeout" in said


def test_what_is_no_process_of_the_run_does_no_harm():
    """A scanner of ports, a process of a run of another size, one that comes twice."""
    port = free_port()
    ours = places(range(3), 3, port)

    def scan():
        for text in (b"GET / HTTP/1.0\r\n\r\n", b"", b"[1]\n", b'{"process": "x"}\n'):
            time.sleep(0.1)
            with socket.create_connection(("localhost", port), 5) as line:
                line.sendall(text)

    threading.Timer(0.5, scan).start()
    other = Place(ours[0].address, 9, 1)
    said = {}
    threading.Timer(0.3, lambda: said.update(meet([other], 1.0))).start()
    assert meet(ours, 20.0, (0.0, 0.1, 2.5)) == dict.fromkeys(range(3))
    time.sleep(2)
    assert "did not answer" in said[1]


def test_a_process_that_ends_while_it_waits_is_missed():
    ours = places(range(3), 3)
    port = int(ours[0].address.rpartition(":")[2])

    def come_and_go():
        with socket.create_connection(("localhost", port), 5) as line:
            line.sendall(b'{"process": 1, "processes": 3, "host": "here"}\n')
            time.sleep(0.3)

    threading.Timer(0.3, come_and_go).start()
    said = meet([ours[0], ours[2]], 3.0, (0.0, 1.2))
    assert "1 of 3 processes did not come in 3 s: 1" in said[0]
    assert said[2] == said[0]


def test_a_port_that_is_taken_and_places_that_are_none():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of this machine cannot be used"):
            attend(Place(f"localhost:{port}", 2, 0), 5.0)
    with pytest.raises(UserError, match="--coordinator=host: give HOST:PORT"):
        attend(Place("host", 2, 0), 5.0)
    with pytest.raises(UserError, match="--coordinator=host:99999: give HOST:PORT"):
        attend(Place("host:99999", 2, 0), 5.0)
    with pytest.raises(UserError, match="--process_id=2: there are 2 processes, from 0 on"):
        attend(Place("host:1", 2, 2), 5.0)


def test_two_processes_of_one_number_on_two_hosts(monkeypatch):
    names = iter(("here", "a", "b"))
    monkeypatch.setattr(roll_call.socket, "gethostname", lambda: next(names))
    said = meet(
        [*places((0,), 3, port := free_port()), *places((1, 1), 3, port)], 5.0, (0, 0.3, 0.6)
    )
    assert "process 1 is on a and on b; give each its own --process_id" in said[0]


def test_a_training_that_waits_in_vain_ends_in_one_line(tmp_path):
    words = ["train", f"--config={ROOT}/configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    words += ["--multihost", f"--coordinator=localhost:{free_port()}", "--num_processes=3"]
    words += ["--process_id=0", "--startup-timeout=1"]
    done = subprocess.run(
        [sys.executable, "-m", "deit_jax", *words],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("deit train: --multihost: 2 of 3 processes did not come in 1 s")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()

"""Wait until all processes of a run are there, and say which ones are not.

Left to itself JAX ends a process with a page of C++ frames when others do not come, and names
nobody. So before it is told to connect, process 0 listens at the very address that JAX will use,
the others tell it their numbers and hosts, and all go on together or end with the same line.
"""

import contextlib
import json
import os
import re
import select
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

from deit_jax.errors import UserError

AGAIN_S = 0.5  # between two tries to reach process 0
SHORT_S = 10.0  # for a line of a process that has connected


class Place(NamedTuple):
    """Where the processes of a run meet, HOST:PORT of process 0, how many, and which this is."""

    address: str
    processes: int
    process: int


def attend(place: Place, timeout: float) -> None:
    """Return once all processes of a run are there; raise UserError after `timeout` seconds.

    The line names those that have not come, in every process that has.
    """
    host, _, port = place.address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={place.address}: give HOST:PORT of process 0")
    if not 0 <= place.process < place.processes:
        raise UserError(
            f"--process_id={place.process}: there are {place.processes} processes, from 0 on"
        )
    deadline = time.monotonic() + timeout
    if place.processes == 1:
        return
    if place.process == 0:
        _listen(int(port), place.processes, deadline, timeout)
    else:
        _report(host.strip("[]"), int(port), place, deadline, timeout)


def _listen(port: int, count: int, deadline: float, timeout: float) -> None:
    """Wait for all others; tell them to go on, or why not."""
    lines: dict[int, socket.socket] = {}
    hosts = {0: socket.gethostname()}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_server(port))
        while (left := deadline - time.monotonic()) > 0:
            if len(hosts) == count and not _drop_gone(lines, hosts):
                break
            server.settimeout(left)
            try:
                line, _ = server.accept()
            except TimeoutError:
                break
            stack.enter_context(line)
            said = _read(line)
            number = said.get("process")
            number = number if isinstance(number, int) and 0 < number < count else 0
            ours = said.get("processes") == count and isinstance(said.get("host"), str)
            if not ours or not number:
                _send(line, {"refused": f"another run, of {count} processes"})
                continue
            if number in hosts and number in lines and hosts[number] != said["host"]:
                twice = f"process {number} is on {hosts[number]} and on {said['host']}"
                _end(lines, f"--multihost: {twice}; give each its own --process_id")
            hosts[number], lines[number] = said["host"], line
        if len(hosts) < count:
            _end(lines, _missing(hosts, count, timeout))
        for line in lines.values():
            _send(line, {"go": True})


def _drop_gone(lines: dict[int, socket.socket], hosts: dict[int, str]) -> bool:
    """Forget processes that have ended since they came; return whether there were any."""
    gone = [number for number, line in lines.items() if select.select([line], [], [], 0)[0]]
    for number in gone:  # who waits says nothing more: what can be read is the end
        lines.pop(number).close()
        del hosts[number]
    return bool(gone)


def _end(lines: dict[int, socket.socket], message: str) -> None:
    for line in lines.values():
        _send(line, {"failed": message})
    raise UserError(message)


def _missing(hosts: dict[int, str], count: int, timeout: float) -> str:
    absent = [number for number in range(count) if number not in hosts]
    known = expected_hosts(count)
    shown = [f"{n} ({known[n]})" if known else str(n) for n in absent[:8]]
    shown += ["…"] if len(absent) > 8 else []
    here = ", ".join(sorted(set(hosts.values())))
    return (
        f"--multihost: {len(absent)} of {count} processes did not come in {timeout:g} s: "
        f"{', '.join(shown)}; there are those on {here}. Look at their logs, or give them more "
        "time with --startup_timeout"
    )


def _report(host: str, port: int, place: Place, deadline: float, timeout: float) -> None:
    """Tell process 0 that this one is there, and wait for its word."""
    said = {
        "process": place.process,
        "processes": place.processes,
        "host": socket.gethostname(),
    }
    while True:
        left = deadline - time.monotonic()
        reason: Exception | str = "no answer"
        try:
            with socket.create_connection((host, port), max(left, AGAIN_S)) as line:
                _send(line, said)
                # Process 0 may have been started later: it speaks first of its own deadline.
                line.settimeout(max(left, AGAIN_S) + timeout)
                answer = _read(line)
            if answer.get("go"):
                return
            if answer.get("failed"):
                raise UserError(answer["failed"])
            if answer.get("refused"):
                reason = f"it belongs to {answer['refused']}"
        except OSError as error:
            reason = error
        if time.monotonic() > deadline:
            raise UserError(
                f"--multihost: process 0 at {place.address} did not answer in {timeout:g} s "
                f"({getattr(reason, 'strerror', None) or reason}); look at its log, or give it "
                "more time with --startup_timeout"
            )
        time.sleep(AGAIN_S)


def _server(port: int) -> socket.socket:
    """Listen at a port of all of this machine's addresses, as JAX's own server does."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"--multihost: port {port} of this machine cannot be used ({error.strerror}); another "
            "run may have it: give another in --coordinator=HOST:PORT"
        ) from error


def _send(line: socket.socket, message: dict) -> None:
    with contextlib.suppress(OSError):  # who is gone need not hear it
        line.sendall(json.dumps(message).encode() + b"\n")


def _read(line: socket.socket) -> dict:
    """Return a line of JSON; {} for anything else, as from a scanner of ports."""
    with contextlib.suppress(OSError, ValueError), line.makefile("rb") as file:
        if line.gettimeout() is None or line.gettimeout() == 0:
            line.settimeout(SHORT_S)
        said = json.loads(file.readline(10_000))
        return said if isinstance(said, dict) else {}
    return {}


def expected_hosts(count: int) -> list[str]:
    """Return the host of each process by Slurm's or TPU's environment; [] where none tells."""
    if names := os.environ.get("TPU_WORKER_HOSTNAMES"):
        hosts = [name.strip() for name in names.split(",")]
        return hosts if len(hosts) == count else []
    nodes = _expanded(os.environ.get("SLURM_STEP_NODELIST", ""))
    hosts = [h for h, n in zip(nodes, tasks_by_node(), strict=False) for _ in range(n)]
    return hosts if len(hosts) == count else []


def tasks_by_node() -> list[int]:
    """Return how many processes Slurm starts on each node, by its `8(x2),4`; [] without Slurm."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    return [int(n) for n, times in _repeated(text) for _ in range(times)]


def _repeated(text: str) -> Iterator[tuple[str, int]]:
    """Iterate over numbers and how often they stand, of Slurm's `8(x2),4`."""
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        yield number, int(times or 1)


def _expanded(text: str) -> list[str]:
    """Return the names in Slurm's `node[01-03,7],host`."""
    found = []
    for start, inside, end in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", text):
        if not inside:
            found.append(f"{start}{end}")
        for part in inside.split(",") if inside else ():
            first, _, last = part.partition("-")
            for number in range(int(first), int(last or first) + 1):
                found.append(f"{start}{number:0{len(first)}}{end}")
    return found

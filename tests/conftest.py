"""Eight devices out of one CPU, and small configs.

With TEST_GPU=1 instead, the GPU of this machine: for `pytest -m "not eight_devices"` and the files
that benchmarks/gpu_check.py names.
"""

import os
import shutil
import sys

if os.environ.get("TEST_GPU") == "1":
    # Several processes share it, and references are in full float32.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Most of the suite's time is compiling programs that run for milliseconds: half without -O.
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    )
# No compilation cache, however much it would save: with jaxlib 0.12 a program for eight CPU devices
# that is read back from it starts its collectives in another order on each, and they never meet.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import pytest
from PIL import Image

from tests import programs
from tests.tiny import make_tiny_config

if os.environ.get("TEST_GPU") != "1":
    programs.compile_once()


@pytest.fixture(autouse=True)
def _bounded_memory():
    yield
    programs.bound_memory()


@pytest.fixture
def tiny_config():
    """Return the full recipe around a student and a teacher that compile in seconds."""
    return make_tiny_config()


@pytest.fixture(scope="session")
def _gcs_server(tmp_path_factory):
    from tests.emulator import Emulator

    server = Emulator(tmp_path_factory.mktemp("gcs"))
    yield server
    server.kill()


@pytest.fixture
def gcs_server(_gcs_server, monkeypatch):
    """Return a server that this process asks for gs://, instead of Google's."""
    from deit_jax.storage import gcs
    from tests.emulator import environment

    for name, value in environment(_gcs_server.url).items():
        monkeypatch.setenv(name, value)
    gcs._client.cache_clear()
    yield _gcs_server
    gcs._client.cache_clear()


@pytest.fixture(scope="session")
def _s3_server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_server(_s3_server, monkeypatch):
    """Let this process ask a server of its own for s3://, not Amazon; return the client."""
    from deit_jax.storage import s3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_server)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3._client.cache_clear()
    client = s3._client(os.getpid())
    client.create_bucket(Bucket="bucket")
    yield client
    s3._client.cache_clear()


@pytest.fixture
def torch():
    """Return PyTorch; `make test` installs it, TEST_TORCH=0 does without."""
    return _reference("torch")


@pytest.fixture
def timm():
    """Return timm."""
    return _reference("timm")


def _reference(name):
    if os.environ.get("TEST_TORCH") == "0":
        pytest.skip("TEST_TORCH=0")
    from tests import timm_reference

    return getattr(timm_reference, f"import_{name}")()


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes small PNG files, each with pixels of its own."""

    def write(*paths):
        for number, path in enumerate(paths):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / path, format="png")
        return tmp_path

    return write


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return a function that writes a module into the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return tmp_path

    return write


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """Return the workdir of a student that reads digits, with its teacher, made in seconds."""
    from tests.fitted import write_run

    return write_run(tmp_path_factory.mktemp("fitted") / "student")


@pytest.fixture(scope="module")
def browser():
    """Return a headless browser of playwright's: the machine's own, or else the one it brings."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "microsoft-edge", "msedge")
    found = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as driver:
        own = driver.chromium.executable_path
        if found is None and not os.path.exists(own):
            pytest.skip("no browser: install chromium, or run `playwright install chromium`")
        opened = driver.chromium.launch(executable_path=found or own, args=["--no-sandbox"])
        yield opened
        opened.close()

"""Compiled programs are kept between starts of a training, and change nothing about it."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from deit_jax.cli import compile_cache
from tests.faults import driver

# Trains, and then tells how many programs were read from the cache.
COUNTING = """
import sys, jax
from deit_jax.__main__ import main
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None
)
code = main(sys.argv[1:])
print("hits", len(hits))
sys.exit(code)
"""


def train(workdir, cache, **more):
    """Train two steps on one CPU device as a stranger's shell would; return stderr and the hits."""
    environment = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    flags = "--xla_force_host_platform_device_count=1 --xla_cpu_multi_thread_eigen=false"
    flags += " --xla_backend_optimization_level=0"
    environment |= {"XLA_FLAGS": flags, "XDG_CACHE_HOME": str(cache), **more}
    words = [*driver.WORDS, "--config.epochs=0.4", f"--workdir={workdir}"]
    words += ["--config.distill.kind=none"]  # one training, not also its teacher's
    words += ["--config.model.depth=1", "--config.mixing.prob=0.0"]
    words += ["--config.augment.erase_prob=0.0"]  # all of which compiles in less
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, "train", *words],
        cwd=driver.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, int(done.stdout.rpartition("hits ")[2])


def programs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith("-cache"))


@pytest.mark.slow
def test_the_second_start_reads_what_the_first_compiled(tmp_path):
    cache = tmp_path / "cache"
    _, hits = train(tmp_path / "first", cache)
    kept = programs(cache / "deit_jax" / "xla")
    assert hits == 0
    assert any("train_step" in path.name for path in kept)
    _, hits = train(tmp_path / "second", cache)
    assert hits == len(kept)
    assert driver.differences(tmp_path / "first", tmp_path / "second") == []
    # The second start may keep one more, which took JAX's one second of compiling only that time.
    again = programs(cache / "deit_jax" / "xla")
    assert set(kept) <= set(again)
    assert sum("train_step" in path.name for path in again) == 1
    # As if the machine had gone down while they were written.
    for path in again:
        path.write_bytes(path.read_bytes()[:1000])
    _, hits = train(tmp_path / "third", cache)
    assert hits == 0
    assert driver.differences(tmp_path / "first", tmp_path / "third") == []


@pytest.fixture
def one_device(monkeypatch):
    """Let enable() see one device and JAX's own defaults; put JAX's settings back afterwards."""
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_place_is_xdgs_unless_jax_was_told_another(one_device, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xdg/deit_jax/xla")
    for place in (str(tmp_path / "own"), "gs://bucket/programs"):
        jax.config.update("jax_compilation_cache_dir", place)
        compile_cache.enable()
        assert jax.config.jax_compilation_cache_dir == place
    assert (tmp_path / "own").is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert compile_cache.default_folder() == tmp_path / "home/.cache/deit_jax/xla"


def test_several_cpu_devices_do_without(one_device, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_cache.enable()
    assert not jax.config.jax_enable_compilation_cache
    assert not list(tmp_path.iterdir())


def test_it_stays_off_where_jax_has_it_off(one_device, monkeypatch, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None
    assert not list(tmp_path.iterdir())


@pytest.fixture
def lines(monkeypatch, caplog):
    """Return what is logged."""
    monkeypatch.setattr(logging.getLogger("deit_jax"), "propagate", True)
    return caplog


def test_a_place_that_cannot_be_written_is_one_line(one_device, monkeypatch, tmp_path, lines):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compile_cache.enable()
    place = tmp_path / "file/deit_jax/xla"
    assert lines.messages == [f"{place}: compiled programs are not kept (Not a directory)"]
    assert not jax.config.jax_enable_compilation_cache


def test_without_a_home_it_says_so(one_device, monkeypatch, lines):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    compile_cache.enable()
    (line,) = lines.messages
    assert line == "~/.cache: compiled programs are not kept (Could not determine home directory.)"
    assert not jax.config.jax_enable_compilation_cache

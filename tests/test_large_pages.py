"""The command asks for large pages, once, and leaves alone what the user has set."""

import os
import subprocess
import sys

import pytest

from deit_jax import __main__ as program
from deit_jax.cli import huge_pages

# What the command is started with, and as which process it goes on.
PROGRAM = "import os; print('before', os.getpid(), os.environ.get('GLIBC_TUNABLES'), flush=True)"
AFTER = "print('after', os.getpid(), os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])"


def run(tmp_path, given: dict, *words: str) -> list[str]:
    script = tmp_path / "program.py"
    nodes = f"huge_pages.ACCELERATORS = ({str(tmp_path / 'gpu*')!r},)"
    lines = (PROGRAM, "import sys", "from deit_jax.cli import huge_pages", nodes)
    script.write_text("\n".join([*lines, "huge_pages.restart()", AFTER]))
    own = (huge_pages.VARIABLE, "JAX_PLATFORMS")
    environment = {k: v for k, v in os.environ.items() if k not in own} | given
    command = [sys.executable, str(script), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_a_program_goes_on_with_large_pages_as_it_was_called(tmp_path):
    first, again, last = run(tmp_path, {}, "--a=b c", "é")
    assert first.endswith("None")
    assert again.endswith(huge_pages.VALUE)
    assert last.split()[1] == first.split()[1]  # the same process: signals find it
    assert last.endswith("['--a=b c', 'é']")


@pytest.mark.parametrize("chosen", ["", "glibc.malloc.arena_max=1"])
def test_what_the_user_has_set_stays(tmp_path, chosen):
    first, last = run(tmp_path, {huge_pages.VARIABLE: chosen})
    assert first.startswith("before")
    assert last.startswith("after")
    assert chosen in last


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_where_an_accelerator_computes_nothing_changes(tmp_path):
    (tmp_path / "gpu0").touch()
    assert len(run(tmp_path, {})) == 2
    assert len(run(tmp_path, {"JAX_PLATFORMS": "cpu"})) == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--config=c.py"], True),
        (["eval"], True),
        (["bench", "--config=c.py"], True),
        (["bench", "--input-only"], False),  # says what a host of TPUs would do
        (["report"], False),
        (["--version"], False),
    ],
)
def test_commands_that_compute_do_so(monkeypatch, words, expected):
    asked = []
    monkeypatch.setattr(sys, "argv", ["deit", *words])
    monkeypatch.setattr(huge_pages, "restart", lambda: asked.append(words))
    monkeypatch.setattr(program, "_run", lambda name, argv: 0)
    assert program.main() == 0
    assert bool(asked) == expected
    assert program.main(words) == 0  # called by another program, which cannot start again
    assert len(asked) == expected

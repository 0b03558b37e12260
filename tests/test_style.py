"""The structure that docs/design.md promises: imports flow one way, files stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "deit_jax").rglob("*.py"))
COMMANDS = {
    "train",
    "train_command",
    "tape_command",
    "evaluate",
    "predict",
    "convert",
    "prepare",
    "inspect_data",
    "bench",
    "bench_input",
    "bench_step",
    "plan",
    "picture",
    "analyze",
    "report",
    "__main__",
}


def imported(path):
    """Return the names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_is_small_and_imports_downwards(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    names = imported(path)
    ours = {name for name in names if name.startswith("deit_jax.")}
    if "models" in path.parts:
        assert all(name.startswith("deit_jax.models") for name in ours)
    else:
        assert not {name for name in names if name.startswith("flax.linen")}
        assert "flax.linen" not in text
    if path.stem not in COMMANDS:
        commands = {f"deit_jax.{name}" for name in COMMANDS}
        assert not commands & ours
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} needs scrolling"


def test_no_module_imports_tensorflow_or_torch():
    for path in FILES:
        assert not {"tensorflow", "torch"} & imported(path), path


def test_code_has_no_defaults_for_config_fields():
    for path in FILES:
        if path.stem != "claims":  # which reads other people's config.json
            assert "config.get(" not in path.read_text(), path

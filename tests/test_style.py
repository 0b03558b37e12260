"""The structure that docs/design.md promises: rooms, the way imports flow, small files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "deit_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# What each room may import besides itself. The rooms of a line import none of the same line.
FLOORS = (
    ("errors", "configs", "shapes"),
    ("models", "parallel", "storage"),
    ("step", "data", "config"),
    ("workdir",),
    ("weights", "teachers"),
    ("train",),
    ("analysis", "perf", "doctor", "tape", "export"),
    ("demo", "share"),
    ("cli",),
    ("__main__",),
)
# Where less is allowed than what lies below.
NARROW = {
    "models": {"errors", "shapes"},
    "parallel": {"errors"},
    "step": {"models", "parallel"},
    "data": {"errors", "storage", "configs", "shapes"},
    "config": {"errors", "storage", "configs"},
}
REACH = 18  # files that a reader of train_step may come to
WHOLE_CONFIG = 18  # functions that take a whole config
# The only places that touch files by themselves; all others ask storage/.
FILE_CALLS = {
    *("open", "read_text", "write_text", "read_bytes", "write_bytes", "mkdir", "touch", "unlink"),
    *("rmdir", "rename", "rglob", "iterdir", "is_file", "is_dir", "rmtree", "copytree", "exists"),
    *("access", "listdir", "scandir", "makedirs", "remove", "TemporaryFile"),
    *("TemporaryDirectory", "NamedTemporaryFile", "mkdtemp", "savefig", "savez"),
}
TOUCH_FILES = {
    "storage": "the one place for what runs keep",
    "data": "images, and the data sets made of them",
    "weights/readers.py": "other people's weights",
    "weights/pickles.py": "those of PyTorch",
    "weights/jax_trees.py": "those of other JAX code",
    "weights/metadata.py": "other people's descriptions of them",
    "weights/load.py": "whether a source is a run, a file or a folder",
    "weights/locate.py": "whether a source is there or on the hub",
    "config/files.py": "which config files there are",
    "export": "what other runtimes write and read by themselves",
    "analysis/report/page.py": "its own style sheet",
    "demo/page.py": "its own style sheet",
    "doctor/machine.py": "what the kernel says of the machine, and whether a disk can be written",
    "cli/compile_cache.py": "where compiled programs are kept",
    "cli/platforms.py": "device files and the driver's",
    "perf/plan.py": "what libtpu writes to stderr",
    "perf/step_time.py": "traces, and a run that goes again",
}
# What knows PyTorch, imported where a torch teacher is asked for; open.py asks for it.
OTHERS = ("deit_jax.export.savedmodel", "deit_jax.export.onnx_file")  # TensorFlow, onnxruntime
TORCH = ("deit_jax.teachers.torch_", "deit_jax.teachers.open")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Return the names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in whole}
    return names


GRAPH = {module: imported(path) & MODULES.keys() - {module} for module, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def allowed(room: str) -> set[str]:
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    below = {other for rooms in FLOORS[:floor] for other in rooms}
    return NARROW.get(room, below) | {room, ""}


def test_the_package_shows_its_rooms():
    shown = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name[:2] != "__"}
    assert shown == {room for rooms in FLOORS for room in rooms} - {"__main__"}
    for folder in [PACKAGE, *(p for p in PACKAGE.rglob("*") if list(p.glob("*.py")))]:
        says = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert says, f"{folder}: its __init__.py does not say what it is for"
        assert len(says.splitlines()) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_is_small_and_imports_what_its_room_may(path):
    text, module = path.read_text(), module_of(path)
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} needs scrolling"
    room, names = room_of(module), imported(path)
    if room:
        others = {room_of(name) for name in GRAPH[module]}
        assert others <= allowed(room), f"{module} imports {others - allowed(room)}"
    if room != "models":
        assert "flax.linen" not in text
    if room == "data":
        assert not {name for name in names if name.partition(".")[0] == "jax"}
    if room not in ("cli", ""):
        assert "absl.flags" not in names
        assert "from absl import flags" not in text
        assert "sys.stdout.write" not in text
    foreign = {"tensorflow", "torch", "torchax", "timm", "transformers", "onnxruntime", "jax2onnx"}
    if not module.startswith((*TORCH, *OTHERS)):
        assert not foreign & {name.partition(".")[0] for name in names}
    if module != "deit_jax.weights.metadata":  # which reads other people's config.json
        assert "config.get(" not in text


def test_imports_make_no_circle():
    state = {}

    def visit(module, way):
        assert state.get(module) != "open", " -> ".join([*way, module])
        if module not in state:
            state[module] = "open"
            for other in sorted(GRAPH[module]):
                visit(other, [*way, module])
            state[module] = "done"

    for module in sorted(GRAPH):
        visit(module, [])


def test_whoever_reads_the_step_reads_a_few_files():
    seen, ahead = set(), ["deit_jax.step.train_step"]
    while ahead:
        module = ahead.pop()
        if module not in seen:
            seen.add(module)
            ahead += GRAPH[module]
    assert len(seen) <= REACH, sorted(seen)


def test_few_functions_take_a_whole_config():
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
                if "config" in names:
                    found.append(f"{path.relative_to(PACKAGE)}: {node.name}")
    assert len(found) <= WHOLE_CONFIG, "\n".join(found)


def test_files_are_touched_in_few_places():
    for path in FILES:
        place = path.relative_to(PACKAGE).as_posix()
        if place in TOUCH_FILES or place.partition("/")[0] in TOUCH_FILES:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            if isinstance(function, ast.Name):
                assert function.id != "open", f"{place}:{node.lineno}"
            elif isinstance(function, ast.Attribute) and function.attr in FILE_CALLS and node.args:
                owner, argument = ast.unparse(function.value), ast.unparse(node.args[0])
                # Of storage.py, of a tape, of TensorStore; or into memory.
                fine = owner.startswith(("backend(", "disk", "Tape", "cls", "ts"))
                fine |= function.attr in ("savefig", "savez") and argument == "content"
                assert fine, f"{place}:{node.lineno}: {ast.unparse(node)[:80]}"

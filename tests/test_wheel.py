"""The wheel alone is enough: installed, it trains, from anywhere, whatever else lies there."""

import email
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", ".*_cache", ".hypothesis", ".gpu", "build", "dist", "*.egg-info", "runs"),
    "__pycache__",
)
MINE = """
from deit_jax.configs import base, quickstart


def get_config():
    c = quickstart.get_config()
    assert c.keys() == base.get_config().keys()
    c.epochs = c.teacher.epochs = 0.1
    c.model.depth = 1
    return c
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Build both packages of a copy of this checkout as a release does, the wheel of the sdist."""
    source, dist = tmp_path_factory.mktemp("source") / "deit_jax", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    subprocess.run([sys.executable, source / ".github/package.py", "some/one", "v7"], check=True)
    subprocess.run([sys.executable, "-m", "build", f"--outdir={dist}", str(source)], check=True)
    return dist


@pytest.fixture(scope="module")
def wheel(dist):
    """Return the wheel."""
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def deit(wheel, tmp_path_factory):
    """Install it into an environment that has what it needs, but nothing of this checkout."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched, and its own .pth files are not read: not the one
    # by which this checkout is installed.
    needed = [p for p in site.getsitepackages() if Path(p).is_dir()]
    (packages / "needed.pth").write_text("\n".join(needed))
    pip = [sys.executable, "-m", "pip", f"--python={venv}/bin/python", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)
    return venv / "bin" / "deit"


@pytest.fixture
def elsewhere(tmp_path):
    """Return a folder with foreign packages of the names that this project's folders have."""
    for name in ("configs", "tests", "benchmarks", "launch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('a foreign package')")
        (tmp_path / name / "base.py").write_text("raise RuntimeError('a foreign module')")
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def run(command, folder) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_it_holds_the_rooms_and_the_configs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"deit_jax", f"{wheel.name.split('-py3')[0]}.dist-info"}
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "deit_jax").rglob("*.py")}
    files |= {f"deit_jax/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    files |= {"deit_jax/analysis/report/style.css", "deit_jax/demo/style.css"}
    assert files == {name for name in names if name.startswith("deit_jax/")}
    held = zipfile.ZipFile(wheel).read("deit_jax/configs/__init__.py").decode()
    assert held == (ROOT / "configs/__init__.py").read_text()


def test_pypi_takes_both_packages_and_shows_links_that_go_somewhere(dist, wheel):
    files = sorted(map(str, dist.iterdir()))
    assert len(files) == 2
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    (name,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA"))
    said = email.message_from_bytes(zipfile.ZipFile(wheel).read(name))
    assert said["Name"] == "deit_jax"
    assert "Homepage, https://github.com/some/one" in said.get_all("Project-URL")
    readme = said.get_payload()
    assert "https://github.com/some/one/blob/v7/docs/start.md" in readme
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        assert target.startswith("https://"), target
    licence = name.replace("METADATA", "licenses/LICENSE")
    assert zipfile.ZipFile(wheel).read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_source_distribution_has_all_that_tests_and_docs_need(dist):
    (built,) = dist.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        held = {n.partition("/")[2] for n in archive.getnames()}
    for folder in ("configs", "docs", "launch", "tests", "benchmarks", "deit_jax"):
        files = [p for p in (ROOT / folder).rglob("*") if p.is_file()]
        wanted = {p.relative_to(ROOT).as_posix() for p in files if "__pycache__" not in p.parts}
        assert wanted <= held
    top = ("LICENSE", "CHANGELOG.md", "CITATION.cff", "Makefile", "mkdocs.yml", "setup.cfg")
    assert held.issuperset(top)
    assert not [name for name in held if name.endswith(".pyc")]


def test_a_strangers_config_trains_and_becomes_a_workdir_again(deit, elsewhere):
    done = run([deit, "train", "--config=mine.py", "--workdir=run"], elsewhere)
    assert "top-1" in done.stdout
    assert (elsewhere / "run/results.json").exists()
    run([deit, "convert", "run", "again", "--to=deit_jax"], elsewhere)
    assert (elsewhere / "again/config.json").exists()
    run([deit, "report", "--workdir=run", "--images=8"], elsewhere)
    assert "<style>" in (elsewhere / "run/report.html").read_text()


@pytest.mark.parametrize("name", ["quickstart.py", "configs/quickstart.py"])
def test_a_config_that_comes_with_it_is_found_by_name(deit, elsewhere, name):
    words = ["--config.data.source=digits", "--out=sheet.png"]
    run([deit, "inspect", f"--config={name}", *words], elsewhere)
    assert (elsewhere / "sheet.png").exists()
    code = (
        "import sys; from deit_jax.cli.flags import Command; c = Command('x', '')\n"
        "words = ['--config=configs/deit.py:variant=tiny', '--config.seed=7']\n"
        "c.add_config(words); c.parse(words); print(c.config.model.name, c.config.seed)\n"
        "import deit_jax; print(deit_jax.__file__)"
    )
    done = run([deit.parent / "python", "-c", code], elsewhere)
    assert done.stdout.splitlines()[0] == "deit_tiny_patch16_224 7"
    assert str(deit.parent.parent) in done.stdout


def test_a_file_of_ones_own_goes_before_one_of_the_same_name(deit, elsewhere):
    (elsewhere / "quickstart.py").write_text(MINE.replace("c.model.depth = 1", "c.seed = 77"))
    code = (
        "from deit_jax.config.files import locate, shipped\n"
        "print(locate('quickstart.py'), locate('deit.py') == str(shipped()['deit.py']))\n"
        "print(locate('other/deit.py'), locate('nothing.py'))"
    )
    done = run([deit.parent / "python", "-c", code], elsewhere)
    assert done.stdout.split() == ["quickstart.py", "True", "other/deit.py", "nothing.py"]

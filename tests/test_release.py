"""What a release says of itself: one version in all places, and the changelog's part of it."""

import importlib.util
import json
import re
from datetime import date
from pathlib import Path

import pytest
import yaml

import deit_jax

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("package", ROOT / ".github/package.py")
package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)


def releases():
    text = (ROOT / "CHANGELOG.md").read_text()
    return re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)


def test_the_version_is_the_same_everywhere():
    (version, day), *_ = releases()
    assert version == deit_jax.__version__
    date.fromisoformat(day)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == version
    assert cited["date-released"] == day
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_has_what_the_format_asks_for_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    (paper,) = cited["references"]
    assert len(paper["authors"]) == 6
    assert "2012.12877" in json.dumps(paper)


def test_a_releases_notes_are_its_part_of_the_changelog():
    (version, _), *_ = releases()
    notes = package.notes((ROOT / "CHANGELOG.md").read_text(), version)
    assert "### Added" in notes
    assert "## [" not in notes
    with pytest.raises(SystemExit, match=r"9\.9\.9: CHANGELOG.md has no such version"):
        package.notes("## [1.0.0] - 2026-01-01\n", "9.9.9")


def test_readmes_links_become_those_of_the_repository():
    text = "[a](docs/a.md#b) ![c](docs/c.png) `[d](e)` [f](https://g) [h](#i)"
    assert package.absolute(text, "me/it", "v1") == (
        "[a](https://github.com/me/it/blob/v1/docs/a.md#b) "
        "![c](https://raw.githubusercontent.com/me/it/v1/docs/c.png) "
        "`[d](e)` [f](https://g) [h](#i)"
    )


def test_workflows_and_templates_are_yaml_and_run_what_there_is():
    for path in sorted((ROOT / ".github").rglob("*.yml")):
        read = yaml.safe_load(path.read_text())
        for job in read.get("jobs", {}).values():
            if "uses" in job:
                assert (ROOT / job["uses"]).is_file()
            else:
                assert job["runs-on"]
                assert job["steps"]
    release = (ROOT / ".github/workflows/release.yml").read_text()
    assert "id-token: write" in release
    made = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        assert set(re.findall(r"run: make ([a-z-]+)", path.read_text())) <= set(made)

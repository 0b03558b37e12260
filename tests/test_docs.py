"""README and docs/: links go somewhere, command lines are understood, nothing is said twice."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import deit_jax
from deit_jax import analysis, tape
from deit_jax.cli import COMMANDS
from deit_jax.config.files import config_of
from deit_jax.config.serialize import default_fields, flatten

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs/site"))
try:
    import fields
    import links
    import notebooks
    import reference
finally:
    sys.path.pop(0)

PAGES = [p for p in links.PAGES if p.endswith(".md")]
PAGES += sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^(`{3,})[^\n]*\n(.*?)^\1", re.DOTALL | re.MULTILINE)

PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def text_of(page):
    return (ROOT / page).read_text()


def slugs(text):
    """Return the anchors that GitHub makes of a page's headings, and those written there."""
    found, seen = set(re.findall(r'<a id="([^"]+)"', text)), Counter()
    for title in re.findall(r"^#{1,6} +(.*)$", FENCE.sub("", text), re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_go_somewhere(page):
    for target in links.targets(text_of(page)):
        if links.is_outside(target):
            continue
        file, anchor = links.file_of(target, page)
        assert (ROOT / file).exists(), f"{page}: {target}"
        if anchor:
            assert anchor in slugs(text_of(file)), f"{page}: {target}: no such heading"


def test_readme_leads_to_every_page_and_the_code_names_pages_that_there_are():
    linked = {
        links.file_of(target, "README.md")[0] for target in links.targets(text_of("README.md"))
    }
    assert {page for page in PAGES if page.startswith("docs/")} <= linked
    for folder in ("deit_jax", "configs", "benchmarks", "launch"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".sh", ".yaml"):
                for page in re.findall(r"\bdocs/\w+\.md\b", path.read_text()):
                    assert (ROOT / page).exists(), f"{path}: {page}"


def test_slugs_are_those_of_github():
    text = (
        "# A `b.c`, and *d*: e_f\n## A\n## A\n```\n# none\n```\n### 1. [x](y) — z\n<a id='q'></a>"
    )
    assert slugs(text) == {"a-bc-and-d-e_f", "a", "a-1", "1-x--z"}


def test_links_of_code_are_none_and_those_of_the_site_go_where_the_files_lie():
    text = "`[a](b)` [c `d`](../configs/base.py) ![e](figures/f.svg)\n```\n[g](h)\n```\n[i](#j)"
    assert links.targets(text) == ["../configs/base.py", "figures/f.svg", "#j"]
    changed = links.to_site(text, "docs/data.md")
    assert "(config.md)" in changed
    assert "(figures/f.svg)" in changed
    assert "`[a](b)`" in changed
    assert links.to_site("[x](docs/data.md#y)", "README.md") == "[x](data.md#y)"
    assert links.to_site("[x](../launch/local.sh)", "docs/pods.md") == (
        "[x](files/launch/local.sh.md)"
    )
    assert links.apart("a\n- b\n- c\n\n| d |\n|---|\n") == "a\n\n- b\n- c\n\n| d |\n|---|\n"


def test_every_field_and_every_command_is_on_its_page():
    config = reference.config_page()
    shown = set(re.findall(r'<a id="([^"]+)"', config))
    assert shown == {name for name in default_fields() if not name.startswith("teacher.model.")}
    assert "](#model)" in config
    for field in fields.read()[0]:
        assert field.comment, f"configs/base.py: {field.name} has no comment"
    commands = reference.commands_page({})
    for name in COMMANDS:
        assert f"\n## deit {name}\n" in commands
        assert f"usage: deit {name}" in commands
    api = reference.api_page()
    assert "::: deit_jax.weights.load.load\n" in api
    assert "::: deit_jax.tape.Writer\n" in api


def test_a_field_is_read_with_its_comment_default_and_choices(tmp_path):
    (tmp_path / "base.py").write_text(
        "def get_config():\n    c.optim = ConfigDict()  # what\n    # Above\n    # it.\n"
        "    c.optim.lr = (\n        1e-3\n    )  # behind\n\n    # Heading:\n    c.seed = 0\n"
    )
    found, groups = fields.read(tmp_path / "base.py")
    assert groups == {"optim": "what"}
    assert [(f.name, f.comment) for f in found] == [("optim.lr", "Above it. behind"), ("seed", "")]
    values = {f.name: (f.default, f.values) for f in fields.read()[0]}
    assert values["optim.tune"] == ("'all'", "all, linear_probe, attention_only")
    assert values["optim.b1"] == ("0.9", "0 … below 1")
    assert values["model.image_size"] == ("None", "1 … 16384, or (height, width), or None")
    assert values["augment.crop_ratio"][1] == "2 numbers, each 0.001 … 1000"


def test_a_notebook_is_a_page_of_its_text_programs_and_outputs():
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text"]},
        {
            "cell_type": "code",
            "source": "print(1)",
            "outputs": [
                {"output_type": "stream", "text": ["1\n"]},
                {"output_type": "display_data", "data": {"image/png": "QUJD\n"}},
                {"output_type": "execute_result", "data": {"text/plain": ["2"]}},
            ],
        },
        {"cell_type": "code", "source": "", "outputs": []},
    ]
    page = notebooks.page(json.dumps({"cells": cells}))
    assert notebooks.headed(page, "x.ipynb").startswith(
        "# Title\n\n*This page is a [notebook](x.ipynb): run it yourself.*\nText\n"
    )
    assert "````python\nprint(1)\n````\n\n````text\n1\n````\n" in page
    assert "](data:image/png;base64,QUJD)" in page
    assert page.endswith("````text\n2\n````\n")


def command_lines(page):
    """Return the `deit …` lines of a page's code blocks, joined where they are continued."""
    for _, block in FENCE.findall(text_of(page)):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*deit (?!train: )(\S.*)", line.strip())
            if match and match[1][0].islower():
                yield match[1]


LINES = [(page, line) for page in PAGES for line in dict.fromkeys(command_lines(page))]


@pytest.fixture(scope="module")
def known():
    """Return the flags of every command."""
    helps = {name: reference.help_of(name) for name in COMMANDS}
    return {
        name: {f for no, f in re.findall(r"^  --(\[no\])?(\w+):", text, re.MULTILINE)}
        | {f"no{f}" for no, f in re.findall(r"^  --(\[no\])(\w+):", text, re.MULTILINE)}
        for name, text in helps.items()
    }


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{p}: {w[:60]}" for p, w in LINES])
def test_command_lines_are_understood(page, line, known):
    words = shlex.split(line.replace("…", "etc"), comments=True)
    words = words[: next((i for i, w in enumerate(words) if w in ("|", ">", "&&", "&")), None)]
    command, config = words[0], default_fields()
    assert command in COMMANDS
    for word in words[1:]:
        if match := re.match(r"--config=(configs/.*)", word):
            config = flatten(config_of(match[1]))
        if not word.startswith("--"):
            continue
        flag = word[2:].partition("=")[0]
        if flag.startswith("config."):
            assert flag.removeprefix("config.") in config, f"{page}: {word}"
        else:
            assert flag.replace("-", "_") in known[command] | {"help"}, f"{page}: {word}"


def test_command_lines_are_found():
    assert len(LINES) > 50


def test_programs_ask_for_names_that_there_are():
    found = 0
    for page in PAGES:
        for program in PYTHON.findall(text_of(page)):
            ast.parse(program)
            for owner, name in re.findall(r"\b(deit_jax|analysis|tape)\.(\w+)", program):
                module = {"deit_jax": deit_jax, "analysis": analysis, "tape": tape}[owner]
                rooms = {"analysis", "tape", "configs"} if owner == "deit_jax" else set()
                assert name in {*module.__all__, *rooms}, f"{page}: {owner}.{name}"
                found += 1
    assert found > 10


RUN = 20  # words in a row that are no accident


def test_nothing_stands_in_two_places():
    seen = {}
    for page in PAGES:
        if page == "CHANGELOG.md":  # which says in short what the pages say
            continue
        for paragraph in re.split(r"\n\s*\n", FENCE.sub("", text_of(page))):
            words = re.findall(r"\w+", paragraph)
            for i in range(len(words) - RUN + 1):
                run = tuple(words[i : i + RUN])
                other = seen.setdefault(run, page)
                assert other == page, f"{page} and {other}: {' '.join(run)}"


def test_readme_is_a_front_door():
    text = text_of("README.md")
    assert len(text.splitlines()) <= 120
    assert "make quickstart\nmake test\n" in text


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_the_network_for_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}/site"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},  # as in the Makefile
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {p.relative_to(tmp_path / "site").as_posix() for p in tmp_path.rglob("*.html")}
    assert {"index.html", "config.html", "commands.html", "api.html", "results.html"} <= pages
    for page in pages:
        text = (tmp_path / "site" / page).read_text()
        asked = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(https?:[^"]+)', text)
        assert not [url for url in asked if 'rel="canonical"' not in url], f"{page}: {asked}"
    api = (tmp_path / "site/api.html").read_text()
    assert "Return (model, params)" in api
    assert "Attention rollout" in api

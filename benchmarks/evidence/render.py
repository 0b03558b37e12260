"""Write what the study measured into the docs: tables, figures, and what is owed.

    python benchmarks/evidence/render.py --scale=cpu

Replaces what stands between `<!-- evidence -->` and `<!-- /evidence -->` in docs/results.md, the
same of `measured` in README.md, and the pictures in docs/figures/.
"""

import argparse
import textwrap
from pathlib import Path

import figures
from found import RESULTS, ROOT, Found
from scales import SCALES
from short import short
from tables import SECTIONS


def section(table: str, title: str, draw, scale: str) -> str:
    """Return one table with its expectation, its reading and its command."""
    found = Found(table, scale)
    if not found.all:
        return f"### {title}\n\nOwed: `python benchmarks/evidence/{table}.py` has not been run.\n"
    reading = RESULTS / f"{table}-{scale}.md"
    said = reading.read_text().strip() if reading.exists() else "(Not read yet.)"
    paragraphs = found.all["expectation"].split("\n\n")
    expected = "\n\n".join(textwrap.fill(" ".join(p.split()), 118) for p in paragraphs)
    picture = figures.NAMES.get(table)
    command, length = f"{table}.py --scale={scale}", found.all["scale"]["epochs"]
    command += f" --epochs={length:g}" if length != SCALES[scale].epochs else ""
    parts = [
        f"### {title}",
        f"*Expected.* {expected}",
        draw(found),
        *([f"![{title}](figures/{picture})"] if picture else []),
        f"*Found.* {said}",
        f"`python benchmarks/evidence/{command}`; {found.conditions()}.",
    ]
    return "\n\n".join(parts) + "\n"


def put(path: Path, mark: str, text: str) -> None:
    """Replace what stands between a mark and its end."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    whole = path.read_text()
    before, _, rest = whole.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path}: no {begin.strip()} … {end}")
    path.write_text(f"{before}{begin}{text.strip()}\n{end}{after}")


def main() -> None:
    """Write docs/results.md and docs/figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="cpu")
    scale = parser.parse_args().scale
    figures.draw({name: Found(name, scale) for name, _, _ in SECTIONS}, ROOT / "docs" / "figures")
    text = "\n".join(section(*which, scale) for which in SECTIONS)
    put(ROOT / "docs" / "results.md", "evidence", text)
    put(ROOT / "README.md", "measured", short(scale))


if __name__ == "__main__":
    main()

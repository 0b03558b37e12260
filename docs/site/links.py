"""Links of the pages: the same files are read on GitHub and as a site."""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# Pages of the site that lie outside docs/, and what stands there for a file that is no page.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "configs/base.py": "config.md",
}
FILES = "files"  # below it lie other files of the repository that a page names
_CODE = re.compile(r"(^(`{3,}).*?^\2[^\n]*$|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(\]\(|\b(?:href|src|srcset)=\")([^)\s\"]+)")


def prose(markdown: str) -> list[str]:
    """Return the parts of a page, code at the odd places."""
    parts, end = [], 0
    for match in _CODE.finditer(markdown):
        parts += [markdown[end : match.start()], match[0]]
        end = match.end()
    return [*parts, markdown[end:]]


def replace(markdown: str, change: Callable[[str], str]) -> str:
    """Return a page with the targets of its links and pictures changed."""
    parts = prose(markdown)
    parts[::2] = [_LINK.sub(lambda m: m[1] + change(m[2]), part) for part in parts[::2]]
    return "".join(parts)


def targets(markdown: str) -> list[str]:
    """Return where the links and pictures of a page go."""
    found: list[str] = []
    replace(markdown, lambda target: found.append(target) or target)
    return found


def is_outside(target: str) -> bool:
    """Return whether a link goes to the network."""
    return bool(re.match(r"[a-z]+:", target))


def file_of(target: str, source: str) -> tuple[str, str]:
    """Return the file in the repository that a link of the file `source` means, and the anchor."""
    path, _, anchor = target.partition("#")
    inside = posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) if path else source
    return inside, anchor


def place(file: str) -> str:
    """Return where a file of the repository lies in the site's sources."""
    if file in PAGES:
        return PAGES[file]
    if file.startswith("docs/"):
        return file.removeprefix("docs/").replace(".ipynb", ".md")
    plain = file.endswith((".json", ".png", ".svg"))
    return f"{FILES}/{file}" + ("" if plain or file.endswith(".md") else ".md")


def source_of(place: str) -> str:
    """Return the file of the repository that a page of the site was made of."""
    for file, page in PAGES.items():
        if page == place:
            return file
    if place.startswith(f"{FILES}/"):
        return place.removeprefix(f"{FILES}/")
    notebook = f"docs/{place.removesuffix('.md')}.ipynb"
    return notebook if (ROOT / notebook).exists() else f"docs/{place}"


def to_site(markdown: str, source: str) -> str:
    """Return a page with its links as the site has them."""
    here = posixpath.dirname(place(source)) or "."

    def change(target: str) -> str:
        if is_outside(target) or target.startswith("#"):
            return target
        file, anchor = file_of(target, source)
        return posixpath.relpath(place(file), here) + (f"#{anchor}" if anchor else "")

    return replace(markdown, change)


def apart(markdown: str) -> str:
    """Return a page with an empty line before lists and tables, which GitHub does not ask for."""
    lines, before, fenced = [], "", False
    for line in markdown.splitlines():
        fenced ^= line.startswith("```")
        starts = next((sign for sign in ("- ", "| ") if line.startswith(sign)), "")
        goes_on = before.startswith((starts.strip(), "  ")) or not before.strip()
        if starts and not fenced and not goes_on:
            lines.append("")
        lines.append(line)
        before = line
    return "\n".join(lines) + "\n"

"""Write into README.md and setup.cfg where the repository lies, before a package is built.

    python .github/package.py OWNER/NAME TAG
    python .github/package.py --notes VERSION      # the changelog's part of a version

Relative links are of no use on PyPI: they become those of the repository at that tag, and the
metadata gets its addresses. The release workflow runs this in its own checkout; where a package
comes from is not written in the repository, which may be a fork.
"""

import configparser
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs/site"))

import links  # noqa: E402

PICTURES = (".png", ".svg", ".jpg")


def absolute(markdown: str, repository: str, tag: str) -> str:
    """Return a page of the top folder with links that hold anywhere."""

    def change(target: str) -> str:
        if links.is_outside(target) or target.startswith("#"):
            return target
        if target.endswith(PICTURES):
            return f"https://raw.githubusercontent.com/{repository}/{tag}/{target}"
        return f"https://github.com/{repository}/blob/{tag}/{target}"

    return links.replace(markdown, change)


def addresses(repository: str) -> dict[str, str]:
    """Return the metadata's addresses, by the names that PyPI knows."""
    home = f"https://github.com/{repository}"
    owner, _, name = repository.partition("/")
    return {
        "Homepage": home,
        "Documentation": f"https://{owner.lower()}.github.io/{name}/",
        "Changelog": f"{home}/blob/main/CHANGELOG.md",
        "Issues": f"{home}/issues",
    }


def notes(changelog: str, version: str) -> str:
    """Return what the changelog says of a version; end if it has none."""
    _, found, rest = changelog.partition(f"\n## [{version}]")
    if not found:
        raise SystemExit(f"{version}: CHANGELOG.md has no such version")
    return rest.partition("\n")[2].partition("\n## [")[0].strip() + "\n"


def main() -> None:
    """Change both files, or print what is new."""
    repository, tag = sys.argv[1:]
    if repository == "--notes":
        print(notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), tag))
        return
    readme, setup = ROOT / "README.md", ROOT / "setup.cfg"
    readme.write_text(absolute(readme.read_text(), repository, tag), encoding="utf-8")
    lines = [f"    {name} = {url}" for name, url in addresses(repository).items()]
    text = setup.read_text()
    parser = configparser.ConfigParser()
    parser.read_string(text)
    if parser.has_option("metadata", "project_urls"):
        raise SystemExit("setup.cfg has project_urls already")
    whole = "\n".join(["[metadata]", "project_urls =", *lines])
    setup.write_text(text.replace("[metadata]", whole, 1), encoding="utf-8")


if __name__ == "__main__":
    main()

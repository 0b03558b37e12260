"""What mkdocs does besides: pages made of the code, and the repository's own files as pages."""

import os
import re

import links
import notebooks
import reference
from mkdocs.structure.files import File, Files

_DOCS = links.ROOT / "docs"
_NO_GUIDES = {
    *links.PAGES.values(),
    *("design.md", "results.md", "reliability.md", "faq.md"),
}


def on_config(config):
    """Link the repository where it is known, as in GitHub's workflows; no page asks for stars."""
    repository = os.environ.get("GITHUB_REPOSITORY")
    if repository:
        server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
        icon = {"icon": "fontawesome/brands/github", "link": f"{server}/{repository}"}
        config.extra["social"] = [icon]
    return config


def on_files(files: Files, *, config) -> Files:
    """Add the pages that are not in docs/, and the files that pages name."""
    texts = {page: (links.ROOT / file).read_text() for file, page in links.PAGES.items()}
    texts |= {f.src_uri: (_DOCS / f.src_uri).read_text() for f in files.documentation_pages()}
    for file in files.media_files():
        if file.src_uri.endswith(".ipynb"):
            text = notebooks.page((_DOCS / file.src_uri).read_text())
            texts[links.place(f"docs/{file.src_uri}")] = text
    made = {"config.md": reference.config_page(), "api.md": reference.api_page()}
    guides = {uri: text for uri, text in texts.items() if uri not in _NO_GUIDES}
    made["commands.md"] = reference.commands_page(guides)
    pages = {**texts, **made}
    for uri in pages.keys() - {f.src_uri for f in files}:
        files.append(File.generated(config, uri, content=pages[uri]))
    _add_files(pages, files, config)
    return files


def _add_files(pages: dict[str, str], files: Files, config) -> None:
    """Add the files outside docs/ that pages link to, and those that these link to."""
    ahead = [links.source_of(uri) for uri in pages]
    seen = {"configs/base.py"}  # of which there is a page of fields, and the file itself
    files.append(_page_of("configs/base.py", f"{links.FILES}/configs/base.py.md", config))
    while ahead:
        source = ahead.pop()
        text = pages.get(links.place(source)) or (links.ROOT / source).read_text()
        for target in links.targets(text) if source.endswith((".md", ".ipynb")) else []:
            if links.is_outside(target):
                continue
            file, _ = links.file_of(target, source)
            if file.startswith("docs/") or file in links.PAGES or file in seen:
                continue
            if not (links.ROOT / file).is_file():
                raise SystemExit(f"{source}: {target}: no such file")
            seen.add(file)
            ahead.append(file)
            files.append(_page_of(file, links.place(file), config))


def _page_of(file: str, place: str, config) -> File:
    if place.endswith(".md"):
        return File.generated(config, place, content=reference.file_page(file))
    return File.generated(config, place, abs_src_path=str(links.ROOT / file))


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """Turn links as they are in the repository to what they are on the site."""
    source = links.source_of(page.file.src_uri)
    made = page.file.src_uri in ("config.md", "commands.md", "api.md")
    if made or not source.endswith((".md", ".ipynb")):
        return markdown
    text = links.apart(links.to_site(markdown, source))
    return notebooks.headed(text, source.rpartition("/")[2]) if ".ipynb" in source else text


def on_page_content(html: str, *, page, config, files) -> str:
    """Let wide tables scroll by themselves, with the keyboard too."""
    return re.sub(r"<table>", '<table tabindex="0">', html)

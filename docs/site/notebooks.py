"""Notebooks as pages: their text, their programs, and what these printed and drew."""

import json


def page(text: str) -> str:
    """Return the Markdown of a notebook's JSON."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"]).rstrip()
        if cell["cell_type"] == "markdown":
            parts.append(f"{source}\n")
        elif cell["cell_type"] == "code" and source:
            parts.append(_block("python", source))
            parts += [shown for output in cell["outputs"] if (shown := _shown(output))]
    return "\n".join(parts)


def headed(markdown: str, name: str) -> str:
    """Return such a page with a line below its title that leads to the notebook itself."""
    title, _, rest = markdown.partition("\n")
    return f"{title}\n\n*This page is a [notebook]({name}): run it yourself.*\n{rest}"


def _block(language: str, text: str) -> str:
    return f"````{language}\n{text}\n````\n"


def _shown(output: dict) -> str:
    """Return what a cell printed or drew, "" of what has no form here."""
    if output["output_type"] == "stream":
        return _block("text", "".join(output["text"]).rstrip())
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f"![what the program drew](data:image/png;base64,{picture})\n"
    if "text/plain" in data:
        return _block("text", "".join(data["text/plain"]).rstrip())
    return ""

"""The notebook, executed at toy size: what its cells print is right."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
QUICK = "--xla_backend_optimization_level=0"  # to compile
NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"


def cells():
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_it_lies_here_without_outputs():
    """Outputs would be of one machine, and megabytes."""
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    (parameters,) = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    assert "EPOCHS = 50.0" in "".join(parameters["source"])


def test_its_links_lead_somewhere():
    text = "".join("".join(c["source"]) for c in cells() if c["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) > 4
    for link in links:
        assert (NOTEBOOK.parent / link).exists(), link


def printed(cell):
    return "".join(o.get("text", "") for o in cell["outputs"] if o["output_type"] == "stream")


def pictures(cell):
    return [o for o in cell["outputs"] if "image/png" in o.get("data", {})]


@pytest.mark.slow
def test_it_runs_from_beginning_to_end(tmp_path):
    """One epoch of teacher and student, in a kernel of its own, in an empty folder."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "\nEPOCHS = TEACHER_EPOCHS = 1.0"
    # The kernel is this Python, on one device, and finds this checkout.
    known = {**os.environ, "XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT)}
    kernels = tmp_path / "kernels" / "here"
    kernels.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    described = {"argv": command, "display_name": "here", "language": "python", "env": known}
    (kernels / "kernel.json").write_text(json.dumps(described))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(tmp_path))
        here = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="here", resources=here).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    results = json.loads((tmp_path / "runs" / "quickstart" / "results.json").read_text())
    whole = "\n".join(map(printed, code))
    assert f"class head         {results['cls']['top1']:6.2f} %" in whole
    assert f"teacher            {results['teacher']['top1']:6.2f} %" in whole
    cosines = re.search(r"after each block: +\[([^\]]+)\]", whole)[1]
    assert len(np.array(cosines.split(), float)) == 5  # before the first of four, and after each
    # What the model says of all held-out images here is what the training says of it.
    rows = re.findall(r"^(class head|distillation head) +([\d.]+) %  +([\d.]+) %", whole, re.M)
    apart = int(re.search(r"the heads differ on (\d+) of 359", whole)[1])
    assert rows[-2][1] == "0.00"
    assert float(rows[-2][2]) == pytest.approx(100 * apart / 359, abs=0.006)
    assert float(re.search(r"difference of a logit: (\S+)", whole)[1]) < 1e-4
    assert (tmp_path / "runs" / "quickstart" / "student.safetensors").exists()
    drawn = [len(pictures(cell)) for cell in code]
    assert sum(drawn) == 2 + (apart > 0)

"""The files of a hub repository: weights, their config, a card, and what goes with a run."""

import dataclasses
import logging
from pathlib import Path, PurePath
from typing import Any

from deit_jax.errors import UserError
from deit_jax.share.card import card
from deit_jax.share.facts import Facts, facts_of, places_of, without_places
from deit_jax.storage import backend, exists, read_text, to_path, write_json, write_text
from deit_jax.weights.exporters import EXPORTERS
from deit_jax.weights.fit import LoadedWeights
from deit_jax.weights.load import open_model
from deit_jax.workdir.which import LATEST

log = logging.getLogger("deit_jax")

REPORT, ONNX, CONFIG, RESULTS = "report.html", "model.onnx", "train_config.json", "results.json"
LARGE = ("*.safetensors", "*.onnx", "*.onnx.data")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a repository shall hold besides the weights and their card."""

    repository: str
    onnx: bool = False
    report: bool = True
    licence: str = ""
    checkpoint: str | int = LATEST
    ema: bool = False
    model: str | None = None


def write_folder(source: str, folder: Path, wanted: Wanted) -> list[str]:
    """Write the files of a repository into a folder that is empty; return their names.

    Raise UserError where timm, whose format it is, has no such model.
    """
    opened = open_model(source, wanted.model, checkpoint=wanted.checkpoint, ema=wanted.ema)
    if not opened.classes:
        raise UserError(f"{source}: has no head, so it knows no classes; there is nothing to share")
    opened.check_convention()
    opened.tell()
    backend(folder).make_folder(folder)
    try:
        EXPORTERS["timm_folder"].write(opened, folder)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    figures = None
    if opened.run is not None and wanted.report:
        figures = _write_report(to_path(source), folder, wanted, opened)
    facts = facts_of(opened, source, wanted.ema, figures)
    if wanted.onnx:
        _write_onnx(opened, folder)
    if facts.config is not None:
        _write_records(to_path(source), folder, facts)
    report = exists(folder / REPORT)
    text = card(facts, wanted.repository, wanted.onnx, report, wanted.licence)
    write_text(folder / "README.md", text)
    lines = (f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE)
    write_text(folder / ".gitattributes", "".join(lines))
    return sorted(name for name, _ in backend(folder).files(folder))


def _write_report(
    workdir: PurePath, folder: Path, wanted: Wanted, opened: LoadedWeights
) -> dict[str, Any]:
    """Write report.html of the very weights that are shared; return its figures of them."""
    from deit_jax.analysis.choices import IMAGES
    from deit_jax.analysis.figures import analyze
    from deit_jax.analysis.report.page import page

    found = analyze([workdir], IMAGES, wanted.checkpoint, wanted.ema)
    figures = found.figures["runs"][0]
    for note in figures["notes"].values():
        log.warning("report: %s", note)
    found.figures = without_places(found.figures, places_of(workdir, figures["config"]))
    write_text(folder / REPORT, page(found))
    if found.pictures[0]:
        log.warning(
            "%s holds %d images of the evaluation data; may they be published? --noreport leaves "
            "it out",
            REPORT,
            len(found.pictures[0]),
        )
    return figures


def _write_onnx(opened: LoadedWeights, folder: Path) -> None:
    from deit_jax.export.choices import Options
    from deit_jax.export.write import export

    export(opened, folder / ONNX, "onnx", Options(preprocess=True))


def _write_records(workdir: PurePath, folder: Path, facts: Facts) -> None:
    write_json(folder / CONFIG, facts.config)
    if exists(workdir / RESULTS):
        write_text(folder / RESULTS, read_text(workdir / RESULTS))

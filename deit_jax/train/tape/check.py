"""Whether a label tape says what a live teacher says: a few of its steps, compared."""

from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from deit_jax.config import files
from deit_jax.config.serialize import BEFORE
from deit_jax.errors import UserError
from deit_jax.step.distill.soft import LOWEST
from deit_jax.storage import to_path
from deit_jax.train.experiment import prepare
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.tape import LEAST, SAMPLES
from deit_jax.train.tape.fingerprint import (
    check_fingerprint,
    differences,
    fingerprint,
    listed,
    outsider,
)
from deit_jax.train.tape.labeller import Labeller, progress
from deit_jax.train.tape.layout import form_of, unpack
from deit_jax.train.tape.tape import Tape

# Log-probabilities that are the same but for the tape's half precision and a compute dtype's.
CLOSE, CLOSE_RELATIVE = 0.05, 0.01
TINY = 1e-30


def check(
    path: str | PurePath,
    config: ConfigDict | str | PurePath,
    samples: int = SAMPLES,
    least: float = LEAST,
) -> dict[str, Any]:
    """Compare up to so many steps of a tape, spread evenly, with the teacher of a config.

    The config is a ConfigDict, or FILE[:ARGS] as --config has it. Return {"path", "kind", "steps",
    "compared": the steps, "agreement": percent, "largest_difference", "passed", "reason"}.

    Agreement is the share of equal labels; of several labels an image, of the classes that either
    says, the share that both say; in soft distillation the share of kept log-probabilities that
    differ by at most 0.05 + 1 %, of features the share that differ by at most 0.05 of the largest
    of their image, and "largest_difference" the largest difference of them (None for the others).
    "reason" says in one line why it is not passed: another teacher's fingerprint, or an agreement
    below `least`.

    Raise UserError for a tape of other views, without a step, or of a kind that is not known here.
    """
    if samples < 1:
        raise UserError(f"samples={samples}: at least one step must be compared")
    path = to_path(path)
    tape = Tape.open(path)
    there = np.flatnonzero(tape.recorded >= 0)
    if not len(there):
        raise UserError(f"{path}: no step is recorded; there is nothing to compare")
    experiment, dataset = prepare(_recording(files.config_of(config), tape))
    spec = experiment.teacher
    assert spec is not None  # validate has refused a tape without a teacher
    check_fingerprint(path, tape.fingerprint, fingerprint(experiment, dataset, None))
    teacher = load_teacher(spec, spec.weights, dataset.classes)
    another = _another_teacher(tape.fingerprint, fingerprint(experiment, dataset, teacher))
    steps = there[np.unique(np.linspace(0, len(there) - 1, samples).round().astype(int))]
    same, of, largest = _compare(tape, Labeller(experiment, dataset, teacher), steps)
    agreement = 100.0 * same / of if of else 100.0
    reason = f"of another teacher ({another})" if another else ""
    if not reason and agreement < least:
        reason = f"{agreement:.2f} % of its answers are the teacher's, below {least:g} %"
    return {
        "path": str(path),
        "kind": tape.layout.kind,
        "steps": len(tape),
        "compared": steps.tolist(),
        "agreement": agreement,
        "largest_difference": largest,
        "passed": not reason,
        "reason": reason,
    }


def _recording(given: ConfigDict, tape: Tape) -> ConfigDict:
    """Return the config of who would record this tape, by the tape's rules."""
    config = given.copy_and_resolve_references()
    if config.distill.kind == "none" or not config.teacher.weights:
        raise UserError(
            f"{tape.path}: nothing says which teacher the label tape is compared with; take the "
            "config of its students, with distill.kind, and give config.teacher.weights"
        )
    config.teacher.tape, config.teacher.tape_path = "record", str(tape.path)
    config.init.required, config.optim.may_rise = False, True  # which are a training's matter
    if config.data.rules is None:
        config.data.rules = tape.fingerprint.get("data.rules", BEFORE["data.rules"])
    return config


def _another_teacher(tapes: dict[str, Any], own: dict[str, Any]) -> str:
    """Return in what a tape's teacher is another one; "" where none is known to differ.

    Of another program's, only answers can be compared.
    """
    if outsider(tapes):
        return ""
    return listed({k: v for k, v in differences(tapes, own).items() if k.startswith("teacher.")})


def _compare(tape: Tape, live: Labeller, steps: np.ndarray) -> tuple[int, int, float | None]:
    """Return how many answers are the same, of how many, and soft ones' largest difference."""
    same = of = 0
    largest = None
    with progress(len(steps)) as bar:
        for step in steps:
            parts = tape.parts(int(step))
            target = live.target(int(step), int(tape.recorded[step]))
            more, count, apart = compare(parts, target, tape)
            same, of = same + more, of + count
            largest = apart if largest is None or apart is None else max(largest, apart)
            bar.update()
    return same, of, largest


def compare(parts: dict[str, np.ndarray], target: Any, tape: Tape) -> tuple[int, int, float | None]:
    """Return how many of a step's answers are those of a live target, and so on; see _compare."""
    layout = tape.layout
    if "indices" in parts:
        apart = differ(parts, np.asarray(target, np.float32))
        close = apart <= CLOSE + CLOSE_RELATIVE * np.abs(parts["logits"].astype(np.float32))
        return int(np.sum(close)), close.size, float(np.max(apart))
    if "features" in parts:
        return _with_features(parts, target, tape)
    said = unpack(parts, layout)
    if not form_of(layout).exact or not isinstance(said, np.ndarray):
        raise UserError(
            f"{tape.path}: how answers of distill.kind={layout.kind} compare is not known here; "
            "deit tape check takes hard, soft and feature"
        )
    return _equal(said, np.asarray(target))


def _with_features(parts, target: Any, tape: Tape) -> tuple[int, int, float | None]:
    """Return the same of features, and of the answers beside them where there are any."""
    said = unpack(parts, tape.layout)
    live = target["feature"] if isinstance(target, dict) else target
    kept = said["feature"] if isinstance(said, dict) else said
    apart = np.abs(kept - np.asarray(live)) / np.maximum(parts["scales"], TINY)[:, None]
    same, of, largest = int(np.sum(apart <= CLOSE)), apart.size, float(np.max(apart))
    if not isinstance(said, dict):
        return same, of, largest
    if "indices" in parts:
        logs = differ(parts, np.asarray(target["teacher"], np.float32))
        close = logs <= CLOSE + CLOSE_RELATIVE * np.abs(parts["logits"].astype(np.float32))
        more = int(np.sum(close)), close.size, float(np.max(logs))
        return same + more[0], of + more[1], max(largest, more[2])
    equal, count, _ = _equal(said["teacher"], np.asarray(target["teacher"]))
    return same + equal, of + count, largest


def _equal(said: np.ndarray, live: np.ndarray) -> tuple[int, int, None]:
    if said.dtype == bool:
        return int(np.sum(said & live)), int(np.sum(said | live)), None
    return int(np.sum(said == live)), said.size, None


def differ(
    parts: dict[str, np.ndarray], logits: Float[Array | np.ndarray, "B K"]
) -> Float[np.ndarray, "B k"]:
    """Return how far the kept log-probabilities are from those of some logits."""
    logs = np.maximum(np.asarray(jax.nn.log_softmax(logits)), LOWEST)
    live = np.take_along_axis(logs, parts["indices"].astype(np.int64), axis=1)
    return np.abs(parts["logits"].astype(np.float32) - live)

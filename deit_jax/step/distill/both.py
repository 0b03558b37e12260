"""Two kinds at once: what a teacher decides, and its features."""

from typing import Any

from deit_jax.step.distill.base import Distillation, Layout, TapeForm
from deit_jax.step.distill.feature import FEATURE


def with_features(kind: Distillation) -> Distillation:
    """Return the kind that learns a teacher's answers as `kind` does, and its features besides."""
    return Distillation(
        target=lambda outputs: {
            "teacher": kind.target(outputs),
            "feature": FEATURE.target(outputs),
        },
        tape=_both_forms(kind.tape, FEATURE.tape) if kind.tape and FEATURE.tape else None,
        features=True,
        init=lambda key, student, target: FEATURE.init(key, student, target["feature"]),
        several=None if kind.several is None else with_features(kind.several),
        parts={"teacher": kind, "feature": FEATURE},
    )


def _both_forms(of_answers: TapeForm, of_features: TapeForm) -> TapeForm:
    """Return the form of a tape that holds the arrays of both."""

    def arrays(layout: Layout) -> dict[str, Any]:
        return of_answers.arrays(layout) | of_features.arrays(layout)

    def pack(target, layout: Layout) -> dict[str, Any]:
        answers = of_answers.pack(target["teacher"], layout)
        return answers | of_features.pack(target["feature"], layout)

    def unpack(parts, layout: Layout) -> dict[str, Any]:
        answers, features = of_answers.unpack(parts, layout), of_features.unpack(parts, layout)
        return {"teacher": answers, "feature": features}

    return TapeForm(False, arrays=arrays, pack=pack, unpack=unpack, keeps=of_answers.keeps)

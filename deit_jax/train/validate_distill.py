"""Checks of what is distilled, from whom, and how that changes over a run."""

from deit_jax.config.schema import RANGES
from deit_jax.data.sources.registry import has_labels
from deit_jax.errors import UserError
from deit_jax.models.vit import VisionTransformer
from deit_jax.step.objective import DISTILLATIONS
from deit_jax.step.schedules import Change, parse_schedule
from deit_jax.train.teacher_spec import UNSET, shares_of, sources_of


def check_distillation(distill, teacher, model, check) -> None:
    """Raise UserError for what contradicts itself or would be left unheard."""
    if distill.kind == "none":
        for name, unset in UNSET.items():
            check(
                distill[name] == unset,
                f"distill.{name}",
                "there is no distillation to use it; set config.distill.kind, or leave it out",
            )
    else:
        _check_features(distill, model, check)
        _check_schedule(distill, check)
    _check_several(teacher, distill.kind, check)
    if not has_labels(check["data.source"]):
        _check_unlabelled(check)


def _check_features(distill, model, check) -> None:
    kind = DISTILLATIONS[distill.kind]
    for name in ("feature_loss", "student_features"):
        check(
            kind.features or distill[name] == UNSET[name],
            f"distill.{name}",
            f"distill.kind={distill.kind} compares no features; leave it out",
        )
    check(
        bool(kind.parts) or distill.feature_weight == 1.0,
        "distill.feature_weight",
        f"is for features beside soft or hard; with distill.kind={distill.kind} the teacher's "
        "term has alpha, or distill.teacher_weight",
    )
    check(
        kind.classes or not check["model.dist_head"],
        "model.dist_head",
        f"distill.kind={distill.kind} compares the token itself, and nothing would train a head of "
        "it; leave it out",
    )
    check(
        isinstance(model, VisionTransformer) or distill.student_features == "token",
        "distill.student_features",
        "a convnet has no tokens; leave it out for the mean of its last layer",
    )


def _check_schedule(distill, check) -> None:
    try:
        changes = parse_schedule(distill.schedule)
    except ValueError as error:
        raise UserError(f"config.distill.schedule={distill.schedule}: {error}") from error
    for change in changes:
        allowed = RANGES[f"distill.{change.name}"]
        check(allowed.holds(change.end), "distill.schedule", f"the end of {change.name} {allowed}")
        check(not (why := _unused(distill, change)), "distill.schedule", f"{change.name} {why}")


def _unused(distill, change: Change) -> str:
    """Return why a change would have no effect, "" where it has one."""
    name, soft = change.name, distill.kind.startswith("soft")
    both = distill.label_weight is not None and distill.teacher_weight is not None
    if name == "tau" and not soft:
        return f"is for soft distillation, and distill.kind={distill.kind}; leave it out"
    if name == "alpha" and both:
        return "is not used where distill.label_weight and teacher_weight are given"
    if name == "feature_weight" and "+" not in distill.kind:
        return f"is for features beside soft or hard, and distill.kind={distill.kind}"
    if name in ("label_weight", "teacher_weight") and distill[name] is None:
        return f"has no beginning; give config.distill.{name}"
    return ""


def _check_several(teacher, kind: str, check) -> None:
    """Check what is said of several teachers."""
    several = len(sources_of(teacher.weights)) > 1
    shares_of(teacher)
    check(
        several or teacher.combine == "logits",
        "teacher.combine",
        "is for several teachers, with commas between them in config.teacher.weights",
    )
    if not several:
        return
    check(
        all(sources_of(teacher.weights)),
        "teacher.weights",
        "names nothing between two commas",
    )
    if kind == "none":
        return
    check(
        not DISTILLATIONS[kind].features,
        "teacher.weights",
        f"names several teachers, and distill.kind={kind} takes the features of one",
    )
    check(
        teacher.combine == "logits" or (kind == "hard" and not check["data.multi_label"]),
        "teacher.combine",
        "votes are for hard labels, one an image; take logits",
    )


def _check_unlabelled(check) -> None:
    """Check that nothing asks for the labels of images that have none."""
    check(
        check["distill.kind"] == "feature",
        "data.source",
        "has no labels; learn a teacher's features with config.distill.kind=feature",
    )
    check(
        bool(check["teacher.weights"]) or check["teacher.tape"] == "replay",
        "teacher.weights",
        "no teacher can be trained on images without labels; give one",
    )
    names = [change.name for change in parse_schedule(check["distill.schedule"])]
    check(
        "alpha" not in names,
        "distill.schedule",
        "alpha shares the loss with labels, and there are none; take teacher_weight",
    )
    check(
        check["distill.label_weight"] is None,
        "distill.label_weight",
        "there are no labels to weigh; leave it out",
    )
    check(
        check["train.patience_epochs"] == 0,
        "train.patience_epochs",
        "nothing is evaluated on images without labels; set it to 0",
    )
    check(check["data.balance"] == "none", "data.balance", "there are no classes; take none")
    check(
        not check["loss.class_weights"], "loss.class_weights", "there are no classes; leave it out"
    )

"""Image files in folders, one a class."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np

from deit_jax.data.classes import natural_key, read_classes
from deit_jax.data.sources import ground_truth, labels_file
from deit_jax.data.sources.assemble import assemble, rules_of
from deit_jax.data.sources.base import Dataset, SourceReading
from deit_jax.data.sources.files import FolderSource
from deit_jax.data.sources.scan import Folder, Scan, has_images, subfolders
from deit_jax.data.sources.splits import choose_split, kind_of, kinds_in, listed
from deit_jax.errors import UserError
from deit_jax.storage import local


def open_source(rest: str, data) -> Dataset:
    """Open the folder that `rest` names."""
    root = local(rest)
    if not root.is_dir():
        raise UserError(f"config.data.source=folder:{rest}: no such folder")
    if rules_of(data) == 1 and data.labels:
        raise UserError(
            f"config.data.labels={data.labels}: config.data.rules=1 knows class folders only; "
            "leave rules out"
        )
    if rules_of(data) == 1:
        from deit_jax.data.sources import folder_rules1

        return folder_rules1.open_folder(root, data)
    if data.labels:
        return labels_file.open_labelled(root, data)
    return open_folder(root, data)


def open_folder(root: Path, data) -> Dataset:
    """Open ROOT/{train,val}/CLASS/…, or hold out a part of ROOT/CLASS/…; raise UserError.

    `data` is a config.data: which split is which, what nested folders mean, a list of classes.
    """
    parts = _parts(root, data)
    given = read_classes(data.classes) if data.classes else None
    train = _read(parts.train, data, given)
    classes = given or sorted(set(train.classes), key=natural_key)
    _check_known(train, classes, f"config.data.classes={data.classes}")
    held, left_out = None, train.left_out
    if parts.eval and ground_truth.is_flat_imagenet(parts.eval, classes):
        held, others = ground_truth.open_flat(parts.eval, classes)
        left_out = left_out + Counter(others)
    elif parts.eval:
        found = _read(parts.eval, data, given)
        _check_known(found, classes, str(parts.train))
        held, left_out = found.source(classes), left_out + found.left_out
    reading = SourceReading(
        train=_named(parts.train, root),
        eval=_named(parts.eval, root) if parts.eval else "",
        left_out=dict(left_out),
        notes=(*parts.notes, *train.notes),
    )
    return assemble(train.source(classes), held, classes, data, reading, may_lack=bool(given))


def _named(path: Path, root: Path) -> str:
    return "all of it" if path == root else f"{path.relative_to(root)}/"


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The folders of the two parts; no `eval` where a part of `train` is to be held out."""

    train: Path
    eval: Path | None = None
    notes: tuple[str, ...] = ()


def _parts(root: Path, data) -> _Parts:
    """Find the folders to train and to evaluate on; raise UserError with those that are there."""
    if data.eval_split == ".":  # whatever is trained on: to evaluate a folder of images
        return _Parts(root, root)
    if data.train_split == ".":
        return _Parts(root)
    there = [name for name in subfolders(root) if has_images(root / name, data.channels)]
    if not there:
        raise UserError(f"{root}: no class folders with images; expected {root}/CLASS/IMAGE.jpg")
    named = _named_splits(there)
    train = choose_split(data.train_split, named)
    if train is None or not _are_splits(root, there, named, train, data):
        if len(named) == len(there) or data.train_split != "train":
            raise UserError(
                f"config.data.train_split={data.train_split}: {root} has no such folder; there "
                f"are {listed(there)} (`.` is the folder itself)"
            )
        also = f"{listed(named)} taken for classes, as {len(there) - len(named)} others are there"
        return _Parts(root, notes=(also,) if named else ())
    return _with_eval(root, train, there, named, data)


def _named_splits(there: list[str]) -> list[str]:
    """Return the names that are those of splits: all of them, also seg_train and seg_test."""
    named = [name for name in there if kind_of(name)]
    kinds = [kinds_in(name) for name in there]
    every = all(len(k) == 1 for k in kinds) and len({k for ks in kinds for k in ks}) > 1
    return there if every else named


def _are_splits(root: Path, there, named, train: str, data) -> bool:
    """Return whether `train` is a split and not a class, the train beside the plane and the car."""
    if train == data.train_split != "train":
        return True
    if len(named) == len(there) or not _has_classes(root / train, data.channels):
        return len(named) == len(there)
    if any(kind_of(name) not in (None, "train") for name in named):
        return True
    others = listed(sorted(set(there) - set(named)), 3)
    raise UserError(
        f"{root}: is {train}/ the images to train on, or a class beside {others}? move those "
        "elsewhere, or say that all are classes with --config.data.train_split=."
    )


def _with_eval(root: Path, train: str, there, named, data) -> _Parts:
    """Return the parts, with notes on the splits that are left aside."""
    flat = [n for n in there if not _has_classes(root / n, data.channels) and n != train]
    truth = [n for n in flat if ground_truth.has_imagenets_names(root / n)]
    usable = [n for n in (*named, data.eval_split) if n in there and (n not in flat or n in truth)]
    held = choose_split(data.eval_split, usable)
    if held is None and data.eval_split != "validation":
        why = "" if data.eval_split not in flat else ", and no class folders or labels in it"
        raise UserError(
            f"config.data.eval_split={data.eval_split}: {root} has no such split{why}; there are "
            f"{listed(usable)}"
        )
    notes = []
    for name in sorted(set(there) - {train, held}):
        why = "no class folders in it" if name in flat else "not asked for"
        notes.append(f"{name}/ is left aside ({why})")
    return _Parts(root / train, root / held if held else None, tuple(notes))


def _has_classes(root: Path, channels: int) -> bool:
    return any(has_images(root / name, channels) for name in subfolders(root))


@dataclasses.dataclass(frozen=True)
class _Found:
    """The images of one part: the folders that they lie in, and the class that each folder is."""

    root: Path
    folders: list[Folder]
    classes: list[str]  # of each folder
    left_out: Counter[str]
    notes: tuple[str, ...]

    def source(self, classes: list[str]) -> FolderSource:
        number = {name: i for i, name in enumerate(classes)}
        paths = [f"{self.root}/{f.path}/{name}" for f in self.folders for name in f.files]
        of_folder = [number[name] for name in self.classes]
        labels = np.repeat(of_folder, [len(f.files) for f in self.folders]).astype(np.int32)
        return FolderSource(self.root, paths, labels)


def _read(root: Path, data, given: list[str] | None) -> _Found:
    """Scan one part of the data."""
    scan = Scan(root, data.channels)
    met = list(scan.walk())
    if superfluous := scan.superfluous_links():
        met = [
            Folder(f.path, [n for n in f.files if f"{root}/{f.path}/{n}" not in superfluous])
            for f in met
        ]
    if met[0].files:
        scan.left_out["images beside the class folders"] += len(met[0].files)
    with_images = {f.path.partition("/")[0] for f in met if f.files}
    # A folder of a class that has no images yet; what lies deeper may be anything.
    folders = [f for f in met[1:] if f.files or ("/" not in f.path and f.path not in with_images)]
    if not with_images - {""}:
        raise UserError(
            f"{root}: no class folders with images; expected {root}/CLASS/IMAGE.jpg, or a table of "
            "labels with --config.data.labels=FILE"
        )
    classes, notes = _classes_of(root, [f.path for f in folders], data.nested, given)
    return _Found(root, folders, classes, scan.left_out, notes)


def _classes_of(root: Path, paths: list[str], nested: str, given) -> tuple[list[str], tuple]:
    """Return the class that each folder stands for; raise UserError where that is not clear.

    As in timm, a class is the name of the innermost folder. Where that would join folders of other
    parents, or a folder holds images and folders with images, a person has to say what is meant.
    """
    names = {
        "top": [p.partition("/")[0] for p in paths],
        "leaf": [p.rpartition("/")[2] for p in paths],
        "path": [p.replace("/", "_") for p in paths],
    }
    if names["top"] == names["path"] or nested != "auto":
        return names["leaf" if nested == "auto" else nested], ()
    if given is not None:  # which tells what is meant
        fits = [kind for kind in ("leaf", "top", "path") if set(names[kind]) <= set(given)]
        if fits:
            return names[fits[0]], ()
    joined = next((p for p, n in Counter(names["leaf"]).items() if n > 1), None)
    folders = set(paths)
    inner = next((p for p in paths if _parents(p) & folders), None)
    if joined is not None or inner is not None:
        where = next(p for p in paths if p == inner or p.endswith(f"/{joined}"))
        raise UserError(
            f"{root}/{where}: which of the nested folders is the class? say so with "
            f"--config.data.nested=top ({listed(sorted(set(names['top'])), 3)}), leaf "
            f"({listed(sorted(set(names['leaf'])), 3)}) or path "
            f"({listed(sorted(set(names['path'])), 3)})"
        )
    top = sorted(set(names["top"]), key=natural_key)
    note = f"classes are the innermost of nested folders; data.nested=top: {listed(top, 3)}"
    return names["leaf"], (note,)


def _parents(path: str) -> set[str]:
    parts = path.split("/")
    return {"/".join(parts[:n]) for n in range(1, len(parts))}


def _check_known(found: _Found, classes: list[str], where: str) -> None:
    """Raise UserError for folders whose class is none of `classes`."""
    known = set(classes)
    unknown = [(f, n) for f, n in zip(found.folders, found.classes, strict=True) if n not in known]
    if unknown:
        folder, _ = unknown[0]
        more = f" ({len(unknown)} such folders)" if len(unknown) > 1 else ""
        raise UserError(f"{found.root}/{folder.path}: no class of this name in {where}{more}")

"""The data card: what a data set holds, what is wrong with it, and what of it stands on both sides.

Facts that need no image are in `facts`; `survey` reads images, all or some; `twins` and
`near_twins` find those that are there twice, byte for byte or to the eye.
"""

import dataclasses
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from deit_jax.data import decode
from deit_jax.data.channels import MixedChannels, as_colours, is_array, is_stack
from deit_jax.data.decode import PLAIN, Reading
from deit_jax.data.loader import usable_cores
from deit_jax.data.sources.base import Dataset, Labelled, Source, key_of, label_counts
from deit_jax.errors import UserError

FEW = 10  # training images of a class: with fewer it will hardly be learnt
MANY = 20_000  # images; of more only some are read where nobody asks for all
SAMPLE = 1000  # of each part, then
TRIES = 4  # images that one is compared with
SHOWN = 12  # examples of each kind of fault
SMALL = 32  # pixels; images with a shorter side are compared by their bytes alone
NEAR = 7  # bits of 64 in which the hashes of two like images may differ
LIKE = 0.97  # correlation of two like images, in 32 x 32 grey pixels
FLAT = 8  # bits: a hash with fewer set, or fewer unset, is of an image without features


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one image shows when it is read.

    `content` and `look` are hashes, `look` 0 if it has none. `fault` is the line of an image that
    cannot be read, whose other fields are empty.
    """

    content: int
    look: int = 0
    size: tuple[int, int] = (0, 0)  # width, height
    mode: str = ""  # Pillow's: RGB, L, CMYK, I;16, …
    kind: str = ""  # the file's: JPEG, PNG, …; "array"
    fault: str = ""
    misfit: bool = False  # whether the fault is another number of channels


def make(dataset: Dataset, source: str, whole: bool, reading: Reading = PLAIN) -> dict[str, Any]:
    """Return the card of a data set, all of its images read if it is not large or `whole`."""
    card = facts(dataset, source, reading.channels)
    most = None if whole or len(dataset.train) + len(dataset.eval) <= MANY else SAMPLE
    train = survey(dataset.train, "reading training images", most, reading)
    held = survey(dataset.eval, "reading the others", most, reading)
    add_survey(card, dataset, train, held, reading)
    return card


def quick(dataset: Dataset, source: str, reading: Reading = PLAIN) -> dict[str, Any]:
    """Return a card for the start of a training: of images that are not too many, equal ones."""
    card = facts(dataset, source, reading.channels)
    if len(dataset.train) + len(dataset.eval) <= MANY:
        train = contents(dataset.train, "comparing training images")
        found = twins(train, contents(dataset.eval, "comparing the others"))
        # What is no image tells nothing: empty files are all the same.
        shown = {a: _seen(dataset.train, a, reading) for kind in found.values() for a, _ in kind}
        found = {k: [p for p in kind if not shown[p[0]].fault] for k, kind in found.items()}
        card["twins"] = _named(found, dataset)
    return card


def facts(dataset: Dataset, source: str, channels: int = 3) -> dict[str, Any]:
    """Return what is known of a data set without reading its images."""
    parts = {"train": dataset.train, "eval": dataset.eval}
    counts = {
        part: label_counts(examples.labels, len(dataset.classes)).tolist()
        for part, examples in parts.items()
        if isinstance(examples, Labelled)
    }
    several = {
        part: {
            "labels": int(examples.labels.sum(dtype=np.int64)),
            "without": int(np.sum(~examples.labels.any(1))),
        }
        for part, examples in parts.items()
        if isinstance(examples, Labelled) and examples.labels.ndim == 2
    }
    return {
        "source": source,
        "reading": dataclasses.asdict(dataset.reading),
        "images": {part: len(examples) for part, examples in parts.items()},
        "classes": dataset.classes,
        "channels": channels,
        "per_class": counts,  # {} where only reading all would tell
        **({"several_labels": several} if several else {}),
    }


def survey(
    source: Source, title: str, most: int | None = None, reading: Reading = PLAIN
) -> dict[int, Seen]:
    """Read a part of the data, or `most` of its images evenly spaced, on all cores; by number."""
    count = len(source)
    numbers = np.arange(count)
    if most is not None and most < count:
        numbers = np.unique(np.linspace(0, count - 1, most).astype(np.int64))

    def look(number: int) -> Seen:
        return _seen(source, int(number), reading)

    with ThreadPoolExecutor(usable_cores()) as pool:
        read = pool.map(look, numbers.tolist())
        bar = tqdm(read, total=len(numbers), unit="image", desc=title, leave=False, disable=None)
        return dict(zip(numbers.tolist(), bar, strict=True))


def _seen(source: Source, number: int, reading: Reading) -> Seen:
    try:
        image = source[number]["image"]
        if isinstance(image, np.ndarray):
            height, width = image.shape[:2]
            mode = "L" if image.ndim == 2 else f"{image.shape[2]} channels"
            small = _picture(image, source.describe(number), reading)
            return Seen(_digest(image.tobytes()), _look(small), (width, height), mode, "array")
        pixels = _picture(image, source.describe(number), reading)
        return Seen(_digest(image), _look(pixels), *_header(image, pixels, reading.channels))
    except UserError as error:
        return Seen(0, fault=str(error), misfit=isinstance(error, MixedChannels))
    except Exception as error:  # Pillow's readers raise almost anything
        return Seen(0, fault=f"{source.describe(number)}: not a readable image ({error})")


def _picture(image: bytes | np.ndarray, name: str, reading: Reading) -> Image.Image:
    """Return an example as people would look at it."""
    if reading.channels == 3:
        return decode.decode(image, name, reading)
    return Image.fromarray(as_colours(decode.pixels_of(image, name, reading)))


def _header(file: bytes, pixels: Image.Image, channels: int) -> tuple[tuple[int, int], str, str]:
    """Return what a file says of itself: its size, its mode and its kind."""
    if channels == 3 or not (is_array(file) or is_stack(file, channels)):
        try:
            with Image.open(io.BytesIO(file)) as header:
                return header.size, header.mode, header.format or ""
        except UnidentifiedImageError:  # though it was read: a TIFF of pixels unknown to Pillow
            return pixels.size, "floats", "TIFF"
    return pixels.size, f"{channels} channels", "NPY" if is_array(file) else "TIFF"


def contents(source: Source, title: str) -> dict[int, Seen]:
    """Return the hashes of the bytes of a part of the data, without decoding any."""

    def digest(number: int) -> Seen:
        try:
            image = source[number]["image"]
        except UserError as error:
            return Seen(0, fault=str(error))
        return Seen(_digest(image.tobytes() if isinstance(image, np.ndarray) else image))

    with ThreadPoolExecutor(usable_cores()) as pool:
        read = pool.map(digest, range(len(source)))
        bar = tqdm(read, total=len(source), unit="image", desc=title, leave=False, disable=None)
        return dict(enumerate(bar))


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _look(image: Image.Image) -> int:
    """Return 64 bits of which few change when an image is scaled or compressed anew; 0 without.

    Each says whether one of 9 x 8 grey pixels is lighter than the next in its row ("dHash").
    """
    if min(image.size) < SMALL:
        return 0
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    look = int.from_bytes(bits.tobytes(), "little")
    return look if FLAT <= look.bit_count() <= 64 - FLAT else 0


def twins(train: dict[int, Seen], held: dict[int, Seen]) -> dict[str, list[tuple[int, int]]]:
    """Return the pairs of images whose bytes are the same, by number: {"train", "between"}.

    Both images of a `train` pair are trained on, of the others one is trained and one evaluated on.
    """
    first: dict[int, int] = {}
    inside, between = [], []
    for number, seen in train.items():
        if not seen.fault and (other := first.setdefault(seen.content, number)) != number:
            inside.append((other, number))
    for number, seen in held.items():
        if not seen.fault and seen.content in first:
            between.append((first[seen.content], number))
    return {"train": inside, "between": between}


def near_twins(
    train: dict[int, Seen], held: dict[int, Seen], dataset: Dataset, reading: Reading = PLAIN
):
    """Return (training, evaluation) for each image held out that looks like one trained on.

    Candidates are those whose hashes differ in few bits; they are read again to be compared.
    """
    ours = [(n, s.look) for n, s in train.items() if s.look]
    theirs = [(n, s.look) for n, s in held.items() if s.look]
    if not ours or not theirs:
        return []
    numbers, looks = np.array([n for n, _ in ours]), np.array([x for _, x in ours], np.uint64)
    # Hashes that differ in up to seven bits have one of their eight bytes in common.
    octets = looks.view(np.uint8).reshape(-1, 8)
    orders = [np.argsort(octets[:, i], kind="stable") for i in range(8)]
    ordered = [octets[order, i] for i, order in enumerate(orders)]
    found = []
    for number, look in theirs:
        candidates = []
        for i, octet in enumerate(np.array([look], np.uint64).view(np.uint8)):
            start, stop = (np.searchsorted(ordered[i], octet, side) for side in ("left", "right"))
            candidates.append(orders[i][start:stop])
        those = np.unique(np.concatenate(candidates))
        apart = np.bitwise_count(looks[those] ^ np.uint64(look))
        closest = those[np.argsort(apart, kind="stable")[: min(int(np.sum(apart <= NEAR)), TRIES)]]
        for other in numbers[closest].tolist():
            if _alike(dataset.train, other, dataset.eval, number, reading):
                found.append((other, number))
                break
    return found


def _alike(first: Source, number: int, second: Source, other: int, reading: Reading) -> bool:
    """Return whether two images are the same but for their size, compression and brightness."""
    grey = [
        np.asarray(
            _picture(source[i]["image"], source.describe(i), reading)
            .convert("L")
            .resize((32, 32), Image.Resampling.BOX),
            np.float64,
        ).ravel()
        for source, i in ((first, number), (second, other))
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        return bool(np.corrcoef(grey[0], grey[1])[0, 1] >= LIKE)


def add_survey(
    card: dict[str, Any],
    dataset: Dataset,
    train: dict[int, Seen],
    held: dict[int, Seen],
    reading: Reading = PLAIN,
) -> None:
    """Add to a card what reading the images has shown; what was read in part says so."""
    both = [*train.values(), *held.values()]
    good = [seen for seen in both if not seen.fault]
    sides = np.array([seen.size for seen in good if seen.size != (0, 0)]).reshape(-1, 2)
    card["read"] = {"train": len(train), "eval": len(held)}
    if len(sides):
        shorter, longer = sides.min(1), sides.max(1)
        card["sizes"] = {
            "shorter": [int(x) for x in np.percentile(shorter, (0, 50, 100))],
            "longer": [int(x) for x in np.percentile(longer, (0, 50, 100))],
            "most_oblong": round(float((longer / shorter).max()), 2),
        }
        card["modes"] = dict(Counter(seen.mode for seen in good).most_common())
        card["formats"] = dict(Counter(seen.kind for seen in good).most_common())
    card["unreadable"] = [seen.fault for seen in both if seen.fault and not seen.misfit]
    card["mixed_channels"] = [seen.fault for seen in both if seen.misfit]
    whole = len(train) == len(dataset.train) and len(held) == len(dataset.eval)
    card["twins"] = None
    if whole:
        pairs = twins(train, held)
        same = {number for _, number in pairs["between"]}
        rest = {number: seen for number, seen in held.items() if number not in same}
        near = near_twins(train, rest, dataset, reading)
        card["twins"] = _named(pairs | {"near": near}, dataset)


def _named(pairs: dict[str, list[tuple[int, int]]], dataset: Dataset) -> dict[str, Any]:
    """Return counts, and the first few by the images' names; and how many change their class."""
    second = {"train": dataset.train, "between": dataset.eval, "near": dataset.eval}
    named = {}
    for kind, found in pairs.items():
        shown = [[key_of(dataset.train, a), key_of(second[kind], b)] for a, b in found[:SHOWN]]
        named[kind] = {"count": len(found), "shown": shown}
        ours, theirs = (getattr(s, "labels", None) for s in (dataset.train, second[kind]))
        if ours is not None and theirs is not None:
            named[kind]["of_other_class"] = sum(
                bool(np.any(ours[a] != theirs[b])) for a, b in found
            )
    return named


def lines(card: dict[str, Any]) -> list[str]:
    """Return the lines that matter before a training: parts, classes, what is left out, twins."""
    reading, images = card["reading"], card["images"]
    of = [f" ({reading[part]})" if reading[part] else "" for part in ("train", "eval")]
    text = [
        f"{card['source']}: {images['train']} images to train on{of[0]}, {images['eval']} to "
        f"evaluate on{of[1]}",
        _of_classes(card["classes"], card["per_class"].get("train")),
    ]
    if several := card.get("several_labels", {}).get("train"):
        text.append(
            f"several labels an image: {several['labels'] / max(1, images['train']):.2f} on "
            f"average; {several['without']} training images have none"
        )
    if (channels := card.get("channels", 3)) != 3:  # which older cards do not tell
        text.append(f"{channels} channel{'s' * (channels > 1)} an image")
    left_out = [f"{count} {what}" for what, count in reading["left_out"].items()]
    if left_out or reading["notes"]:
        text.append(f"left aside: {'; '.join([*left_out, *reading['notes']])}")
    if card.get("unreadable"):
        count = len(card["unreadable"])
        text.append(f"{count} images cannot be read, the first: {card['unreadable'][0]}")
    if card.get("mixed_channels"):
        count = len(card["mixed_channels"])
        text.append(
            f"mixed channels: {count} images do not fit, the first: {card['mixed_channels'][0]}"
        )
    if card.get("twins"):
        text.append(_of_twins(card["twins"], images["eval"]))
    else:
        text.append(
            "not looked for: images that are both trained and evaluated on; "
            "`deit inspect --check` does"
        )
    return text


def _of_classes(classes: Sequence[str], counts: Sequence[int] | None) -> str:
    if not classes:
        return "no labels"
    text = f"{len(classes)} classes: {', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}"
    if not counts:
        return text
    fewest, most = int(np.argmin(counts)), int(np.argmax(counts))
    text += f"; {counts[fewest]} ({classes[fewest]}) to {counts[most]} ({classes[most]}) images"
    small = sum(count < FEW for count in counts)
    text += f"; {small} classes have fewer than {FEW}" if small else ""
    folded = Counter(name.casefold() for name in classes)
    alike = [name for name in classes if folded[name.casefold()] > 1]
    pair = [name for name in alike if name.casefold() == alike[0].casefold()][:2]
    return text + (f"; {' and '.join(pair)} differ in capitals alone" if pair else "")


def _of_twins(found: dict[str, Any], held: int) -> str:
    inside, between = found["train"]["count"], found["between"]["count"]
    near = found.get("near", {"count": 0})["count"]  # only who decodes them knows
    if not between + near + inside:
        return "no image is there twice" if "near" in found else "no two files are the same"
    leaks = f"{between} of the {held} images to evaluate on are trained on too"
    parts = [leaks if between else "", f"{near} look like one" if near else ""]
    parts.append(f"{inside} training images are there twice" if inside else "")
    other = sum(kind.get("of_other_class", 0) for kind in found.values())
    parts.append(f"{other} of these pairs are of two classes" if other else "")
    kind = next(k for k in ("between", "near", "train") if k in found and found[k]["shown"])
    first, second = found[kind]["shown"][0]
    if kind != "train":
        first, second = f"{first} (trained on)", f"{second} (evaluated on)"
    return f"{', '.join(filter(None, parts))}; the first: {first} and {second}"

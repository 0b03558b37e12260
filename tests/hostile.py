"""Broken and hostile inputs for the weight readers and the image decoders, from seeds.

Used by tests/test_fuzz.py for seconds and by benchmarks/fuzz.py for minutes.
"""

import argparse
import collections
import datetime
import io
import json
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import cv2
import flax.serialization
import numpy as np
import tifffile
from PIL import Image

from deit_jax.configs import base
from deit_jax.data import decode, decoders
from deit_jax.data.decode import Reading
from deit_jax.data.view import EvalView, random_view
from deit_jax.errors import UserError
from deit_jax.weights.exporters import deit, huggingface, run
from deit_jax.weights.exporters import timm as timm_lib
from deit_jax.weights.load import open_model
from deit_jax.weights.pickles import LEGACY_MAGIC, LEGACY_PROTOCOL
from deit_jax.weights.torch_names import leaves
from tests.test_convert import DISTILLED, SMALL, opened

NUMBERS = (0, 1, -1, 2**16, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63), 10**30)
JSON_VALUES = (*NUMBERS, None, True, "", "x", "LABEL_0", 1e308, -0.5, [], [0], {}, {"0": 1}, [[[]]])
JSON_WORDS = ("NaN", "Infinity", "-Infinity", "1e999", "[" * 5000, '{"a":' * 5000, "9" * 5000)


def mutate(data: bytes, rng: random.Random, head: int = 0) -> bytes:
    """Change, cut, repeat or insert a few bytes, half of the time among the first `head`."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        end = min(head, len(data)) if head and rng.random() < 0.5 else len(data)
        place = rng.randrange(max(1, end))
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[place % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            width, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
            number = rng.choice(NUMBERS) % (1 << 8 * width)
            data[place : place + width] = number.to_bytes(width, order)
        elif kind == 3:
            del data[place : place + rng.choice((1, 2, 8, 64))]
        elif kind == 4:
            data[place:place] = data[place : place + rng.choice((1, 8, 64))]
        elif kind == 5:
            data[place:place] = rng.randbytes(rng.choice((1, 4, 32)))
        elif rng.random() < 0.2:
            del data[place:]
    return bytes(data)


def mutate_json(value, rng: random.Random):
    """Replace, drop or add one thing anywhere in a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key, copy = rng.choice(sorted(value)), dict(value)
        if rng.random() < 0.15:
            del copy[key]
        elif rng.random() < 0.1:
            copy["x" + key] = copy[key]
        else:
            copy[key] = mutate_json(value[key], rng)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.6:
        copy = list(value)
        place = rng.randrange(len(copy))
        copy[place] = mutate_json(copy[place], rng)
        return copy
    if isinstance(value, int | float) and rng.random() < 0.4:
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 10**9, str(value)))
    return rng.choice(JSON_VALUES)


def mutate_text(value, rng: random.Random) -> bytes:
    """Return the JSON text of a value that lies, or is none any more."""
    if rng.random() < 0.1:
        return rng.choice(JSON_WORDS).encode()
    text = json.dumps(mutate_json(value, rng)).encode()
    return mutate(text, rng) if rng.random() < 0.2 else text


def laughs(depth: int = 60) -> bytes:
    """Return the opcodes of a tuple of two of a tuple of two …: 2^depth to hash or to print."""
    return b")" + b"2\x86" * depth


def legacy(tree: bytes, keys: bytes = b"") -> bytes:
    """Return a file in PyTorch's older format around a pickled tree."""
    header = (LEGACY_MAGIC, LEGACY_PROTOCOL, {"little_endian": True})
    return b"".join(pickle.dumps(x, protocol=2) for x in header) + tree + keys


def npz(arrays) -> bytes:
    """Return arrays as numpy.savez writes them."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def bombs() -> dict[str, bytes]:
    """Return small files that ask for much: time, memory, code."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 28))
    packed = bytearray(stream.getvalue())
    claimed = struct.pack("<I", 1 << 28)
    while (place := packed.find(claimed)) >= 0:  # it claims to be small
        packed[place : place + 4] = struct.pack("<I", 100)
    as_key = b"\x80\x02}" + laughs() + b"K\x01s."
    as_pid = b"\x80\x02" + laughs() + b"Q."
    in_pid = b"\x80\x02(" + laughs() * 3 + laughs() + b"K\x01tQ."
    dictionary = b"\x80\x02ccollections\nOrderedDict\n((" + laughs() + b"K\x01tltR."
    huge = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage"
    )
    huge += (
        b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ" + b"K\x00" + laughs() + laughs() + b"tR."
    )
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    lies = len(header).to_bytes(8, "little") + header.encode()
    found = {"zip": bytes(packed), "safetensors": lies}
    trees = {"key": as_key, "pid": as_pid, "in pid": in_pid, "pairs": dictionary, "shape": huge}
    trees |= {
        "set": b"\x80\x04\x8f(" + laughs() + b"\x90.",
        "frozen": b"\x80\x04(" + laughs() + b"\x91.",
    }
    trees |= {
        "bytes": b"\x80\x05\x8e" + b"\xff" * 7 + b"\x7f",
        "long": b"\x80\x02\x8b\xff\xff\xff\x7f",
    }
    trees |= {
        "frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f",
        "memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    }
    trees |= {
        "deep": b"\x80\x02" + b"(" * 200_000,
        "lists": b"\x80\x02" + b"]" * 9 + b"a" * 8 + b".",
    }
    for name, tree in trees.items():
        found[name] = legacy(tree)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("archive/data.pkl", tree)
        found[f"{name} in a zip"] = stream.getvalue()
    found["msgpack lists"] = b"\x81\xa1a" + b"\xdd\x00\x00\x27\x10" * 400
    found["msgpack"] = b"\xdf\xff\xff\xff\xff"
    found["layers"] = npz({"encoderblock/kernel": np.zeros((2**40, 0))})
    found["npz"] = npz({"a": np.zeros(1)}).replace(b"(1,), }", b"(1%s), }" % (b"0" * 9))
    found["names"] = legacy(b"\x80\x02}.", b"\x80\x02(" + laughs() + b"l.")
    return found


class Weights:
    """Seed -> a broken source of weights, opened."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.place = folder / "broken"
        model = opened(DISTILLED, SMALL | {"width": 6, "num_heads": 3, "depth": 1})
        timm_lib.write(model, folder / "w.safetensors")
        deit.write(model, folder / "w.pth")
        huggingface.write(model, folder / "hf")
        run.write(model, folder / "run")
        timm = folder / "timm"
        timm.mkdir()
        shutil.copy(folder / "w.safetensors", timm / "model.safetensors")
        described = {
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "input_size": [3, 32, 32],
            "crop_pct": 0.9,
        }
        timm_config = {"architecture": DISTILLED, "num_classes": 3, "pretrained_cfg": described}
        (timm / "config.json").write_text(
            json.dumps(timm_config | {"label_names": ["a", "b", "c"]})
        )
        self.files = {name: (folder / name).read_bytes() for name in ("w.safetensors", "w.pth")}
        self.files["old.pth"] = _as_legacy(self.files["w.pth"])
        self.files["full.pth"] = _with_luggage(self.files["w.pth"])
        tree = dict(leaves(model.variables))
        self.files["w.npz"] = npz({path: np.asarray(leaf) for path, leaf in tree.items()})
        self.files["w.msgpack"] = flax.serialization.msgpack_serialize(model.variables)
        self.model = model
        self.bombs = list(bombs().values())
        self.runs = 0

    def __call__(self, seed: int) -> str:
        """Open what the seed makes; return how it ended: a line, or what it is."""
        rng = random.Random(seed)
        path = self._make(rng)
        try:
            found = open_model(path, *rng.choice(((), (DISTILLED,))))
        except UserError as error:
            text = str(error)
            if len(text.splitlines()) != 1:
                raise AssertionError(f"not one line: {text!r}") from error
            return text.replace(str(path), "PATH")
        return f"opened as {found.format}"

    def _make(self, rng: random.Random) -> Path:
        kind = rng.randrange(14)
        if kind < 9:
            return self._file(rng, kind)
        name = ("hf", "hf", "timm", "timm", "run")[kind - 9]
        changed = {
            "hf": ("config.json", "preprocessor_config.json", "model.safetensors"),
            "timm": ("config.json", "model.safetensors"),
            "run": ("config.json", "classes.json"),
        }[name]
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.unlink(missing_ok=True) if self.place.is_file() else None
        # The checkpoint itself is guarded by its checksums: a link will do.
        shutil.copytree(self.folder / name, self.place, ignore=lambda *_: ["checkpoints"])
        if name == "run":
            (self.place / "checkpoints").symlink_to(self.folder / "run" / "checkpoints")
        file = self.place / rng.choice(changed)
        data = file.read_bytes()
        if file.suffix == ".json":
            file.write_bytes(mutate_text(json.loads(data), rng))
        else:
            file.write_bytes(mutate_safetensors(data, rng))
        return self.place

    def _file(self, rng: random.Random, kind: int) -> Path:
        if self.place.is_dir():
            shutil.rmtree(self.place)
        if kind == 0:
            data = rng.choice(self.bombs)
            data = mutate(data[:5000], rng) if rng.random() < 0.7 else data
        elif kind < 3:
            data = mutate_safetensors(self.files["w.safetensors"], rng)
        elif kind < 5:
            data = mutate(self.files["old.pth"], rng, head=6000)
        elif kind == 7:
            data = mutate_zip(self.files["w.npz"], rng)
        elif kind == 8:
            data = mutate(self.files["w.msgpack"], rng)
        else:
            data = mutate_zip(self.files[rng.choice(("w.pth", "full.pth"))], rng)
        self.place.write_bytes(data)
        return self.place


def _as_legacy(archive: bytes) -> bytes:
    """Return a zip file of PyTorch's as its older format, in which the tree is the same pickle."""
    with zipfile.ZipFile(io.BytesIO(archive)) as entries:
        storages = {
            int(n.rpartition("/")[2]): entries.read(n) for n in entries.namelist() if "/data/" in n
        }
        tree = entries.read("archive/data.pkl")
    keys = pickle.dumps([str(key) for key in sorted(storages)], protocol=2)
    data = b"".join(
        struct.pack("<q", len(storages[k]) // 4) + storages[k] for k in sorted(storages)
    )
    return legacy(tree, keys) + data


def _with_luggage(archive: bytes) -> bytes:
    """Return a zip file of PyTorch's with objects of all sorts beside its weights."""
    beside = {
        "args": argparse.Namespace(lr=1e-3, out=PurePosixPath("/tmp")),
        "best": [np.float64(0.5), np.arange(9.0), np.array([{}, None], dtype=object)],
        "when": datetime.datetime(2026, 1, 1),
        "tags": [{"a", "b"}, frozenset({(1, 2)}), collections.Counter("aab")],
        "numbers": {(1, "a"): 1j, "rng": np.random.default_rng(0), "kind": random.Random},
        "buffers": bytearray(9),
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                body, more = content[2:-1], pickle.dumps(beside, protocol=2)[2:-1]
                content = b"\x80\x02}(X\x01\x00\x00\x00w" + body
                content += b"X\x01\x00\x00\x00x" + more + b"u."
            new.writestr(name, content)
    return stream.getvalue()


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Break a safetensors file: its bytes, or only what its header says of them."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.4:
        return mutate(data, rng, head=8 + size)
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.4 and "deit_jax" in header["__metadata__"]:
        described = json.loads(header["__metadata__"]["deit_jax"])
        header["__metadata__"]["deit_jax"] = mutate_text(described, rng).decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        text = mutate_text(header, rng)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def mutate_zip(data: bytes, rng: random.Random) -> bytes:
    """Break a zip file: its bytes, or the pickle in an archive that is otherwise whole."""
    if rng.random() < 0.3:
        return mutate(data, rng)
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        changed = rng.choice(old.namelist()) if "archive/data.pkl" not in old.namelist() else ".pkl"
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, mutate(content, rng) if name.endswith(changed) else content)
    return stream.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """Return a PNG file of a few bytes whose header claims this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 << 16))
    magic = b"\x89PNG\r\n\x1a\n"
    return magic + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def files_that_claim(width: int, height: int) -> dict[str, bytes]:
    """Return small files of each kind whose headers claim this size, at most 65535."""
    small, sizes = Image.new("RGB", (16, 16)), struct.pack(">HH", height, width)
    made = {}
    for kind in ("JPEG", "GIF", "BMP", "PPM", "TIFF"):
        stream = io.BytesIO()
        small.save(stream, kind)
        made[kind] = stream.getvalue()
    marker = made["JPEG"].index(b"\xff\xc0") + 5
    made["JPEG"] = made["JPEG"][:marker] + sizes + made["JPEG"][marker + 4 :]
    screen = struct.pack("<HH", width, height)
    image = made["GIF"].index(b",") + 5
    made["GIF"] = (
        made["GIF"][:6] + screen + made["GIF"][10:image] + screen + made["GIF"][image + 4 :]
    )
    made["BMP"] = made["BMP"][:18] + struct.pack("<ii", width, height) + made["BMP"][26:]
    made["PPM"] = made["PPM"].replace(b"16 16", f"{width} {height}".encode())
    for tag, side in ((256, width), (257, height)):
        for kind, pack in ((3, "<HHIHH"), (4, "<HHII")):
            old = struct.pack(pack, tag, kind, 1, 16, *([0] if kind == 3 else []))
            made["TIFF"] = made["TIFF"].replace(old, struct.pack("<HHII", tag, 4, 1, side))
    made["PNG"] = png_that_claims(width, height)
    return made


class Images:
    """Seed -> a broken image file, decoded and cropped as in training and in evaluation."""

    def __init__(self):
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 256, (8, 12, 3), np.uint8)
        photo = Image.fromarray(noise).resize((48, 32))
        self.files = []
        kinds = (
            ("JPEG", {"quality": 90}),
            ("JPEG", {"progressive": True}),
            ("JPEG", {"restart_marker_rows": 1}),
            ("PNG", {}),
            ("WEBP", {}),
            ("WEBP", {"lossless": True}),
            ("GIF", {}),
            ("BMP", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
            ("TIFF", {}),
            ("PPM", {}),
        )
        for mode in ("RGB", "L", "P", "CMYK", "RGBA", "1", "I;16"):
            for kind, options in kinds:
                stream = io.BytesIO()
                try:
                    photo.convert("I").convert(mode).save(stream, kind, **options) if (
                        mode == "I;16"
                    ) else photo.convert(mode).save(stream, kind, **options)
                except (OSError, ValueError):
                    continue
                self.files.append(stream.getvalue())
        grey = 16 * noise.astype(np.uint16)
        for values in (grey, grey[:, :, 0], grey[:, :, 0] / np.float32(4095)):
            stream = io.BytesIO()
            tifffile.imwrite(stream, values, extratags=[(281, "H", 1, 4095, True)])
            self.files.append(stream.getvalue())
            if values.dtype == np.uint16:
                self.files.append(cv2.imencode(".png", values)[1].tobytes())
        self.files += files_that_claim(60000, 60000).values()
        self.files += files_that_claim(9000, 9000).values()
        self.files += files_that_claim(1, 60000).values()
        self.decoders = [decoders.choose(name) for name in decoders.available()]

    def __call__(self, seed: int) -> str:
        """Read what the seed makes in every way; return how it ended."""
        rng = random.Random(seed)
        data = mutate(rng.choice(self.files), rng, head=64)
        decoder = rng.choice(self.decoders)
        resize = rng.choice(("crop", "squash", "pad"))
        reading = Reading(resize, rng.random() < 0.5, rng.choice((0, 0, 12, 16)), (9, 9, 9))
        try:
            pixels = decode.read(data, "NAME", decoder, None, reading)
            image = decode.decode(data, "NAME", reading)
        except UserError as error:
            text = str(error)
            if len(text.splitlines()) != 1:
                raise AssertionError(f"not one line: {text!r}") from error
            return text
        if pixels.shape != (image.height, image.width, 3):
            raise AssertionError(f"{pixels.shape} is not {image.size}")
        EvalView(32, 0.9, reading).crop(image)
        numbers = np.random.default_rng(seed)
        box = decode.random_box(image.width, image.height, numbers, (0.08, 1.0), (3 / 4, 4 / 3))
        decode.resized_crop(pixels, box, 32, decoder.resize)
        decode.simple_random_crop(pixels, 32, numbers, decoder.resize)
        augment = base.get_config().augment
        random_view(pixels, 32, augment, numbers, decoder.resize, reading)
        return "decoded"

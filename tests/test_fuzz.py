"""Broken and hostile weights and images: one line or success, in little time and memory.

The long run is benchmarks/fuzz.py.
"""

import contextlib
import faulthandler
import io
import time
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from deit_jax.data import decode, decoders
from deit_jax.errors import UserError
from deit_jax.weights import readers
from deit_jax.weights.load import open_model
from tests import hostile

SECONDS = 10.0  # for one input on a busy machine; what hangs takes for ever
BOMBS = hostile.bombs()


@contextlib.contextmanager
def quickly():
    """Fail if the block takes long; end the process, with a traceback, if it hangs."""
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
    began = time.monotonic()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert time.monotonic() - began < SECONDS


@contextlib.contextmanager
def in_memory(mib):
    """Fail if Python's allocations, numpy's and Pillow's among them, exceed a limit."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mib << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_bomb_is_refused_at_once(name, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(BOMBS[name])
    with quickly(), in_memory(64), pytest.raises(ValueError, match=r"weights\.pth"):
        readers.read(path)


def test_an_ordered_dict_of_python_2_is_read(tmp_path):
    """It was pickled as a call with a list of pairs."""
    reference = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    reference += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + b"K\x00K\x02\x85K\x01\x85tR"
    tree = b"\x80\x02ccollections\nOrderedDict\n]X\x01\x00\x00\x00w" + tensor + b"\x86a\x85R."
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", tree)
        archive.writestr("archive/data/0", np.float32([3, 4]).tobytes())
    assert readers.read(path)["w"].tolist() == [3, 4]


@pytest.mark.parametrize("name", decoders.available())
@pytest.mark.parametrize("size", [(60000, 60000), (12000, 12000), (65000, 1500)])
def test_a_file_that_claims_to_be_enormous_is_refused_at_once(name, size):
    for kind, data in hostile.files_that_claim(*size).items():
        assert len(data) < 5000
        with quickly(), in_memory(16), pytest.raises(UserError, match=r"^x: not a readable image"):
            decode.read(data, "x", decoders.choose(name))
        with quickly(), in_memory(16), pytest.raises(UserError, match=r"bomb|exceeds limit"):
            decode.decode(data, f"x of {kind}")


def test_the_headers_claim_what_they_should():
    for kind, data in hostile.files_that_claim(6000, 5000).items():
        assert Image.open(io.BytesIO(data)).size == (6000, 5000), kind


def test_an_image_far_longer_than_wide_is_cut_before_it_is_enlarged():
    image = Image.new("RGB", (1, 60000), (9, 9, 9))
    with quickly():
        assert decode.centre_crop(image, 224, 0.875).getpixel((5, 5)) == (9, 9, 9)


def test_an_image_that_is_a_program_is_not_run(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "EPS")
    with pytest.raises(UserError, match=r"^x: not a readable image \(EPS"):
        decode.decode(stream.getvalue(), "x")


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return {"weights": hostile.Weights(tmp_path_factory.mktemp("f")), "images": hostile.Images()}


@pytest.mark.parametrize(("target", "count"), [("weights", 200), ("images", 300)])
def test_fuzz(targets, target, count):
    """Every seed ends in one line or in success; both happen, in many ways."""
    outcomes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on metadata that it could not read
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for seed in range(count):
            with quickly():
                outcomes.add(targets[target](seed))
    assert any(not text.startswith(("PATH", "NAME")) for text in outcomes)
    assert len(outcomes) > 30


def test_whole_files_are_opened(targets):
    """The fuzz begins from files that are fine, or it would show nothing."""
    made = targets["weights"]
    for name in ("hf", "run"):
        assert open_model(made.folder / name, default=None).variables["params"]
    with pytest.raises(UserError, match=r"weights do not fit: missing blocks\.1"):
        open_model(made.folder / "timm")  # a name of a larger model; all else is in order
    for name, data in made.files.items():
        path = made.folder / f"whole-{name}"
        path.write_bytes(data)
        assert readers.read(path)["cls_token"].shape == (1, 1, 6)

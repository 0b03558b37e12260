"""Check `deit prepare`: all bytes arrive, plain TFDS opens it, an interruption costs little."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from deit_jax.cli import prepare
from deit_jax.configs import base
from deit_jax.data.prepare import build, readers, writer
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def photographs():
    """Return real photographs, name -> uint8 [H W 3]."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    return {"cat": data.chelsea(), "coffee": data.coffee(), "china": china, "flower": flower}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return a folder of 4 classes of 6 photographs each, some PNG and one CMYK."""
    root = tmp_path_factory.mktemp("data") / "My Photos-2"
    for name, image in photographs().items():
        (root / name).mkdir(parents=True)
        for i in range(6):
            crop = Image.fromarray(image).crop((8 * i, 5 * i, 290 + 9 * i, 240 + 8 * i))
            if i == 4 and name == "coffee":
                crop = crop.convert("CMYK")
            crop.save(root / name / f"{i}.{'png' if i == 5 else 'JPEG'}")
    return root


@pytest.fixture
def small_shards(monkeypatch):
    """Make every shard hold a few photographs."""
    monkeypatch.setattr(readers, "SHARD_BYTES", 100_000)


def contents(source):
    """Return {(bytes, label)} of a source of ours."""
    return {(x["image"], x["label"]) for x in (source[i] for i in range(len(source)))}


def opened(result, **fields):
    data = base.get_config().data
    data.source = f"tfds:{result['name']}"
    data.dir = str(Path(result["path"]).parent.parent)
    data.update(fields)
    return open_dataset(data)


def snapshot(folder):
    """Return {file name: checksum}, but for the files that tell the time."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in Path(folder).iterdir()
        if p.name != build.JOURNAL
    }


def folder_data(root):
    data = base.get_config().data
    data.source = f"folder:{root}"
    return open_dataset(data)


def test_a_tree_arrives_byte_for_byte_in_the_splits_that_the_folder_has(tree, tmp_path):
    result = build.prepare(tree, tmp_path, workers=1)
    assert result["name"] == "my_photos_2"
    assert result["examples"] == {"train": 20, "validation": 4}
    folder, ours = folder_data(tree), opened(result)
    assert ours.classes == folder.classes == ["cat", "china", "coffee", "flower"]
    assert contents(ours.train) == contents(folder.train)
    assert contents(ours.eval) == contents(folder.eval)


def test_plain_tfds_opens_it_and_nothing_imports_tensorflow(tree, tmp_path):
    """In a process of its own, as other tests may have imported TensorFlow."""
    code = """
        import sys
        from pathlib import Path
        from deit_jax import __main__
        assert __main__.main(["prepare", sys.argv[1], sys.argv[2], "--workers=1"]) == 0
        import tensorflow_datasets as tfds
        from PIL import Image

        builder = tfds.builder_from_directory(str(Path(sys.argv[2], "my_photos_2", "1.0.0")))
        assert builder.info.file_format.value == "array_record"
        assert builder.info.features["label"].names == ["cat", "china", "coffee", "flower"]
        for split, count in (("train", 20), ("train[:25%]", 5), ("validation", 4)):
            source = builder.as_data_source(split)
            assert len(source) == count
        seen = 0
        for example in source:
            name = example["file_name"].decode()
            assert name.split("/")[0] == builder.info.features["label"].int2str(example["label"])
            if name.endswith("png"):
                assert (example["image"] == Image.open(Path(sys.argv[1], name))).all()
                seen += 1
        builder = tfds.builder("my_photos_2", data_dir=sys.argv[2])
        assert builder.is_prepared()
        assert "tensorflow" not in sys.modules and "jax" not in sys.modules
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tree), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "20 train, 4 validation images in 4 classes" in done.stdout
    assert str(tmp_path) in done.stdout.splitlines()[-1]


def test_any_number_of_workers_writes_the_same_bytes(tree, tmp_path, small_shards):
    one = build.prepare(tree, tmp_path / "1", workers=1)
    three = build.prepare(tree, tmp_path / "3", workers=3)
    assert one["shards"] > 4
    assert snapshot(one["path"]) == snapshot(three["path"])
    assert one["sha256"] == three["sha256"]


def test_the_checksum_file_is_sha256sums(tree, tmp_path, small_shards):
    result = build.prepare(tree, tmp_path, workers=1)
    lines = (Path(result["path"]) / build.CHECKSUMS).read_text().splitlines()
    assert len(lines) == result["shards"]
    for line in lines:
        digest, _, name = line.partition("  ")
        data = (Path(result["path"]) / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest


def test_running_again_checks_and_a_damaged_file_is_written_anew(tree, tmp_path, small_shards):
    first = build.prepare(tree, tmp_path, workers=1)
    before = snapshot(first["path"])
    assert build.prepare(tree, tmp_path, workers=1)["shards_kept"] == first["shards"]
    victims = sorted(Path(first["path"]).glob("*array_record*"))[:2]
    victims[0].write_bytes(victims[0].read_bytes()[:-1] + b"x")
    victims[1].unlink()
    again = build.prepare(tree, tmp_path, workers=1)
    assert again["shards_kept"] == first["shards"] - 2
    assert snapshot(first["path"]) == before


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tree, tmp_path, small_shards):
    whole = build.prepare(tree, tmp_path / "whole", workers=1)
    code = (
        "import sys; from deit_jax import __main__; from deit_jax.data.prepare import readers\n"
        "readers.SHARD_BYTES = 100_000\n"
        "sys.exit(__main__.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "prepare", tree, tmp_path / "part", "--workers=2"]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    folder = tmp_path / "part" / "my_photos_2" / "1.0.0"
    deadline = time.monotonic() + 120
    while not list(folder.glob("*array_record-?????-of-?????")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: the command and its processes
    _, error = process.communicate(timeout=120)
    if process.returncode:  # or it was done before it noticed
        assert error.splitlines()[-1] == "deit prepare: interrupted"
        assert "shards are finished and kept" in error
        assert not (folder / "dataset_info.json").exists()
    result = build.prepare(tree, tmp_path / "part", workers=1)
    assert result["shards_kept"] > 0
    assert snapshot(folder) == snapshot(whole["path"])


def test_ctrl_c_is_not_raised_where_locks_are_held(tree, tmp_path, small_shards, monkeypatch):
    """Raised inside of `wait` it once left a future locked, and the command hung for good."""
    real, waited = build.wait, []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background ignore it

    def wait(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        waited.append(real(*args, **kwargs))
        return waited[-1]

    monkeypatch.setattr(build, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        build.prepare(tree, tmp_path, workers=2)
    assert len(waited) in (1, 2)  # until those in hand were finished
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(build, "wait", real)
    assert build.prepare(tree, tmp_path, workers=1)["shards_kept"] == 2


def test_a_failed_run_keeps_its_shards_and_a_torn_journal_line_does_no_harm(
    tree, tmp_path, small_shards, monkeypatch
):
    whole = build.prepare(tree, tmp_path / "whole", workers=1)
    write, count = writer.write_shard, 0

    def failing(job):
        nonlocal count
        count += 1
        if count == 3:
            raise UserError("the disk burns")
        return write(job)

    monkeypatch.setattr(build, "write_shard", failing)
    with pytest.raises(UserError, match="the disk burns"):
        build.prepare(tree, tmp_path / "part", workers=1)
    monkeypatch.undo()
    monkeypatch.setattr(readers, "SHARD_BYTES", 100_000)
    folder = tmp_path / "part" / "my_photos_2" / "1.0.0"
    with (folder / build.JOURNAL).open("a") as file:
        file.write('{"file": "my_ph')
    assert build.prepare(tree, tmp_path / "part", workers=1)["shards_kept"] == 2
    assert snapshot(folder) == snapshot(whole["path"])


def test_other_images_or_options_do_not_mix_with_what_is_there(tree, tmp_path):
    build.prepare(tree, tmp_path, workers=1)
    with pytest.raises(UserError, match="other images or options; delete it, or choose --name"):
        build.prepare(tree, tmp_path, workers=1, max_side=100)
    result = build.prepare(tree, tmp_path, name="small", workers=1, max_side=100)
    assert result["name"] == "small"


def test_max_side_makes_large_images_smaller_and_leaves_small_ones_alone(tree, tmp_path):
    result = build.prepare(tree, tmp_path, workers=1, max_side=292)
    source = opened(result, train_split="train+validation").train
    stored = {example["file_name"].decode(): example["image"] for example in raw(source)}
    kept = 0
    for path in sorted(tree.rglob("*.*")):
        name, original = str(path.relative_to(tree)), Image.open(io.BytesIO(path.read_bytes()))
        image = Image.open(io.BytesIO(stored[name]))
        if max(original.size) <= 292:
            assert stored[name] == path.read_bytes()
            kept += 1
        else:
            assert (image.format, max(image.size), image.mode) == ("JPEG", 292, "RGB")
            expected = original.convert("RGB").resize(image.size, Image.Resampling.BICUBIC)
            difference = np.asarray(image, float) - np.asarray(expected, float)
            assert np.abs(difference).mean() < 4  # JPEG 95 of the same pixels
            assert abs(image.width / image.height - original.width / original.height) < 0.01
    assert 0 < kept < 24


def raw(source):
    return (source._data_source[i] for i in range(len(source)))


def test_max_side_keeps_orientation_and_sixteen_bits():
    image, exif = Image.fromarray(photographs()["cat"]), Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    image.save(data, "jpeg", exif=exif)
    small = Image.open(io.BytesIO(writer.fit(data.getvalue(), 64)))
    assert max(small.size) == 64
    assert small.getexif()[0x0112] == 6
    deep = io.BytesIO()
    Image.fromarray(np.arange(10_000, dtype=np.uint16).reshape(100, 100)).save(deep, "png")
    assert writer.fit(deep.getvalue(), 64) == deep.getvalue()
    twelve = photographs()["cat"].astype(np.uint16) * 16  # in colour; as bytes it would be black
    deep = cv2.imencode(".png", twelve)[1].tobytes()
    assert writer.fit(deep, 64) == deep


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_image_stops_with_its_name_or_is_listed(tree, tmp_path, workers):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    (root / "cat" / "1.JPEG").write_bytes(b"not an image")
    (root / "cat" / "2.JPEG").write_bytes(b"")
    with pytest.raises(UserError, match=r"cat/[12]\.JPEG: not a readable image") as error:
        build.prepare(root, tmp_path / "out", workers=workers)
    assert "\n" not in str(error.value)
    result = build.prepare(
        root, tmp_path / "skipping", workers=workers, skip_unreadable=True, eval_fraction=0.5
    )
    assert sorted(result["skipped"]) == ["cat/1.JPEG", "cat/2.JPEG"]
    assert sum(result["examples"].values()) == 22
    assert "skipped, unreadable: cat/1.JPEG" in prepare.report(result, tmp_path)
    dataset = opened(result)
    assert len(dataset.train) + len(dataset.eval) == 22


def test_a_full_disk_is_noticed_before_anything_is_written(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(UserError, match=r"0\.0 GB are needed, 0\.0 GB are free"):
        build.prepare(tree, tmp_path, workers=1)


def test_a_write_that_fails_names_the_file_and_leaves_no_part(tree, tmp_path, monkeypatch):
    from array_record.python import array_record_module

    class Full(array_record_module.ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError("No space left on device\nand more")

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match=r"00001: cannot be written \(No space left on device\)"):
        build.prepare(tree, tmp_path, workers=1)
    assert not list(tmp_path.rglob("*.tmp"))

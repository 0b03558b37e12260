"""Check WebDataset shards: random access through an index of offsets."""

import gzip
import io
import json
import tarfile

import pytest

from deit_jax.data.sources import webdataset
from deit_jax.data.sources.webdataset import INDEX_NAME, images_of
from deit_jax.errors import UserError
from tests.test_sources import error_of, open_data


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def wds(tmp_path, monkeypatch):
    """Return a folder of tars as timm has them on the hub, and {split: [(bytes, label), …]}."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, expected = tmp_path / "wds", {"train": [], "validation": []}
    root.mkdir()
    for split, shards in (("train", 3), ("validation", 1)):
        for shard in range(shards):
            with tarfile.open(root / f"imagenet1k-{split}-{shard:04d}.tar", "w") as tar:
                for i in range(4):
                    data = f"{split} {shard} {i}".encode() * (i + 1)
                    label = (shard + i) % 3
                    key = f"n0{'x' * 120 * (i == 2)}/{shard}_{i}"  # one too long for old tars
                    add(tar, f"{key}.jpg", data)
                    add(tar, f"{key}.cls", str(label).encode())
                    add(tar, f"{key}.json", json.dumps({"label": label, "height": 3}).encode())
                    expected[split].append((data, label))
    return root, expected


def read_all(source):
    return [(x["image"], x["label"]) for x in (source[i] for i in range(len(source)))]


def test_webdataset_shards_are_read_at_random(wds):
    root, expected = wds
    for _ in range(2):  # the second time from the index
        dataset = open_data(f"wds:{root}")
        assert dataset.classes == ["0", "1", "2"]
        assert read_all(dataset.train) == expected["train"]
        assert read_all(dataset.eval) == expected["validation"]
    assert dataset.train.describe(5) == f"{root}/imagenet1k-train-0001.tar:n0/1_1.jpg"
    (root / "classes.txt").write_text("cat\ndog\neel\n")
    assert open_data(f"wds:{root}").classes == ["cat", "dog", "eel"]


def test_the_index_is_kept_and_made_anew_when_a_tar_changes(wds, monkeypatch):
    root, expected = wds
    open_data(f"wds:{root}")
    indexed = []
    real = images_of
    monkeypatch.setattr(webdataset, "images_of", lambda path: indexed.append(path) or real(path))
    open_data(f"wds:{root}")
    assert not indexed
    (root / "imagenet1k-train-0002.tar").unlink()
    dataset = open_data(f"wds:{root}")
    assert len(indexed) == 3
    assert read_all(dataset.train) == expected["train"][:8]
    (root / INDEX_NAME).write_bytes(b"PK\x03\x04 damaged")
    assert len(open_data(f"wds:{root}").train) == 8
    assert len(indexed) == 6


def test_the_index_goes_elsewhere_where_the_folder_cannot_be_written(wds, tmp_path):
    root, expected = wds
    (root / INDEX_NAME).mkdir()  # stands in the way, for root too
    for _ in range(2):
        assert read_all(open_data(f"wds:{root}").train) == expected["train"]
    assert len(list((tmp_path / "cache" / "deit_jax").glob("wds-*.npz"))) == 1


def test_webdataset_without_evaluation_holds_out_a_part(wds):
    root, expected = wds
    (root / "imagenet1k-validation-0000.tar").unlink()
    dataset = open_data(f"wds:{root}", eval_fraction=0.25)
    assert (len(dataset.train), len(dataset.eval)) == (9, 3)
    assert sorted(read_all(dataset.train) + read_all(dataset.eval)) == sorted(expected["train"])


def test_each_mistake_in_webdataset_shards_is_one_line(wds, tmp_path):
    root, _ = wds
    assert "no *.tar files" in error_of(f"wds:{tmp_path}/none")
    (root / "classes.txt").write_text("cat\n")
    assert "1 names, but labels up to 2" in error_of(f"wds:{root}")
    (root / "classes.txt").unlink()
    tar = root / "imagenet1k-train-0001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:3000])
    assert f"{tar}: not a readable, uncompressed tar" in error_of(f"wds:{root}")
    tar.write_bytes(gzip.compress(whole))
    assert f"{tar}: not a readable, uncompressed tar" in error_of(f"wds:{root}")
    for name, data, part in (
        ("a.jpg", b"x", "a.jpg: no label; expected a.cls"),
        ("a.cls", b"one", "a.cls: not a class number"),
        ("a.cls", b"-1", "no images"),
    ):
        for file in root.glob("*.tar"):
            file.unlink()
        with tarfile.open(tar, "w") as out:
            add(out, name, data)
        assert part in error_of(f"wds:{root}")
    with tarfile.open(tar, "w") as out:
        for i in range(3):
            add(out, f"{i}.png", b"x")
            add(out, f"{i}.cls", b"0")
    source = open_data(f"wds:{root}").train
    tar.write_bytes(b"")
    with pytest.raises(UserError, match="shorter than it was"):
        source[0]

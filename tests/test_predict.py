"""Predictions and features of many images: named in any way, read or not, begun and taken up."""

import csv
import io
import json
import os

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save_file

import deit_jax
from deit_jax import __main__ as program
from deit_jax.analysis import inference
from deit_jax.analysis.classify import predictions
from deit_jax.analysis.embed import embed
from deit_jax.data import feature_file
from deit_jax.data.sources.files import FolderSource
from deit_jax.data.sources.named import named_images
from deit_jax.errors import UserError
from deit_jax.weights.fit import init_variables
from deit_jax.weights.load import open_model
from deit_jax.weights.torch_names import to_torch
from tests.tiny import save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Write a small distilled model of three classes to a file; return its path."""
    name = "deit_tiny_distilled_patch16_224"
    fields = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 3}
    model = deit_jax.create_model(name, num_classes=3, **fields)
    variables = init_variables(model, 0)
    rng = np.random.default_rng(0)
    for head in ("head", "head_dist"):  # or all images would get nearly the same answer
        variables["params"][head]["kernel"] = rng.normal(size=(24, 3)).astype(np.float32)
    told = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_ratio": 0.8}
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    return save_weights(path, name, model, variables, classes=["ant", "bee", "cat"], **told)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Write 150 images and two that are none; return their folder."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    (root / "more").mkdir()
    for i in range(150):
        pixels = rng.integers(0, 90, (40 + i % 9, 50, 3)) + rng.integers(0, 165, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(
            root / ("more" if i % 3 else "") / f"{i:03}.png"
        )
    (root / "051.png").write_bytes(b"no image")
    (root / "more" / "100.png").write_bytes((root / "more" / "001.png").read_bytes()[:200])
    (root / "notes.txt").write_text("no image either")
    return root


def deit(capsys, *words):
    code = program.main([str(word) for word in words])
    return code, *capsys.readouterr()


def logits_of(weights, paths):
    model, params, spec = deit_jax.load(str(weights), return_spec=True)
    images = deit_jax.preprocess([str(path) for path in paths], spec)
    return np.asarray(model.apply({"params": params}, jnp.asarray(images)).fused())


def readable(photos):
    # As the folder is walked: its own files, then those of folders in it.
    paths = [*sorted(photos.glob("*.png")), *sorted((photos / "more").glob("*.png"))]
    return [p for p in paths if p.name not in ("051.png", "100.png")]


def test_a_folder_is_answered_in_batches_and_the_rest_is_named(weights, photos, capsys):
    """The answers are those of `load` and `preprocess`, with a softmax from NumPy."""
    code, out, err = deit(capsys, "predict", f"--weights={weights}", "--json", photos)
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith("deit predict: 2 of 150 images could not be read: the first is ")
    for name in ("051.png", "100.png"):
        assert err.count(f"{name} (example ") == 1
    said = json.loads(out)
    assert sorted(os.path.basename(p) for p in said["unreadable"]) == ["051.png", "100.png"]
    paths = readable(photos)
    assert [r["image"] for r in said["results"]] == [str(p) for p in paths]
    logits = logits_of(weights, paths)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert len(np.unique(expected.argmax(1))) > 1  # or any order would do
    for result, row in zip(said["results"], expected, strict=True):
        order = np.argsort(-row)
        assert [p["index"] for p in result["predictions"]] == order.tolist()
        assert [p["class"] for p in result["predictions"]] == [
            ("ant", "bee", "cat")[i] for i in order
        ]
        got = [p["probability"] for p in result["predictions"]]
        np.testing.assert_allclose(got, row[order], atol=1e-5)


def test_csv_and_lines_say_the_same(weights, photos, tmp_path, capsys):
    paths = [str(p) for p in readable(photos)[:70]]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(paths) + "\n\n")
    rows = {}
    for name in ("a.csv", "a.jsonl", "a.json", "a.txt"):
        words = ["predict", f"--weights={weights}", f"--list={listed}", "--topk=2"]
        code, out, err = deit(capsys, *words, f"--out={tmp_path / name}")
        assert (code, out, err) == (0, "", "")
        rows[name] = (tmp_path / name).read_text()
    whole = json.loads(rows["a.json"])["results"]
    assert [json.loads(line) for line in rows["a.jsonl"].splitlines()] == whole
    head, *body = csv.reader(io.StringIO(rows["a.csv"]))
    assert head == ["path", "class_1", "probability_1", "class_2", "probability_2"]
    for cells, result in zip(body, whole, strict=True):
        said = [(p["class"], f"{p['probability']:.6f}") for p in result["predictions"]]
        assert cells == [result["image"], *said[0], *said[1]]
    assert rows["a.txt"].splitlines()[0] == paths[0]


def test_images_are_named_in_many_ways(photos, tmp_path, monkeypatch):
    def names(*words, **options):
        images = named_images([str(word) for word in words], **options)
        return [os.path.basename(images.describe(i)) for i in range(len(images))]

    assert names(photos / "000.png", photos / "nowhere.png") == ["000.png", "nowhere.png"]
    assert names(photos / "more")[:3] == ["001.png", "002.png", "004.png"]
    assert names(f"{photos}/00*.png") == ["000.png", "003.png", "006.png", "009.png"]
    assert len(names(f"{photos}/**/*.png")) == 150
    odd = tmp_path / "a[1].png"
    Image.new("RGB", (2, 2)).save(odd)
    assert names(odd) == ["a[1].png"]  # a file is one, whatever is in its name
    monkeypatch.setattr("sys.stdin", io.StringIO("b.png\r\n\nc.png\n"))
    assert names(photos / "000.png", "-") == ["000.png", "b.png", "c.png"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    for word, line in (
        (f"{tmp_path}/*.gif", "matches no file"),
        (tmp_path / "empty", r"no images in this folder \(1 files \.txt\)"),
    ):
        with pytest.raises(UserError, match=line):
            names(word)
    with pytest.raises(UserError, match=r"--list=.*nowhere: cannot be read \(No such file"):
        names(listed=str(tmp_path / "nowhere"))
    (tmp_path / "blank").write_text("\n")
    with pytest.raises(UserError, match="blank: names no image; give one path a line"):
        names(listed=str(tmp_path / "blank"))


def test_one_that_is_not_there_does_not_stop_the_others(weights, photos, tmp_path, capsys):
    words = ["predict", f"--weights={weights}", tmp_path / "no.jpg"]
    code, out, err = deit(capsys, *words, photos / "000.png")
    assert code == 1
    assert out.splitlines()[0] == str(photos / "000.png")
    assert "no.jpg: cannot be read (No such file or directory)" in err
    assert "1 of 2 images could not be read:" in err.splitlines()[-1]
    code, out, err = deit(capsys, *words)
    assert (code, out) == (1, "")
    assert "the only image could not be read" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--json", "--format=csv", "x"], "--json and --format=csv: give one of them"),
        ([], "no image given"),
        (["--out=/proc/nowhere/a.csv", "x"], "--out=/proc/nowhere/a.csv: cannot be written"),
    ],
)
def test_command_lines_that_mean_nothing(weights, capsys, words, line):
    code, _, err = deit(capsys, "predict", f"--weights={weights}", *words)
    assert code in (1, 2)
    assert line in err.splitlines()[-1]


def rows_of(path):
    return np.load(path), path.with_suffix(".paths.txt").read_text().splitlines()


def test_an_array_has_a_row_for_each_path(weights, photos, tmp_path, capsys):
    out = tmp_path / "f.npy"
    code, said, err = deit(capsys, "embed", f"--weights={weights}", f"--out={out}", photos)
    assert code == 1
    assert "2 of 150 images could not be read" in err.splitlines()[-1]
    assert f"{out}: pooled features of 148 images" in said
    values, paths = rows_of(out)
    assert paths == [str(p) for p in readable(photos)]
    model, params, spec = deit_jax.load(str(weights), return_spec=True)
    tokens = deit_jax.features(model, params, deit_jax.preprocess(paths, spec), layers=-1)
    np.testing.assert_allclose(values, np.asarray(tokens)[:, :2].mean(1), atol=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["f.npy", "f.paths.txt"]
    code, _, err = deit(capsys, "embed", f"--weights={weights}", f"--out={out}", photos)
    assert code == 1
    assert "f.npy: exists; --force overwrites it" in err


def test_a_table_has_the_paths_beside_the_features(weights, photos, tmp_path, capsys):
    words = ["embed", f"--weights={weights}", "--features=patches", "--layer=1", "--nonorm"]
    paths = [str(p) for p in readable(photos)[:70]]
    for name in ("p.npy", "p.parquet"):
        assert deit(capsys, *words, f"--out={tmp_path / name}", *paths)[0] == 0
    array, _ = rows_of(tmp_path / "p.npy")
    table = pq.read_table(tmp_path / "p.parquet")
    assert array.shape == (70, 16, 24)
    assert table["path"].to_pylist() == paths
    np.testing.assert_array_equal(
        np.stack(table["embedding"].to_numpy()).reshape(-1, 16, 24), array
    )
    assert json.loads(table.schema.metadata[b"shape"]) == [16, 24]
    assert deit(capsys, *words, "--dtype=float16", f"--out={tmp_path / 'h.npy'}", *paths)[0] == 0
    half, _ = rows_of(tmp_path / "h.npy")
    np.testing.assert_array_equal(half, array.astype(np.float16))


def test_what_was_interrupted_is_taken_up(weights, photos, tmp_path, monkeypatch):
    """Killed in the middle of a write: to the same bytes, and what is written is not read again."""
    opened, images = open_model(weights), named_images([str(photos)])
    embed(opened, images, tmp_path / "whole.npy")
    monkeypatch.setattr(inference, "BATCH", 4)  # of each of eight devices
    append, times = feature_file.FeatureFile.append, []

    def dies(self, *values):
        times.append(len(values[0]))
        if len(times) == 3:
            raise KeyboardInterrupt
        append(self, *values)

    out = tmp_path / "part.npy"
    with monkeypatch.context() as patch:
        patch.setattr(feature_file.FeatureFile, "append", dies)
        with pytest.raises(KeyboardInterrupt):
            embed(opened, images, out)
    with (tmp_path / "part.npy.partial").open("ab") as file:
        file.write(b"half a row")
    with pytest.raises(UserError, match=r"begun with other layer; --force begins anew"):
        embed(opened, images, out, layer=0)
    with pytest.raises(UserError, match=r"begun with other images;"):
        embed(opened, named_images([f"{photos}/more"]), out)
    read, original = [], FolderSource.__getitem__
    monkeypatch.setattr(
        FolderSource, "__getitem__", lambda self, i: read.append(i) or original(self, i)
    )
    missing = embed(opened, images, out)
    read.remove(64)  # by which the loader has judged how many threads help
    assert sorted(read) == list(range(64, 150))  # two batches had been written
    assert [os.path.basename(path) for path in missing] == ["051.png", "100.png"]
    (whole, paths), (part, same) = rows_of(tmp_path / "whole.npy"), rows_of(out)
    assert paths == same
    np.testing.assert_allclose(part, whole, atol=1e-6)
    assert not list(tmp_path.glob("*.partial*"))


def test_answers_that_are_not_finite_are_refused(weights, photos, tmp_path):
    opened, images = open_model(weights), named_images([str(photos / "000.png")])
    opened.variables["params"]["norm"]["scale"] = np.full(24, np.nan, np.float32)
    with pytest.raises(UserError, match=r"the answer to .*000\.png is not finite; the weights are"):
        list(predictions(opened, images, 1))
    with pytest.raises(UserError, match="features that are not finite in float32"):
        embed(opened, images, tmp_path / "f.npy")
    opened.variables["params"]["norm"]["scale"] = np.full(24, 1e6, np.float32)
    with pytest.raises(UserError, match=r"not finite in float16; .* too large for it"):
        embed(opened, images, tmp_path / "g.npy", dtype="float16")


def test_what_is_assumed_and_chosen_is_said(photos, tmp_path, capsys):
    """A bare file may be a DeiT's or a ViT's, and may hold an average, or numbers that are none."""
    name = "deit_tiny_patch16_224"
    variables = init_variables(deit_jax.create_model(name, image_size=32), 0)
    plain = {k: v.copy() for k, v in to_torch(variables).items()}
    save_file(plain, tmp_path / "bare.safetensors")
    words = ["predict", f"--weights={tmp_path / 'bare.safetensors'}", photos / "000.png"]
    code, _, err = deit(capsys, *words)
    assert code == 0
    assert "taken for a deit_tiny_patch16_224: mean (0.485" in err
    assert "--model=vit_tiny_patch16_224 takes (0.5, 0.5, 0.5)" in err
    code, _, err = deit(capsys, *words, "--model=vit_tiny_patch16_224")
    assert (code, err) == (0, "")
    plain["norm.weight"][0] = np.nan
    save_file(plain, tmp_path / "bare.safetensors")
    code, _, err = deit(capsys, *words)
    assert code == 1
    assert "1 parameters are not finite, params/norm/scale first: the weights are damaged" in err


def test_names_that_mean_nothing(weights, photos, tmp_path, capsys):
    words = ["predict", f"--weights={weights}", f"--out={tmp_path}/a.parquet", photos / "000.png"]
    code, _, err = deit(capsys, *words)
    assert code == 1
    assert "a.parquet: give it one of .csv, .jsonl, .json, .txt, or say --format=" in err
    with pytest.raises(UserError, match=r"nowhere\.pth: no such file or folder"):
        deit_jax.load(str(tmp_path / "nowhere.pth"))
    with pytest.raises(UserError, match=r"no weights at 'nope'; there is one model; leave ::KEY"):
        deit_jax.load(f"{weights}::nope")

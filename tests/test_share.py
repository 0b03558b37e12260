"""`deit share`: a repository that timm, transformers and we load, and a card that is true."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml

from deit_jax import __main__
from deit_jax.data.decode import Reading
from deit_jax.export import write
from deit_jax.export.choices import Options
from deit_jax.share.card import _teacher, _use, recipe
from deit_jax.share.facts import Facts, without_places
from deit_jax.share.upload import check_name
from deit_jax.weights.convert import convert
from deit_jax.weights.load import open_model
from tests.hub import TOKEN, Hub
from tests.test_convert import DISTILLED, SMALL, assert_same, logits, opened
from tests.timm_reference import import_timm, import_transformers
from tests.tiny import make_tiny_config, train_without_picture

NAME = "me/small-digits"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the workdir of a run whose teacher and data are named by paths of this machine."""
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("secret-place")
    digits = load_digits()
    for i in range(80):
        folder = root / "photos" / f"digit {digits.target[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[i] * 15).astype(np.uint8)
        Image.fromarray(pixels).resize((16, 16)).save(folder / f"{i}.png")
    config = make_tiny_config()
    config.epochs, config.teacher.epochs, config.distill.kind = 1.0, 0.0, "none"
    config.data.source, config.data.eval_fraction = f"folder:{root / 'photos'}", 0.5
    config.data.eval_crop_ratio = 0.8
    train_without_picture(config, root / "run")
    return root / "run"


def share(capsys, *words):
    code = __main__.main(["share", *map(str, words)])
    out = capsys.readouterr()
    return code, out.out, out.err


def header(text):
    """Return the YAML that the hub reads."""
    return yaml.safe_load(text.split("---\n")[1])


def test_a_runs_folder_says_what_is_so_and_nothing_of_this_machine(run, tmp_path, capsys):
    folder = tmp_path / "out"
    words = (run, NAME, "--dry-run", f"--folder={folder}", "--license=cc-by-4.0", "--onnx")
    code, said, told = share(capsys, *words)
    assert code == 0
    assert "--noreport leaves it out" in told
    files = {f.name for f in folder.iterdir()}
    beside = {"model.onnx", "report.html", "results.json", "train_config.json", ".gitattributes"}
    assert files == {"README.md", "config.json", "model.safetensors"} | beside
    assert all(name in said for name in files)
    card, results = (
        (folder / "README.md").read_text(),
        json.loads((run / "results.json").read_text()),
    )
    about = header(card)
    assert about["license"] == "cc-by-4.0"
    assert about["library_name"] == "timm"
    metrics = about["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["value"] == pytest.approx(results["fused"]["top1"], abs=0.005)
    for head, name in (
        ("cls", "class head"),
        ("dist", "distillation head"),
        ("fused", "both heads"),
    ):
        row = f"| {name} | {results[head]['top1']:.2f} | {results[head]['top5']:.2f} |"
        assert row in card
    assert f"On {results['examples']} images of the split" in card
    assert "resized to cover the size / 0.8, the centre taken" in card
    assert "digit 3" in card
    assert "not evaluated" in card
    for file in folder.iterdir():
        content = file.read_bytes()
        assert b"secret-place" not in content, file.name
    config = json.loads((folder / "train_config.json").read_text())
    assert config["data"]["source"] == "folder:…/photos"


def test_what_was_shared_is_loaded_by_timm_transformers_and_here(run, tmp_path, capsys):
    folder = tmp_path / "out"
    assert share(capsys, run, NAME, "--dry-run", f"--folder={folder}", "--noreport")[0] == 0
    assert "license" not in header((folder / "README.md").read_text())
    ours, back = open_model(run), open_model(folder)
    assert (back.classes, back.crop_ratio, back.mean) == (ours.classes, 0.8, ours.mean)
    assert (back.image_size, back.reading.resize) == (16, "crop")
    assert_same(back.variables["params"], ours.variables["params"])
    images, heads = logits(ours.model, ours.variables, 16)
    timm = import_timm()
    transformers = import_transformers()
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ours.classes
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert list(theirs.config.id2label.values()) == ours.classes
    with torch.no_grad():
        for said in (model(pixels), theirs(pixels).logits):
            np.testing.assert_allclose(said.numpy(), heads.fused(), atol=1e-4)


def test_weights_that_nobody_evaluated_are_said_to_be_so(run, tmp_path, capsys):
    """Of a file nothing is known; of a moving average results.json has figures of its own."""
    convert(opened(DISTILLED, SMALL), tmp_path / "w.safetensors")
    words = (tmp_path / "w.safetensors", NAME, "--dry-run", f"--folder={tmp_path / 'a'}")
    assert share(capsys, *words)[0] == 0
    card = (tmp_path / "a" / "README.md").read_text()
    assert "These weights have not been evaluated." in card
    assert "model-index" not in header(card)
    assert "does not say it" in card
    words = (run, NAME, "--dry-run", f"--folder={tmp_path / 'b'}", "--noreport", "--ema")
    assert share(capsys, *words)[0] == 0
    card = (tmp_path / "b" / "README.md").read_text()
    results = json.loads((run / "results.json").read_text())
    assert f"| both heads | {results['ema']['fused']['top1']:.2f} |" in card
    assert "the moving average of the weights" in card
    # Of another checkpoint than the last, results.json says nothing.
    (run / "results.json").rename(tmp_path / "kept.json")
    try:
        words = (run, NAME, "--dry-run", f"--folder={tmp_path / 'c'}", "--noreport")
        assert share(capsys, *words)[0] == 0
        assert (
            "These weights have not been evaluated." in (tmp_path / "c" / "README.md").read_text()
        )
        words = (run, NAME, "--dry-run", f"--folder={tmp_path / 'd'}")
        assert share(capsys, *words)[0] == 0
        card = (tmp_path / "d" / "README.md").read_text()
    finally:
        (tmp_path / "kept.json").rename(run / "results.json")
    assert f"| both heads | {results['fused']['top1']:.2f} |" in card  # the report's


def test_it_goes_to_the_hub_and_comes_back(run, tmp_path):
    hub = Hub()
    environment = dict(
        os.environ,
        HF_ENDPOINT=hub.url,
        HF_TOKEN=TOKEN,
        HF_HOME=str(tmp_path / "home"),
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
    )

    def python(*words, **changes):
        return subprocess.run(
            [sys.executable, *map(str, words)],
            env=environment | changes,
            capture_output=True,
            text=True,
            timeout=200,
        )

    try:
        words = ("-m", "deit_jax", "share", run, NAME, "--noreport", "--private", "--license=mit")
        refused = python(*words, HF_TOKEN="wrong")
        assert refused.returncode == 1
        assert "`hf auth login`" in refused.stderr.strip().splitlines()[-1]
        assert not hub.repositories
        for _ in range(2):  # again is one more commit
            done = python(*words)
            assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{hub.url}/{NAME}: ")
        assert hub.private == {NAME: True}
        files = hub.repositories[NAME]
        assert "secret-place" not in files["README.md"].decode()
        script = f"""
from deit_jax.weights.load import open_model
from deit_jax.analysis.classify import classify
opened = open_model("hf-hub:{NAME}")
print(opened.format, opened.classes[3], opened.crop_ratio)
"""
        back = python("-c", script)
        assert back.stdout.strip() == "timm folder digit 3 0.8", back.stderr
    finally:
        hub.close()


def test_bad_names_and_flags_are_one_line(run, tmp_path, capsys):
    for name in ("small-digits", "me/", "me/a b", "me/a--b", "a/b/c"):
        code, _, line = share(capsys, run, name, "--dry-run")
        assert code == 1
        assert f"{name}: a repository is ORG/NAME" in line
    check_name("timm/deit_small_patch16_224.fb_in1k")
    assert share(capsys, run, NAME, f"--folder={tmp_path}")[0] == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    words = (run, NAME, "--dry-run", f"--folder={tmp_path / 'full'}")
    assert "is not empty" in share(capsys, *words)[2]


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("folder:/home/ann/My Data/photos/", "folder:…/photos"),
        ("/data/secret project/teacher,timm:resnet50", "…/teacher,timm:resnet50"),
        ("gs://bucket/run", "gs://bucket/run"),
        ("folder:gs://bucket/run", "folder:gs://bucket/run"),
        ("hf:uoft-cs/cifar100", "hf:uoft-cs/cifar100"),
        (r"C:\Users\ann\My Data\photos", "…/photos"),
        (r"folder:C:\Users\ann\photos", "folder:…/photos"),
        (r"\\server\share\photos", "…/photos"),
        ("~/photos/cats", "…/cats"),
        ("torch:mine.models:build", "torch:mine.models:build"),
        ("runs/teacher", "runs/teacher"),
        ("see /home/ann/runs: no teacher", "see …/runs: no teacher"),
    ],
)
def test_places_of_this_machine_are_cut_to_their_ends(value, left):
    assert without_places({"a": [value]}, ["/home/ann/runs"]) == {"a": [left]}


def test_a_source_that_is_part_of_the_repositorys_name_stays_in_the_card(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    convert(opened(DISTILLED, SMALL), tmp_path / "me", "timm_folder")
    words = ("me", NAME, "--dry-run", f"--folder={tmp_path / 'out'}")
    assert share(capsys, *words)[0] == 0
    assert f'"hf-hub:{NAME}"' in (tmp_path / "out" / "README.md").read_text()


def test_a_teacher_on_a_tape_is_not_said_to_have_been_trained():
    teacher = {"weights": "", "epochs": 0.0, "model": {"name": "regnety_160"}}
    assert _teacher({"teacher": teacher}) == "a teacher whose answers were on a label tape"
    assert "a regnety_160 that was trained" in _teacher({"teacher": teacher | {"epochs": 2.0}})
    assert _teacher({"teacher": teacher | {"weights": "runs/r160"}}) == "`r160`"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_cards_program_for_onnx_answers_as_predict_does(
    channels, tmp_path, monkeypatch, capsys
):
    """It is run as it stands there, on a photograph taken with a camera held sideways."""
    from PIL import Image

    reading = Reading(exif=True, channels=channels, fill=(0,) * channels)
    first = opened(DISTILLED, SMALL | {"in_channels": channels})
    first = dataclasses.replace(
        first, reading=reading, mean=(0.5,) * channels, std=(0.5,) * channels
    )
    write.export(first, tmp_path / "model.onnx", options=Options(preprocess=True))
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).resize((90, 60))
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    text = _use(Facts(first, ema=False), NAME, onnx=True)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(text.split("```python\n")[-1].split("```")[0], found)
    view = first.view((tmp_path / "photo.jpg").read_bytes(), "photo")
    pixels = ((view[None] / 255 - 0.5) / 0.5).astype(np.float32)
    expected = jax.jit(first.model.apply)(first.variables, pixels).fused()
    assert np.abs(found["logits"] - expected).max() < 0.02 * np.abs(expected).max()
    assert capsys.readouterr().out.strip() == first.classes[int(expected.argmax())]


def test_a_recipe_has_what_differs_and_what_everybody_asks_for():
    from deit_jax.config.serialize import to_json

    config = make_tiny_config()
    found = recipe(to_json(config))
    assert found["epochs"] == 2.0
    assert found["mixing.group_size"] == 8
    assert found["loss.smoothing"] == 0.1  # the default, and yet
    assert not any(re.match(r"train\.|mesh\.", key) for key in found)
    assert "augment.crop_ratio" not in found

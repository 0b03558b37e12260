"""`deit demo`: what its page says, against `deit predict` and attention written out in numpy."""

import dataclasses
import importlib.util
import json
import logging
import re
import shutil
import signal
import sys
from importlib import metadata
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image

import deit_jax
from deit_jax import __main__ as program
from deit_jax.data.sources.registry import open_dataset
from deit_jax.demo import pictures
from deit_jax.demo.examples import write_examples
from deit_jax.demo.models import Model
from deit_jax.demo.session import Session, open_models
from deit_jax.demo.space import open_session, open_space, write_space
from deit_jax.demo.teachers import find_teacher
from deit_jax.errors import UserError
from deit_jax.models import vit
from deit_jax.weights.fit import init_variables
from deit_jax.weights.load import open_model
from tests.demo_server import served, served_app
from tests.tiny import make_tiny_config, save_weights

if importlib.util.find_spec("gradio") is None:  # one that is there and cannot be imported fails
    pytest.skip("Gradio is not installed; the Makefile does so", allow_module_level=True)


@pytest.fixture(scope="module")
def session(digits_run, tmp_path_factory):
    """Return a session on a run with a teacher, and four examples."""
    models, _ = open_models([str(digits_run)])
    folder = tmp_path_factory.mktemp("session")
    return Session(models, 10, folder, write_examples([models[0].opened], 4, folder))


def predicted(capsys, *words):
    code = program.main(["predict", "--json", "--topk=10", *map(str, words)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return [r["predictions"] for r in json.loads(out)["results"]]


def same(said, expected):
    """Compare lists of predictions; the probabilities are those of two programs."""
    assert [p["index"] for p in said] == [p["index"] for p in expected]
    assert [p["class"] for p in said] == [p["class"] for p in expected]
    np.testing.assert_allclose(
        [p["probability"] for p in said], [p["probability"] for p in expected], atol=2e-5
    )


def test_answers_are_those_of_predict(session, digits_run, capsys):
    """The fused answer is the student's, the teacher's that of its own run."""
    files = [session.folder / example.file for example in session.examples]
    student = predicted(capsys, f"--weights={digits_run}", *files)
    teacher = predicted(capsys, f"--weights={digits_run / 'teacher'}", *files)
    for file, fused, teaches in zip(files, student, teacher, strict=True):
        (said,) = session.answer(str(file), 1).json["models"].values()
        assert said.keys() == {"cls", "dist", "fused", "teacher"}
        same(said["fused"], fused)
        same(said["teacher"], teaches)


def test_odd_images_are_read_as_predict_reads_them(digits_run, tmp_path, capsys):
    """A photograph that a camera held upright, 16 bits, a palette with transparency."""
    turned = tmp_path / "turned"
    shutil.copytree(digits_run, turned)
    config = json.loads((turned / "config.json").read_text())
    config["data"]["exif"] = True
    (turned / "config.json").write_text(json.dumps(config))
    rng, exif = np.random.default_rng(2), Image.Exif()
    exif[274] = 6  # turn it a quarter
    pixels = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels).resize((90, 60))
    photo.save(tmp_path / "photo.jpg", exif=exif)
    deep = rng.integers(0, 2**16, (30, 20)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    photo.quantize(16).save(tmp_path / "palette.png", transparency=3)
    files = [tmp_path / name for name in ("photo.jpg", "deep.png", "palette.png")]
    answers = {}
    for run in (digits_run, turned):
        models, _ = open_models([str(run)])
        session = Session(models, 10, tmp_path)
        for file, expected in zip(
            files, predicted(capsys, f"--weights={run}", *files), strict=True
        ):
            (said,) = session.answer(str(file), 1).json["models"].values()
            same(said["fused"], expected)
            answers.setdefault(file.name, []).append(expected)
    assert answers["photo.jpg"][0] != answers["photo.jpg"][1]
    assert answers["deep.png"][0] == answers["deep.png"][1]


def test_examples_are_the_evaluation_data(session):
    config = make_tiny_config()
    source = open_dataset(config.data).eval
    assert len(session.examples) == 4
    for example in session.examples:
        number = int(Path(example.file).stem)
        assert example.truth == str(source[number]["label"])
        pixels = np.asarray(Image.open(session.folder / example.file))
        grey = np.squeeze(source[number]["image"])
        np.testing.assert_array_equal(pixels, np.stack([grey] * 3, axis=-1))


def attention_by_hand(digits_run, file):
    """Return [depth heads N N] from the weights, with numpy alone after the embedding."""
    model, params, spec = deit_jax.load(str(digits_run), return_spec=True)
    images = jnp.asarray(deit_jax.preprocess([str(file)], spec))
    _, caught = model.apply(
        {"params": params},
        images,
        train=False,
        capture_intermediates=lambda module, _: isinstance(module, vit.Block),
        mutable=["intermediates"],
    )
    patches = np.asarray(images, np.float64)[0].reshape(4, 4, 4, 4, 3).swapaxes(1, 2)
    kernel = np.asarray(params["patch_embed"]["proj"]["kernel"], np.float64)
    x = np.einsum("ijhwc,hwcd->ijd", patches, kernel).reshape(16, -1)
    x = x + params["patch_embed"]["proj"]["bias"]
    x = np.concatenate([params["cls_token"][0], params["dist_token"][0], x])
    x = x + np.asarray(params["pos_embed"][0], np.float64)
    maps = []
    for i in range(model.depth):
        block = params[f"blocks_{i}"]
        norm = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        norm = norm * block["norm1"]["scale"] + block["norm1"]["bias"]
        qkv = norm @ np.asarray(block["attn"]["qkv"]["kernel"]) + block["attn"]["qkv"]["bias"]
        q, k, _ = qkv.reshape(len(x), 3, model.num_heads, -1).transpose(1, 2, 0, 3)
        powers = np.exp(q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5)
        maps.append(powers / powers.sum(-1, keepdims=True))
        x = np.asarray(caught["intermediates"][f"blocks_{i}"]["__call__"][0][0], np.float64)
    return np.stack(maps), x


def test_attention_is_that_of_the_weights(session, digits_run):
    file = session.folder / session.examples[1].file
    (look,) = session._looks(str(file))
    maps, last = attention_by_hand(digits_run, file)
    heads = maps[:, :, :2, 2:].reshape(2, 3, 2, 4, 4)
    np.testing.assert_allclose(look.heads, heads, atol=1e-5)
    mixed = np.eye(18)
    for layer in maps:
        mixed = (0.5 * layer.mean(0) + 0.5 * np.eye(18)) @ mixed
    np.testing.assert_allclose(look.rollout, mixed[:2, 2:].reshape(2, 4, 4), atol=1e-5)
    cosine = last[0] @ last[1] / np.linalg.norm(last[0]) / np.linalg.norm(last[1])
    assert look.cosine == pytest.approx(cosine, abs=1e-4)
    html = session.answer(str(file), 1).html
    assert f"leave the last block with a cosine of {cosine:.2f}" in html
    assert html.count("<img") == 1 + 3 + 2 * 3  # the image, rollout, each head of both tokens


def test_disagreement_of_maps():
    first, second = np.array([[3.0, 1.0]]), np.array([[1.0, 1.0]])
    assert pictures.overlap(first, second) == pytest.approx(0.75)
    assert pictures.cosine(first, second) == pytest.approx(4 / 20**0.5)
    assert pictures.largest_difference(first, second) == pytest.approx(0.25)
    picture = pictures.difference(first, second)
    np.testing.assert_array_equal(picture[0, :, :3], [pictures.CLASS, pictures.DISTILLATION])
    np.testing.assert_array_equal(picture[0, :, 3], [235, 235])
    np.testing.assert_array_equal(pictures.difference(first, first)[..., 3], 0)


def test_where_heads_and_teacher_differ_is_said(session, digits_run):
    """Against the logits of the model itself, on all that is said of forty examples."""
    model, params, spec = deit_jax.load(str(digits_run), return_spec=True)
    (folder,) = {session.folder}
    models, _ = open_models([str(digits_run)])
    many = Session(
        models, 3, folder / "many", write_examples([models[0].opened], 40, folder / "many")
    )
    files = [str(many.folder / example.file) for example in many.examples]
    heads = model.apply({"params": params}, jnp.asarray(deit_jax.preprocess(files, spec)))
    cls, dist, fused = (np.asarray(x).argmax(1) for x in (*heads, heads.fused()))
    assert 0 < (cls != dist).sum() < 40
    for row, file in enumerate(files):
        said = re.sub(
            "<[^>]+>", "", re.search('<p class="verdict.*?</p>', many.answer(file, 1).html)[0]
        )
        if cls[row] == dist[row]:
            assert said.startswith(f"Both heads say {cls[row]}.")
        else:
            found = re.match(
                r"The heads differ: the class head says (\d) \(.*?\), the distillation head (\d) "
                r"\(.*?\), together they say (\d)\.",
                said,
            )
            assert [int(n) for n in found.groups()] == [cls[row], dist[row], fused[row]]
        right = many.examples[row].truth == str(fused[row])
        assert said.endswith("so that is right." if right else "so that is wrong.")


def test_what_a_model_lacks_is_said(tmp_path, digits_run):
    """A plain transformer has one token, a convnet none; both stand beside a distilled one."""
    known = {"classes": list("0123456789"), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    known["crop_ratio"] = 1.0
    name = "deit_tiny_patch16_224"
    model = deit_jax.create_model(name, 10, image_size=24, patch_size=8, width=24, depth=3)
    plain = tmp_path / "plain.safetensors"
    save_weights(plain, name, model, init_variables(model, 0), **known)
    image = tmp_path / "photo.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(image)
    models, _ = open_models([str(digits_run), str(plain), str(digits_run / "teacher")])
    answer = Session(models, 3, tmp_path).answer(str(image), 3)
    assert answer.html.count("<section") == 3
    assert "no distillation token: there is one answer" in answer.html
    assert "a convnet: it has no tokens" in answer.html
    assert "Each head of block 3 of 3" in answer.html
    assert "Each head of block 2 of 2" in answer.html  # the last of one that has fewer
    assert answer.html.count("both heads together") == 1
    assert list(answer.json["models"]) == ["student", "plain.safetensors", "teacher"]
    with pytest.raises(UserError, match=r"--weights: a is given twice"):
        open_models(["a", "a"])


def test_a_teacher_by_its_name(tmp_path, digits_run, capsys):
    """Any weights that know the classes, here in another order and at a size of their own."""
    opened = open_model(digits_run)
    models, _ = open_models([str(digits_run)], teacher=str(digits_run / "teacher"))
    assert models[0].teacher_name == "teacher"
    names = [f"{i}" for i in range(10)]
    name, fields = "deit_tiny_patch16_224", {"image_size": 32, "patch_size": 8, "width": 24}
    model = deit_jax.create_model(name, 10, depth=2, **fields)
    told = {"mean": (0.4,) * 3, "std": (0.3,) * 3, "crop_ratio": 1.0}
    path = tmp_path / "turned.safetensors"
    save_weights(path, name, model, init_variables(model, 3), classes=names[::-1], **told)
    models, (found,) = open_models([str(digits_run)], teacher=str(path))
    assert found.spec.image_size == 32
    image = tmp_path / "white.png"
    Image.new("RGB", (32, 32), (250, 200, 10)).save(image)  # the same at any size
    (said,) = Session(models, 10, tmp_path).answer(str(image), 1).json["models"].values()
    (expected,) = predicted(capsys, f"--weights={path}", image)
    assert [p["class"] for p in said["teacher"]] == [p["class"] for p in expected]
    few = deit_jax.create_model(name, 5, depth=2, **fields)
    wrong = tmp_path / "wrong.safetensors"
    save_weights(wrong, name, few, init_variables(few, 3), classes=names[:5], **told)
    with pytest.raises(UserError, match=rf"--teacher={wrong}: the teacher knows 5 classes"):
        open_models([str(digits_run)], teacher=str(wrong))
    assert opened.classes == names


def test_several_labels_have_probabilities_of_their_own(tmp_path):
    name = "deit_tiny_patch16_224"
    model = deit_jax.create_model(name, 3, image_size=16, patch_size=8, width=24, depth=1)
    variables = init_variables(model, 0)
    variables["params"]["head"]["bias"] = np.array([2.0, 1.0, -3.0], np.float32)
    told = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_ratio": 1.0, "multi_label": True}
    path = tmp_path / "w.safetensors"
    save_weights(path, name, model, variables, classes=["sun", "sea", "<b>"], **told)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    models, _ = open_models([str(path)])
    answer = Session(models, 3, tmp_path).answer(str(tmp_path / "a.png"), 1)
    assert "It says <b>sun, sea</b>" in answer.html
    assert "&lt;b&gt;" in answer.html
    said = [p["probability"] for p in answer.json["models"]["w.safetensors"]["cls"]]
    assert said == pytest.approx([1 / (1 + np.exp(-x)) for x in (2, 1, -3)], abs=0.05)


def test_what_is_missing_is_said(digits_run, tmp_path, monkeypatch, capsys, caplog):
    """Gradio, a teacher, the data of a run."""
    logger = logging.getLogger("deit_jax")  # which commands before have sent to their own stderr
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    moved = tmp_path / "moved"
    shutil.copytree(digits_run, moved)
    shutil.rmtree(moved / "teacher")
    config = json.loads((moved / "config.json").read_text())
    config["data"]["source"] = "folder:/nowhere"
    (moved / "config.json").write_text(json.dumps(config))
    models, _ = open_models([str(moved)])
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    answer = Session(models, 3, tmp_path).answer(str(tmp_path / "a.png"), 99)
    assert "No teacher: " in answer.html
    assert "--teacher=… names another" in answer.html
    assert "Each head of block 2 of 2" in answer.html
    caplog.clear()
    assert write_examples([models[0].opened], 3, tmp_path) == []
    assert f"no examples from {moved}: " in caplog.text
    assert "/nowhere" in caplog.text
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert program.main(["demo", f"--weights={moved}"]) == 1
    line = "deit demo: the page needs gradio: pip install 'deit_jax[demo]'\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("cut.png", lambda file: file[: len(file) // 2], "cut.png: not a readable image ("),
        (
            "text.jpg",
            lambda file: b"no image",
            "text.jpg: not a readable image (of no known format)",
        ),
        ("<i>.png", lambda file: b"", "<i>.png: not a readable image"),
    ],
)
def test_what_cannot_be_read_is_one_line(session, tmp_path, name, data, line):
    whole = (session.folder / session.examples[0].file).read_bytes()
    (tmp_path / name).write_bytes(data(whole))
    answer = session.answer(str(tmp_path / name), 1)
    assert answer.error.startswith(line)
    assert "\n" not in answer.error
    assert answer.json == {}
    assert line.replace("<", "&lt;").replace(">", "&gt;") in answer.html


def test_a_bomb_is_refused(session, tmp_path):
    """200 million pixels in a file of 200 kB."""
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 200_000
    answer = session.answer(str(tmp_path / "bomb.png"), 1)
    assert re.match(r"bomb\.png: not a readable image \(.*200000000 pixels", answer.error)


def test_weights_that_are_damaged_are_told_of(digits_run, session, tmp_path):
    opened = open_model(digits_run)
    opened.variables["params"]["norm"]["scale"] = np.full(48, np.nan, np.float32)
    damaged = Session([Model(opened, "mine")], 3, tmp_path)
    answer = damaged.answer(str(session.folder / session.examples[0].file), 1)
    assert answer.error.endswith(".png: mine's answer is not finite; the weights are damaged")


def test_the_page_is_served_and_nobody_else_is_told(session, digits_run, tmp_path, capsys):
    """By HTTP; a port that is taken is one line, and Ctrl-C the end."""
    words = ["demo", f"--weights={digits_run}", "--port=0", "--examples=2"]
    file = session.folder / session.examples[2].file
    with served(tmp_path, *words) as page:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", page.address)
        html, _, said = page.look(file, 2)
        assert "Each head of block 2 of 2" in html
        (expected,) = predicted(capsys, f"--weights={digits_run}", file)
        same(said["models"]["student"]["fused"], expected[:5])
        port = page.address.rpartition(":")[2]
        assert program.main(["demo", "--weights=nowhere", f"--port={port}"]) == 1
        line = f"deit demo: --host=127.0.0.1 --port={port}: cannot be served at ("
        assert capsys.readouterr().err.startswith(line)
        page.process.send_signal(signal.SIGINT)
        assert page.process.wait(30) == 0
        assert page.asked == ""


@pytest.mark.slow
def test_a_space_answers_as_the_command_does(session, digits_run, tmp_path, capsys):
    """Run app.py where the run is not, with images that are read in another way than usual."""
    opened = open_model(digits_run)
    read = dataclasses.replace(opened.reading, resize="pad", fill=(9, 9, 9), exif=True)
    found = find_teacher(opened, "")[0]
    model = Model(dataclasses.replace(opened, reading=read), "mine", found.loaded, "big one")
    folder = tmp_path / "space"
    assert write_space(str(folder), [model], [found], 4, 3) == folder
    assert sorted(path.name for path in folder.iterdir()) == [
        *(".gitattributes", "README.md", "app.py", "demo.json", "examples", "model.safetensors"),
        *("requirements.txt", "teacher.safetensors", "thumbnails"),
    ]
    header = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert header["sdk"] == "gradio"
    assert header["app_file"] == "app.py"
    assert header["sdk_version"] == metadata.version("gradio")
    assert (folder / "requirements.txt").read_text() == f"deit_jax[demo]=={deit_jax.__version__}\n"
    photo = tmp_path / "oblong.png"
    Image.fromarray(np.arange(40 * 20 * 3, dtype=np.uint8).reshape(40, 20, 3)).save(photo)
    expected = Session([model], 4, tmp_path).answer(str(photo), 1)
    with served_app(tmp_path, folder) as page:
        html, _, said = page.look(photo, 1)
        assert page.asked == ""
    assert said["models"].keys() == {"mine"}
    for who in ("cls", "dist", "fused", "teacher"):
        same(said["models"]["mine"][who], expected.json["models"]["mine"][who])
    assert "teacher: big one" in html
    words = ["demo", f"--weights={digits_run}", f"--space={folder}"]
    assert program.main(words) == 1
    assert f"--space={folder}: is not empty" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no demo\.json; `deit demo"):
        open_space(tmp_path)


def test_any_teacher_goes_into_a_space(digits_run, tmp_path):
    """One that is no weights of ours, as a teacher folder."""
    teacher = deit_jax.Teacher(
        apply=lambda params, images: images.mean((1, 2)) @ params["w"],
        params={"w": np.ones((3, 10), np.float32) * np.arange(10)},
        classes=list("0123456789"),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    deit_jax.write_teacher(teacher, tmp_path / "teacher")
    models, found = open_models([str(digits_run)], teacher=str(tmp_path / "teacher"))
    write_space(str(tmp_path / "space"), models, found, 10, 0)
    Image.new("RGB", (16, 16), (51, 102, 0)).save(tmp_path / "a.png")
    session = open_session(tmp_path / "space")
    (said,) = session.answer(str(tmp_path / "a.png"), 1).json["models"].values()
    powers = np.exp(0.6 * np.arange(10))  # the channels are 0.2, 0.4 and 0
    assert [p["index"] for p in said["teacher"]] == list(range(10))[::-1]
    np.testing.assert_allclose(
        [p["probability"] for p in said["teacher"]], (powers / powers.sum())[::-1], rtol=1e-4
    )

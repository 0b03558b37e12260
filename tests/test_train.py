"""Whole runs: resume to the same bits, files, refusals."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from deit_jax.analysis import classify, evaluate
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.storage import read_lines
from deit_jax.train import experiment, loop
from deit_jax.train import run as run_lib
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.run import train
from deit_jax.workdir import checkpoints
from deit_jax.workdir.saved_run import _restore_on_host, load_run
from tests.tiny import make_tiny_config, resolved


def final_state(workdir):
    return load_run(workdir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Train once, with mixing, drop-path, erasing, repeats, RandAugment, EMA and distillation."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    config = make_tiny_config()
    config.model.drop_path = 0.2
    config.train.save_every_epochs = 0.2  # every step
    config.train.keep_checkpoints = 100
    results = train(config, workdir)
    return config, workdir, results


def test_run_leaves_its_files(finished):
    config, workdir, results = finished
    saved = json.loads((workdir / "results.json").read_text())
    assert saved == results
    assert saved["examples"] == 1618
    for part in ("cls", "dist", "fused", "teacher"):
        assert 0 <= saved[part]["top1"] <= saved[part]["top5"] <= 100
    assert set(saved["ema"]) == {"cls", "dist", "fused"}
    assert (workdir / "picture.png").read_bytes().startswith(b"\x89PNG")
    records = read_lines(workdir / "metrics.jsonl")
    steps = [r["step"] for r in records if "loss" in r]
    assert steps == list(range(1, 11))
    first = records[0]
    mean = (first["loss_label"] + first["loss_teacher"]) / 2
    assert first["loss"] == pytest.approx(mean, rel=1e-5)
    assert first["lr"] == pytest.approx(config.optim.warmup_lr)
    rates = read_lines(workdir / "timing.jsonl")
    assert all(r["images_per_second"] > 0 and 0 <= r["input_wait"] <= 1 for r in rates)
    assert list((workdir / "tensorboard").glob("events*"))


def test_checkpoint_holds_nothing_of_the_teacher(finished):
    _, workdir, _ = finished
    state = _restore_on_host(workdir / "checkpoints")
    assert not state["batch_stats"]  # the student's own: a transformer has none
    student = sum(x.size for x in jax.tree.leaves(state["params"]))
    directory = sorted((workdir / "checkpoints").iterdir(), key=lambda p: p.name)[-1]
    assert "teacher" not in "".join(p.name for p in directory.rglob("*"))
    assert student < 20_000


@pytest.mark.parametrize("stop", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 9))])
def test_stopped_and_resumed_run_ends_with_the_same_bits(finished, tmp_path, stop, monkeypatch):
    monkeypatch.setattr(run_lib, "_draw", lambda trainer, results: None)
    config, whole, _ = finished
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    (resumed / "results.json").unlink()
    for step in range(stop + 1, 11):  # as if it had been killed after saving step `stop`
        shutil.rmtree(resumed / "checkpoints" / str(step))
    train(config, resumed)
    a, b = (final_state(d) for d in (whole, resumed))
    assert b.step == 10
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
    jax.tree.map(np.testing.assert_array_equal, a.ema, b.ema)
    texts = [(d / "metrics.jsonl").read_text() for d in (whole, resumed)]
    assert texts[0] == texts[1]
    assert (resumed / "results.json").read_text() == (whole / "results.json").read_text()


def test_optimizer_state_is_restored_exactly(finished, tmp_path):
    """A resumed optimizer with zeroed moments would end elsewhere; compare them directly."""
    config, whole, _ = finished
    dataset = open_dataset(config.data)
    made = resolved(config, dataset)
    teacher = load_teacher(made.teacher, str(whole / "teacher"), dataset.classes)
    trainer = loop.Trainer(made, whole, dataset, teacher)
    moments = [np.abs(x).max() for x in jax.tree.leaves(trainer.state.opt_state) if x.ndim]
    assert min(moments) > 0
    assert int(trainer.state.step) == 10
    trainer.checkpointer.close()


def test_a_finished_run_is_not_trained_again(finished, capsys):
    config, workdir, results = finished
    before = (workdir / "metrics.jsonl").stat().st_mtime_ns
    assert train(config, workdir) == results
    assert (workdir / "metrics.jsonl").stat().st_mtime_ns == before


def test_another_config_in_the_same_workdir_is_refused_with_the_difference(finished):
    config, workdir, _ = finished
    other = config.copy_and_resolve_references()
    other.optim.lr, other.epochs = 0.5, 3.0
    with pytest.raises(UserError, match=r"epochs: 2.0 -> 3.0; optim.lr: 0.001 -> 0.5"):
        train(other, workdir)
    harmless = config.copy_and_resolve_references()
    harmless.train.log_every_steps, harmless.data.threads = 7, 1
    train(harmless, workdir)


def test_evaluating_the_run_gives_its_results(finished):
    config, workdir, results = finished
    again = evaluate.open_evaluation(config, str(workdir)).results()
    assert again == results


def test_evaluation_counts_what_numpy_counts(finished):
    """Recompute top-1 and top-5 of every head from logits, image by image."""
    from deit_jax.data import decode
    from deit_jax.data.sources.registry import open_dataset
    from deit_jax.models.preprocess import normalise

    config, workdir, results = finished
    run = final_state(workdir)
    held = open_dataset(config.data).eval
    images = np.stack(
        [
            np.asarray(decode.centre_crop(decode.decode(held[i]["image"], ""), 16, 1.0))
            for i in range(len(held))
        ]
    )
    labels = np.array([held[i]["label"] for i in range(len(held))])
    normalised = normalise(jnp.asarray(images), config.data.mean, config.data.std)
    heads = jax.jit(run.model.apply)(run.variables, normalised)
    for name, logits in (("cls", heads.cls), ("dist", heads.dist), ("fused", heads.fused())):
        order = np.argsort(-np.asarray(logits), axis=1)
        for k in (1, 5):
            percent = 100 * (order[:, :k] == labels[:, None]).any(1).mean()
            assert results[name][f"top{k}"] == pytest.approx(percent, abs=0.07)  # one tie at most


def test_predict_names_the_classes_of_image_files(finished, tmp_path):
    from PIL import Image
    from sklearn.datasets import load_digits

    _, workdir, _ = finished
    paths = []
    for i in range(3):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray((load_digits().images[i] * 15).astype(np.uint8)).save(paths[-1])
    results = classify.classify(str(workdir), paths, topk=3)
    assert [r["image"] for r in results] == paths
    for result in results:
        probabilities = [p["probability"] for p in result["predictions"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert all(p["class"] == str(p["index"]) for p in result["predictions"])
        assert len(probabilities) == 3
        assert sum(probabilities) <= 1.0


def test_the_latest_checkpoints_and_the_best_are_kept(tiny_config, tmp_path):
    saver = checkpoints.Checkpointer(tmp_path, keep=2)
    for step, top1 in enumerate([10.0, 90.0, None, 50.0, None, None], start=1):
        saver.save(step, {"x": np.float32(step)}, top1)
    saver.close()
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
    assert kept == {2, 5, 6}


@pytest.mark.slow
def test_plain_training_of_a_convnet_and_class_token_distillation(tiny_config, tmp_path):
    """Table 3's single-token rows: no distillation token, the class token takes the teacher."""
    c = tiny_config
    c.epochs, c.model.name, c.model.depth = 1.0, "deit_tiny_patch16_224", 1
    for kind in ("soft", "hard"):
        c.distill.kind = kind
        results = train(c, tmp_path / kind)
        assert "dist" not in results
        assert results["teacher"]["top5"] > 0
        c.teacher.weights = str(tmp_path / "soft" / "teacher")


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config, tmp_path, monkeypatch):
    # Such a rate is refused at the start; what stops a run that got one is what this is about.
    monkeypatch.setattr(experiment, "validate", lambda config, devices: None)
    tiny_config.optim.lr, tiny_config.optim.warmup_epochs = 1e30, 0.0
    tiny_config.distill.kind, tiny_config.train.max_bad_steps = "none", 2
    tiny_config.model.depth = 1
    with pytest.raises(UserError, match=r"is (nan|inf) at step"):
        train(tiny_config, tmp_path / "run")


@pytest.mark.slow
def test_distilled_fine_tuning_at_another_resolution(finished, tmp_path, caplog, torch):
    """What the reference refuses: the student resized, the teacher at the target resolution."""
    interpolate = torch.nn.functional.interpolate
    config, workdir, _ = finished
    c = config.copy_and_resolve_references()
    c.init.weights, c.teacher.weights = str(workdir), str(workdir / "teacher")
    c.model.image_size, c.epochs = 24, 1.0
    c.optim.lr = c.optim.warmup_lr = c.optim.min_lr = 0.0  # the weights stay: look at the start
    with caplog.at_level("INFO", "deit_jax"):
        results = train(c, tmp_path / "fine")
    assert "4x4" in caplog.text
    assert "6x6" in caplog.text
    (event,) = [e for e in read_lines(tmp_path / "fine/history.jsonl") if e["event"] == "init"]
    assert event["notes"] == ["position embedding resized from 4x4 to 6x6"]
    assert results["dist"]["top5"] > 0
    old, new = (load_run(d).variables["params"] for d in (workdir, tmp_path / "fine"))
    np.testing.assert_array_equal(old["head_dist"]["kernel"], new["head_dist"]["kernel"])
    grid = old["pos_embed"][:, 2:].reshape(1, 4, 4, -1).transpose(0, 3, 1, 2)
    resized = interpolate(torch.tensor(grid), (6, 6), mode="bicubic", align_corners=False).numpy()
    expected = resized.transpose(0, 2, 3, 1).reshape(1, 36, -1)
    np.testing.assert_allclose(new["pos_embed"][:, 2:], expected, atol=1e-5)


def test_a_config_that_fine_tunes_asks_for_weights(tiny_config, tmp_path):
    tiny_config.init.required = True
    with pytest.raises(UserError, match=r"config.init.weights=''.*starts from trained weights"):
        train(tiny_config, tmp_path / "run")
    tiny_config.init.weights = "/nowhere"
    with pytest.raises(UserError, match="/nowhere"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_unreadable_images_are_skipped_and_counted(tiny_config, tmp_path, caplog):
    """One of 24 files is no image: the metrics count it, and the log names it once."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 4)):
        for i in range(count):
            path = tmp_path / "images" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(path)
    (tmp_path / "images" / "train" / "a" / "6.png").write_bytes(b"not an image")
    c = tiny_config
    c.data.source, c.data.skip_unreadable = f"folder:{tmp_path / 'images'}", True
    c.data.train_split, c.data.eval_split = "train", "val"
    c.distill.kind, c.epochs, c.batch_size, c.train.eval_batch_size = "none", 4.0, 24, 8
    c.model.depth = 1
    with caplog.at_level(logging.WARNING, logger="deit_jax"):
        train(c, tmp_path / "run")
    rates = read_lines(tmp_path / "run" / "timing.jsonl")
    assert rates[-1]["unreadable_images"] == 1
    named = [r.message for r in caplog.records if "another image stands in" in r.message]
    assert len(named) == 1
    assert "6.png" in named[0]
    c.data.skip_unreadable = False
    with pytest.raises(UserError, match=r"6\.png"):
        train(c, tmp_path / "other")

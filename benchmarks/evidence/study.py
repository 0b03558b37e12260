"""What the tables of the evidence share: data, students, teachers, and runs that are kept.

The data is Fashion-MNIST (Debian's `dataset-fashion-mnist`, or its four idx files in --data). The
students are a DeiT-Ti made small, with the paper's recipe but for what a scale names; only the
seed differs between the runs of an arm, and arms differ in what their row says. A run is known by
its arm and seed and shared by the tables; one that is finished is not trained again, one that was
stopped goes on. benchmarks/results/evidence/ has what was measured, render.py makes docs of it.
"""

import argparse
import dataclasses
import datetime
import gzip
import json
import os
import platform
import sys
from pathlib import Path

# A run's last bits must not depend on how many cores are free, and two tables may run at a time.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # for configs, wherever this is started

import jax  # noqa: E402
import numpy as np  # noqa: E402
import portalocker  # noqa: E402
from scales import SCALES, Scale  # noqa: E402

from deit_jax.cli import compile_cache, huge_pages, platforms  # noqa: E402
from deit_jax.configs import base, deit, teacher  # noqa: E402
from deit_jax.data.loader import usable_cores  # noqa: E402
from deit_jax.data.sources.registry import open_dataset  # noqa: E402
from deit_jax.errors import UserError  # noqa: E402
from deit_jax.train import run as run_lib  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "evidence"
DATA = "fashion_mnist"


SIZES = ("small-convnet", "convnet", "large-convnet")
# Of a teacher's epochs, those that make the small convnet as good as the long transformer: 76.27
# and 76.42 %. Of seven lengths from 17 to 20 epochs this came nearest, before a student was taught.
MATCHED = 0.875


@dataclasses.dataclass(frozen=True)
class Arm:
    """The runs of a row: changes to the student's config, the name of its teacher, other arms.

    A run starts from the weights of `start` and learns from the label tape of `tape`, same seed.
    """

    name: str
    changes: dict = dataclasses.field(default_factory=dict)
    teacher: str = ""
    start: "Arm | None" = None
    tape: "Arm | None" = None


PLAIN = {"model.name": "deit_tiny_patch16_224", "distill.kind": "none"}
NONE = Arm("none", PLAIN)
SOFT = Arm(
    "soft",
    {**PLAIN, "distill.kind": "soft", "distill.alpha": 0.1, "distill.tau": 3.0},
    teacher="convnet",
)
HARD = Arm("hard", {**PLAIN, "distill.kind": "hard"}, teacher="convnet")
TOKEN = Arm("token", {"distill.kind": "hard"}, teacher="convnet")
TWO_CLASS_TOKENS = Arm("two-class-tokens", {"distill.kind": "none", "loss.heads": "both"})


def of_length(times: float) -> tuple[Arm, Arm]:
    """Return token and hard distillation at so many times the epochs.

    The token's run records what the teacher says of its views, which are those of every run of the
    same seed; hard distillation learns from that tape.
    """
    name, length = f"{times:g}x", {"epochs": times}
    token = Arm(f"token-{name}", TOKEN.changes | length | {"teacher.tape": "record"}, TOKEN.teacher)
    hard = Arm(f"hard-{name}", HARD.changes | length | {"teacher.tape": "replay"}, tape=token)
    return token, hard


NONE_LONG = Arm("none-3x", NONE.changes | {"epochs": 3.0})
TOKEN_LONG, HARD_LONG = of_length(3.0)


def student_config(scale: Scale, data: Path):
    """Return the distilled student with the paper's recipe, at a scale."""
    c = deit.get_config("variant=tiny,distilled=True")
    c.data.source, c.data.dir = DATA, str(data)
    c.data.eval_crop_ratio, c.data.threads = 1.0, 1
    c.model.image_size, c.model.patch_size = 32, scale.patch
    c.model.width, c.model.depth, c.model.num_heads = scale.width, scale.depth, scale.heads
    c.augment.crop = "simple"  # as the reference does where the input has 32 pixels or fewer
    c.batch_size, c.epochs, c.optim.lr = scale.batch, scale.epochs, scale.lr
    c.mixing.group_size = min(64, scale.batch)
    return c


def teacher_config(name: str, scale: Scale, data: Path):
    """Return the config of a teacher: the students' recipe but for mixup and cutmix.

    With them it would be little better than its students after so few steps.
    """
    c = student_config(scale, data)
    c.mixing.prob = 0.0
    if name.endswith("transformer"):
        width, depth, longer = scale.transformer
        longer *= 3.0 if name == "long-transformer" else 1.0
        c.model = base.get_model_config("deit_tiny_patch16_224")
        c.model.image_size, c.model.patch_size = 32, scale.patch
        c.model.width, c.model.depth, c.model.num_heads = width, depth, 4
        c.distill.kind, c.epochs = "none", scale.teacher_epochs * longer
    else:
        matched = name == "matched-convnet"
        size = SIZES.index("small-convnet" if matched else name)
        own = teacher.get_config("variant=002")
        c.model, c.optim, c.model.image_size = own.model, own.optim, 32
        c.model.widths, c.model.depths = scale.convnets[size]
        # One group: XLA's grouped convolutions are slow on a CPU.
        c.model.group_width, c.model.stem_width = c.model.widths[-1], 16
        c.optim.lr = 0.1 * scale.batch / 128
        c.distill.kind, c.epochs = "none", scale.teacher_epochs * (MATCHED if matched else 1.0)
    return c


def finish(config, images: int, seed: int):
    """Return a config whose warm-up and averaging take the paper's share of the training."""
    steps = config.epochs * images / config.batch_size
    config.seed = seed
    config.optim.warmup_epochs = config.epochs * 5 / 300
    if config.optim.ema_decay:  # 0.99996 remembers a fifteenth of the paper's 375 300 steps
        config.optim.ema_decay = 1 - min(0.5, 15 / steps)
    config.train.eval_every_epochs = config.train.save_every_epochs = config.epochs
    config.train.keep_checkpoints, config.train.eval_batch_size = 1, 512
    config.train.log_every_steps = 20
    return config


def subset(scale: Scale, source: str, folder: Path) -> Path:
    """Write as many images of every class, the first by a fixed shuffle, and the whole test set."""
    files = {
        f"{part}-{kind}": folder / f"{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    }
    data = base.get_config().data
    data.source, data.dir = DATA, source
    dataset = open_dataset(data)
    labels = dataset.train.labels
    shuffled = np.random.default_rng(0).permutation(len(labels))
    each = (scale.images or len(labels)) // len(dataset.classes)
    chosen = [shuffled[labels[shuffled] == k][:each] for k in range(len(dataset.classes))]
    chosen = np.sort(np.concatenate(chosen))
    if not all(path.exists() for path in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        images = np.stack([dataset.train[int(i)]["image"] for i in chosen])
        test = np.stack([dataset.eval[i]["image"] for i in range(len(dataset.eval))])
        write_idx(files["train-images-idx3"], images)
        write_idx(files["train-labels-idx1"], labels[chosen])
        write_idx(files["t10k-images-idx3"], test)
        write_idx(files["t10k-labels-idx1"], dataset.eval.labels)
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write bytes as MNIST's files are: a magic number, the sizes, the values."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    temporary = path.with_suffix(".tmp")
    with gzip.open(temporary, "wb", compresslevel=1) as file:
        file.write(head + array.astype(np.uint8).tobytes())
    temporary.replace(path)


class Study:
    """The runs of one table at one scale, and the file of what they measured."""

    def __init__(self, table: str, expectation: str, description: str, seeds: int = 0):
        options = _options(description)
        platforms.choose()
        huge_pages.restart()
        self.table, self.name = table, options.scale
        self.scale = SCALES[options.scale]
        if options.epochs:
            self.scale = dataclasses.replace(self.scale, epochs=options.epochs)
        if seeds and options.scale == "cpu":  # a table may ask for more
            self.scale = dataclasses.replace(self.scale, seeds=seeds)
        self.seeds = options.only or range(options.seeds or self.scale.seeds)
        self.runs = Path(options.runs) / options.scale
        self.data = subset(self.scale, options.data, self.runs / "data")
        self.images = self.scale.images or 60_000
        self.out = options.out
        self.file = Path(options.out or RESULTS) / f"{table}-{options.scale}.json"
        self.head = {
            "table": table,
            "expectation": expectation,
            "scale": {"name": options.scale, **dataclasses.asdict(self.scale)},
        }
        compile_cache.enable()

    def run(self, arms, measure=None) -> None:
        """Train what is missing, all arms of one seed after the other, and keep what it gave.

        `measure(study, arm, seed)` returns more figures of a finished run.
        """
        for seed in self.seeds:
            for arm in arms:
                if str(seed) in self.known(arm)["seeds"]:
                    continue
                results = self.train(arm, seed)
                values = {k: v["top1"] for k, v in results.items() if "top1" in _dict(v)}
                values["ema"] = {k: v["top1"] for k, v in _dict(results.get("ema")).items()}
                values |= measure(self, arm, seed) if measure else {}
                self.write(arm, seed, {**values, **conditions()})
        print(f"results: {self.file}")

    def known(self, arm: Arm) -> dict:
        """Return what is written of an arm, its row's settings as they are now."""
        found = json.loads(self.file.read_text())["arms"] if self.file.exists() else {}
        changes = {k: v for k, v in arm.changes.items() if k != "data.dir"}
        start = arm.start.name if arm.start else ""
        return found.get(arm.name, {"seeds": {}}) | {
            "changes": changes,
            "teacher": arm.teacher,
            "start": start,
            "tape": arm.tape.name if arm.tape else "",
        }

    def write(self, arm: Arm, seed: int, values: dict) -> None:
        """Add a run to the results file, whole or not at all; another process may be at it too."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with portalocker.Lock(self.runs / f"{self.table}.lock", timeout=60):
            arms = json.loads(self.file.read_text())["arms"] if self.file.exists() else {}
            done = self.known(arm)
            seeds = done["seeds"] | {str(seed): values}
            arms[arm.name] = done | {"seeds": {s: seeds[s] for s in sorted(seeds, key=int)}}
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"arms": arms, **self.head}, indent=1) + "\n")
            temporary.replace(self.file)

    def workdir(self, name: str, seed: int) -> Path:
        """Return where a run is kept."""
        return self.runs / f"{name}-{seed}"

    def teacher(self, name: str) -> Path:
        """Train a teacher, unless it is there; every student of every table has the same one."""
        workdir = self.workdir(f"teacher-{name}", 0)
        train_once(finish(teacher_config(name, self.scale, self.data), self.images, 0), workdir)
        return workdir

    def train(self, arm: Arm, seed: int) -> dict:
        """Train a run, or what is missing of it, and return its results."""
        for other in filter(None, (arm.start, arm.tape)):
            self.train(other, seed)
        return train_once(self.config(arm, seed), self.workdir(arm.name, seed))

    def config(self, arm: Arm, seed: int):
        """Return the config of a run, whose teacher is trained first."""
        config = student_config(self.scale, self.data)
        if arm.teacher:
            config.teacher.weights = str(self.teacher(arm.teacher))
        if arm.start:
            config.init.weights = str(self.workdir(arm.start.name, seed))
        if arm.tape:
            config.teacher.tape_path = str(self.workdir(arm.tape.name, seed) / "tape")
        changes = dict(arm.changes)
        config.epochs *= changes.pop("epochs", 1.0)  # in those of the scale
        config.update_from_flattened_dict(changes)
        return finish(config, self.images, seed)


def train_once(config, workdir: Path) -> dict:
    """Train, or go on, or return the results of a run that is finished; memory is given back."""
    print(f"== {workdir}", flush=True)
    try:
        return run_lib.train(config, workdir)
    except UserError as error:
        sys.exit(f"{workdir}: {error}")
    finally:
        jax.clear_caches()


def conditions() -> dict:
    """Return what a figure was measured with, and when."""
    from importlib.metadata import version

    device = jax.devices()[0]
    return {
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "date": datetime.date.today().isoformat(),
        "jax": version("jax"),
        "python": platform.python_version(),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    count = usable_cores()
    cores = "one core" if count == 1 else f"{count} cores"
    return f"{names[0] if names else platform.machine()}, {cores}"


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scale = "gpu" if jax.default_backend() == "gpu" else "cpu"
    parser.add_argument("--scale", choices=sorted(SCALES), default=scale)
    parser.add_argument("--seeds", type=int, help="how many, from 0; the scale's if left out")
    parser.add_argument("--only", type=_seeds, help="seeds, as 0,2,4, beside another process")
    parser.add_argument("--epochs", type=float, help="of a student; the scale's if left out")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "evidence"), help="where runs are")
    parser.add_argument("--data", default="", help="folder of the idx files, if not Debian's")
    parser.add_argument("--out", default="", help="folder of the results")
    return parser.parse_args()

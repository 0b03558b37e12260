"""How long a save holds up the step: to a disk, and to a bucket on a server of this machine.

    python benchmarks/bucket.py [--model=deit_small_distilled_patch16_224] [--saves=5] [--late=0.05]

The state is that of a run: parameters, both moments of AdamW and the moving average. Saves to the
one and the other take turns. "blocks" is until the step may go on, "safe" until the checkpoint is
whole with its checksums. The server (fake-gcs-server, in the extra `test`) has no network to it;
--late answers each request so many seconds later, as a real one does.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from deit_jax.models.registry import create_model  # noqa: E402
from deit_jax.storage import to_path  # noqa: E402
from deit_jax.workdir.checkpoints import Checkpointer  # noqa: E402
from tests.emulator import BadLine, Emulator, environment  # noqa: E402


def state_of(name: str):
    """Return four copies of a model's parameters, as many arrays as a run's state has."""
    model = create_model(name, 1000)
    size = model.image_size
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    draw = jax.jit(lambda: jax.tree.map(lambda x: jnp.ones(x.shape), shapes["params"]))
    return {part: draw() for part in ("params", "mu", "nu", "ema")}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_distilled_patch16_224")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--late", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    state = jax.block_until_ready(state_of(args.model))
    folder = Path(tempfile.mkdtemp(prefix="deit-bucket-"))
    server = Emulator(folder / "gcs")
    line = BadLine(server.url, late=args.late)
    os.environ |= environment(line.url if args.late else server.url)
    places = {"disk": folder / "disk", "bucket": to_path("gs://bucket/run")}
    (folder / "disk").mkdir()
    savers = {name: Checkpointer(place, keep=1) for name, place in places.items()}
    times: dict[str, dict[str, list[float]]] = {n: {"blocks": [], "safe": []} for n in places}
    for step in range(1, args.saves + 2):  # the first is not counted
        for name, saver in savers.items():
            began = time.perf_counter()
            saver.save(step, state, None)
            blocked = time.perf_counter() - began
            saver.require_saved(step)
            if step > 1:
                times[name]["blocks"].append(blocked)
                times[name]["safe"].append(time.perf_counter() - began)
    for saver in savers.values():
        saver.close()
    server.kill()
    medians = {
        n: {k: round(statistics.median(v), 4) for k, v in t.items()} for n, t in times.items()
    }
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}, "
        f"orbax {metadata.version('orbax-checkpoint')}",
        "model": args.model,
        "bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "saves": args.saves,
        "late": args.late,
        "seconds": medians,
        "each": times,
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()

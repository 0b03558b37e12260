"""A label tape against the live teacher: the same weights, in less time?

    python benchmarks/evidence/tape.py --scale=cpu

Beside the distilled student of table 3, one that records what its teacher says, and one that is
trained from the tape, without a teacher. The tables of the paper know no such thing.
"""

import hashlib

import jax
import numpy as np
from study import TOKEN, Arm, Study

from deit_jax.storage import read_lines
from deit_jax.weights.load import open_model

EXPECTED = """Written before the first run. The three students are the same to the last bit. The
teacher is a convnet about as expensive as the student's forward pass, so that a step without it
takes something like three quarters of the time; the recording adds less than 3 %."""


RECORDED = Arm("token-recorded", TOKEN.changes | {"teacher.tape": "record"}, TOKEN.teacher)
REPLAYED = Arm("token-replayed", TOKEN.changes | {"teacher.tape": "replay"}, tape=RECORDED)


def weights_and_time(study: Study, arm: Arm, seed: int) -> dict:
    """Return a fingerprint of the weights and the median of the run's images a second."""
    workdir = study.workdir(arm.name, seed)
    leaves = jax.tree.leaves(open_model(workdir).variables)
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()
    rates = [r["images_per_second"] for r in read_lines(workdir / "timing.jsonl")]
    return {"weights": digest[:16], "images_per_second": float(np.median(rates))}


if __name__ == "__main__":
    Study("tape", EXPECTED, __doc__).run([TOKEN, RECORDED, REPLAYED], weights_and_time)

"""How many seeds does a difference of half a point need? From the spread of runs that are there.

    python benchmarks/evidence/power.py

Runs of the same seed are compared, so that what counts is the spread of their differences. It is
pooled over pairs of rows that learn from a teacher, at 20 epochs (tables 2 and 3) and at 60
(figure 3), with its 95 % interval by the chi-squared distribution; that is somewhat too sure, as
pairs share rows. The number of seeds is that with
which a two-sided paired t-test at 5 % finds the difference in four of five studies. Written to
benchmarks/results/evidence/power.json, before what it is asked for was trained.
"""

import json
from pathlib import Path

import numpy as np
from scipy import stats

RESULTS = Path(__file__).resolve().parent.parent / "results" / "evidence"
WANTED, LEVEL, POWER = 0.5, 0.05, 0.8
PAIRS = {
    "20 epochs": [
        ("table3", "token", "hard"),
        ("table3", "token", "soft"),
        ("table3", "token", "none"),
        ("table2", "by-small-convnet", "token"),
        ("table2", "by-large-convnet", "token"),
        ("table2", "by-transformer", "by-small-convnet"),
        ("table2", "by-long-transformer", "by-small-convnet"),
    ],
    "60 epochs": [("figure3", "token-3x", "none-3x")],
}


def power(seeds: int, difference: float, deviation: float) -> float:
    """Return the chance that a paired t-test finds a difference, by the noncentral t."""
    noncentral = difference / deviation * seeds**0.5
    limit = stats.t.ppf(1 - LEVEL / 2, seeds - 1)
    tails = stats.nct.sf(limit, seeds - 1, noncentral), stats.nct.cdf(-limit, seeds - 1, noncentral)
    # Far in a tail scipy gives nan; there is nothing of it.
    return float(np.nan_to_num(tails).sum())


def seeds_for(difference: float, deviation: float) -> int:
    """Return the fewest seeds that find a difference with POWER."""
    return next(n for n in range(2, 10_000) if power(n, difference, deviation) >= POWER)


def detectable(seeds: int, deviation: float) -> float:
    """Return the least difference, to 0.01, that so many seeds find with POWER."""
    steps = (0.01 * i for i in range(1, 10_000))
    return round(next(d for d in steps if power(seeds, d, deviation) >= POWER), 2)


def pooled(differences: list[list[float]]) -> tuple[float, int]:
    """Return the deviation of several groups about their own means, and its degrees of freedom."""
    free = sum(len(group) - 1 for group in differences)
    squares = sum(np.var(group) * len(group) for group in differences)
    return float(np.sqrt(squares / free)), free


def of_pair(table: str, arm: str, base: str) -> list[float]:
    """Return the differences between runs of the same seed, both heads together."""
    arms = json.loads((RESULTS / f"{table}-cpu.json").read_text())["arms"]
    own, other = arms[arm]["seeds"], arms[base]["seeds"]
    return [own[s]["fused"] - other[s]["fused"] for s in own if s in other]


def study(pairs) -> dict:
    """Return what pairs of rows say of the seeds that are needed."""
    deviation, free = pooled([of_pair(*pair) for pair in pairs])
    low, high = (
        float(deviation * np.sqrt(free / stats.chi2.ppf(p, free)))
        for p in (1 - LEVEL / 2, LEVEL / 2)
    )
    return {
        "pairs": [" ".join(pair) for pair in pairs],
        "deviation": round(deviation, 3),
        "interval": [round(low, 3), round(high, 3)],
        "degrees_of_freedom": free,
        "seeds_for_half_a_point": seeds_for(WANTED, deviation),
        "found_with_5_seeds": detectable(5, deviation),
        "found_with_8_seeds": detectable(8, deviation),
    }


if __name__ == "__main__":
    found = {length: study(pairs) for length, pairs in PAIRS.items()}
    (RESULTS / "power.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))

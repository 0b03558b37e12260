"""What the results files say, as the cells of a table: means, their errors, intervals, n."""

import json
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "evidence"
LEVEL = 0.95


class Found:
    """The results file of a table, or that there is none."""

    def __init__(self, table: str, scale: str):
        path = RESULTS / f"{table}-{scale}.json"
        self.table, self.all = table, json.loads(path.read_text()) if path.exists() else {}

    def seeds(self, arm: str, key: str) -> dict:
        """Return a figure of an arm by seed; `key` is as "fused", "ema.cls" or "learned_cosine"."""
        found = {}
        for seed, values in self.all.get("arms", {}).get(arm, {"seeds": {}})["seeds"].items():
            for part in key.split("."):
                values = values.get(part) if isinstance(values, dict) else None
            if values is not None:
                found[seed] = values
        return found

    def n(self, arm: str, key: str) -> str:
        """Return the number of runs."""
        return str(len(self.seeds(arm, key)))

    def cell(self, arm: str, key: str, digits: int = 2) -> str:
        """Return mean ± standard error."""
        return spread(list(self.seeds(arm, key).values()), digits)

    def gaps(self, arm: str, key: str, base: str, base_key: str) -> dict[str, float]:
        """Return the differences of runs of the same seed, by seed."""
        own, other = self.seeds(arm, key), self.seeds(base, base_key)
        return {s: own[s] - other[s] for s in own if s in other}

    def pairs(self, arm: str, key: str, base: str, base_key: str) -> list[float]:
        """Return the differences of runs of the same seed."""
        return list(self.gaps(arm, key, base, base_key).values())

    def difference(self, arm: str, key: str, base: str, base_key: str, digits: int = 2) -> str:
        """Return the mean of the differences of runs of the same seed, and its interval."""
        return interval(self.pairs(arm, key, base, base_key), digits)

    def conditions(self) -> str:
        """Return devices, versions and dates of the runs."""
        every = [v for arm in self.all["arms"].values() for v in arm["seeds"].values()]
        names = ("jax", "torch", "timm")
        dates: dict[str, set[str]] = {}
        for v in every:
            kind = f"{v['device']}, {', '.join(f'{k} {v[k]}' for k in names if k in v)}"
            dates.setdefault(kind, set()).add(v["date"])
        kinds = (f"{kind}, {' and '.join(sorted(dates[kind]))}" for kind in dates)
        return "; ".join(sorted(kinds))


def spread(values, digits: int, sign: bool = False) -> str:
    """Return mean ± standard error of the mean, "owed" for nothing, the value alone for one."""
    if not len(values):
        return "owed"
    text = f"{np.mean(values):{'+' if sign else ''}.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stats.sem(values):.{digits}f}"


def bounds(values) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95 % interval, by Student's t."""
    mean = float(np.mean(values))
    half = stats.sem(values) * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)
    return mean, float(mean - half), float(mean + half)


def interval(values, digits: int = 2) -> str:
    """Return a mean difference with its 95 % interval; one value has none."""
    if len(values) < 2:
        return spread(values, digits, sign=True) + (" (no interval)" if len(values) else "")
    return between(*bounds(values), digits)


def between(mean: float, low: float, high: float, digits: int = 2) -> str:
    """Return a difference and the ends of its interval in words."""
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def joint(own, other, digits: int = 2) -> str:
    """Return the difference of two means of unpaired runs with its joint interval, by Welch's t."""
    if min(len(own), len(other)) < 2:
        return "owed"
    found = stats.ttest_ind(own, other, equal_var=False)
    ends = found.confidence_interval(LEVEL)
    mean = float(np.mean(own) - np.mean(other))
    return between(mean, float(ends.low), float(ends.high), digits)


def markdown(header: str, rows: list[list[str]]) -> str:
    """Return a table; the header's cells are separated by |."""
    lines = [header, "|".join(["---"] * (header.count("|") + 1))]
    return "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(r) for r in rows)])

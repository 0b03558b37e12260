"""Rows that several tables of docs/results.md have."""

from found import Found, interval, markdown


def compared(found: Found, base: str, kinds) -> list[list[str]]:
    """Return rows: name, n, top-1, difference to the base's runs with its interval, the paper's.

    `kinds` are (name, arm, head, paper's).
    """
    return [
        [
            name,
            found.n(arm, head),
            found.cell(arm, head),
            found.difference(arm, head, base, "fused") if (arm, head) != (base, "fused") else "",
            paper,
        ]
        for name, arm, head, paper in kinds
    ]


def taught(found: Found, arm: str) -> str:
    """Return the top-1 of an arm's teacher, of each where it was trained anew; "" without one."""
    values = sorted(set(found.seeds(arm, "teacher").values()))
    if not values:
        return "" if found.seeds(arm, "fused") else "owed"
    return " and ".join(f"{value:.2f}" for value in values)


def with_teachers(found: Found, rows: list[list[str]], kinds, column: int) -> list[list[str]]:
    """Return rows with the top-1 of each one's teacher in a column."""
    return [
        [*row[:column], taught(found, arm), *row[column:]]
        for row, (_, arm, _, _) in zip(rows, kinds, strict=True)
    ]


def by_heads(found: Found, *kinds) -> list[list[str]]:
    """Return rows of the pairs of (name, arm, base): their number, each head's difference."""
    heads = ("cls", "dist", "fused", "ema.fused")
    rows = []
    for name, own, base in kinds:
        pairs = [found.pairs(own, head, base, head) for head in heads]
        rows.append([name, str(len(pairs[0])), *map(interval, pairs)])
    return rows


def paired(found: Found, *kinds) -> str:
    """Return a table of the pairs of (name, (arm, head), (base, head), the paper's or nothing)."""
    rows = []
    for name, own, base, *paper in kinds:
        pairs = found.pairs(*own, *base)
        rows.append([name, str(len(pairs)), interval(pairs), *paper])
    return markdown(
        "runs of the same seed | n | difference" + " | paper" * (len(rows[0]) - 3), rows
    )


def before_after(before: dict[str, float], after: dict[str, float]) -> list[list[float]]:
    """Return gaps of the seeds that both have: those before, those after, and their changes."""
    both = [seed for seed in before if seed in after]
    return [
        [before[seed] for seed in both],
        [after[seed] for seed in both],
        [after[seed] - before[seed] for seed in both],
    ]

"""README's table of what was measured."""

from found import Found, interval, markdown


def short(scale: str) -> str:
    """Return README's table: the main differences, of both heads where there are two."""
    kinds = (
        ("hard distillation against none", "60", "claim", "hard-3x", "none-3x", "+1.2"),
        ("a token for it against the class token", "60", "claim", "token-3x", "hard-3x", "+0.4"),
        (
            "a transformer for a teacher against a convnet as good as it (paper: 1.8 worse)",
            "60",
            "matched",
            "by-long-transformer-3x",
            "by-matched-convnet-3x",
            "-0.8",
        ),
        (
            "the recipe of deit_jax against timm's",
            "20",
            "frameworks",
            "recipe-ours",
            "recipe-timm-our-order",
            "",
        ),
    )
    rows = []
    for name, epochs, table, own, base, paper in kinds:
        pairs = Found(table, scale).pairs(own, "fused", base, "fused")
        rows.append([name, epochs, str(len(pairs)), interval(pairs), paper])
    head = "[small, on Fashion-MNIST](docs/results.md#the-papers-claims-on-clothes) | epochs | n"
    return markdown(f"{head} | points of top-1, 95 % interval | paper", rows)

"""The tables of docs/results.md, each a function of the results file of its study."""

import json

import figures
from found import RESULTS, Found, interval, joint, markdown, spread
from power import study
from rows import before_after, by_heads, compared, paired, with_teachers

HEADS = "class head | distillation head | both | their moving average"
OPPOSED = -0.5  # two tokens of a smaller cosine point away from each other


def table3(found: Found) -> str:
    """Return how the teacher's word reaches the student."""
    kinds = [
        ("no teacher", "none", "fused", "81.8"),
        ("soft, class token", "soft", "fused", "81.8"),
        ("hard, class token", "hard", "fused", "83.0"),
        ("distillation token: class head", "token", "cls", "83.0"),
        ("distillation token: distillation head", "token", "dist", "83.1"),
        ("distillation token: both", "token", "fused", "83.4"),
    ]
    rows = compared(found, "none", kinds)
    head = "distillation | n | top-1 % | against no teacher | paper: DeiT-B on ImageNet"
    hard = ("hard", "fused")
    second = paired(
        found,
        ("hard - soft, class token", hard, ("soft", "fused"), "+1.2"),
        ("token, both heads - hard, class token", ("token", "fused"), hard, "+0.4"),
        ("token: distillation head - class head", ("token", "dist"), ("token", "cls"), "+0.1"),
    )
    return markdown(head, rows) + "\n\n" + second


def table2(found: Found) -> str:
    """Return what each teacher makes of the student."""
    kinds = [
        ("small convnet", "by-small-convnet", "fused", "RegNetY-4GF 80.0 → 82.7"),
        ("convnet", "token", "fused", "RegNetY-8GF 81.7 → 82.7"),
        ("large convnet", "by-large-convnet", "fused", "RegNetY-16GF 82.9 → 83.1"),
        ("transformer", "by-transformer", "fused", "DeiT-B 81.8 → 81.9"),
        ("the same, three times the epochs", "by-long-transformer", "fused", ""),
    ]
    rows = with_teachers(found, compared(found, "token", kinds), kinds, 1)
    head = "teacher | its top-1 % | n | student, both heads | against the convnet's | paper"
    long, small = ("by-long-transformer", "fused"), ("by-small-convnet", "fused")
    pair = ("long-trained transformer's - small convnet's", long, small)
    return markdown(head, rows) + "\n\n" + paired(found, pair)


def tokens(found: Found) -> str:
    """Return how alike the two tokens are, and what a second class token is worth."""
    kinds = [
        ("distillation token", "token", "", "0.06, then 0.93"),
        ("two class tokens, same target", "two-class-tokens", "", "0.999"),
        ("distillation token, weight decay 3", "token-decayed", "token", ""),
        ("two class tokens, weight decay 3", "two-class-tokens-decayed", "two-class-tokens", ""),
    ]
    rows = [
        [
            name,
            found.n(arm, "learned_cosine"),
            found.cell(arm, "learned_cosine", 3),
            *(spread([c[i] for c in found.seeds(arm, "cosines").values()], 3) for i in (0, -1)),
            found.difference(arm, "fused", "none", "fused"),
            found.difference(arm, "fused", without, "fused") if without else "",
            paper,
        ]
        for name, arm, without, paper in kinds
    ]
    head = "tokens | n | cosine as learned | at the input, with positions | after the last block | "
    head += "top-1 against one token | against weight decay 0.05 | paper: cosine"
    second = []
    for decay, x in (("0.05", ""), ("3", "-decayed")):
        own, other = (found.seeds(f"{of}{x}", "cosines") for of in ("token", "two-class-tokens"))
        gaps = [own[seed][-1] - other[seed][-1] for seed in own if seed in other]
        second.append([f"weight decay {decay}", str(len(gaps)), interval(gaps, 3)])
    columns = "cosine after the last block, same seed | n | distilled pair's - two class tokens'"
    return markdown(head, rows) + "\n\n" + markdown(columns, second)


def table4(found: Found) -> str:
    """Return the share of images on which two classifiers differ."""
    runs = list(found.all.get("arms", {}).get("token", {"seeds": {}})["seeds"].values())
    names = {
        "truth": "labels",
        "convnet": "convnet",
        "none": "DeiT",
        "cls": "class head",
        "dist": "distillation head",
        "fused": "both",
    }
    shares = [run["disagreement"] for run in runs]
    every = range(len(names))
    rows = [
        [name, *(spread([s[i][j] for s in shares], 3) if i != j else "0" for j in every)]
        for i, name in enumerate(names.values())
    ]
    first = markdown(" | ".join(["", *names.values()]), rows)
    kinds = (
        ("the convnet: class head's - distillation head's", "convnet", "cls", "dist"),
        ("the convnet: DeiT's - class head's", "convnet", "none", "cls"),
        ("DeiT: distillation head's - class head's", "none", "dist", "cls"),
        ("DeiT: both heads' - class head's", "none", "fused", "cls"),
        ("the labels: both heads' - distillation head's", "truth", "fused", "dist"),
    )
    at = {name: i for i, name in enumerate(names)}
    rows = []
    for name, whom, *pair in kinds:
        ours, base = ([100 * s[at[whom]][at[head]] for s in shares] for head in pair)
        points = [x - y for x, y in zip(ours, base, strict=True)]
        rows.append([name, str(len(points)), interval(points)])
    head = "disagreement of runs of the same seed with | n | points"
    return first + "\n\n" + markdown(head, rows)


def table8(found: Found) -> str:
    """Return the recipe without each of its parts."""
    kinds = [
        ("DeiT's recipe", "none", "fused", "81.8"),
        ("SGD, weight decay as for AdamW", "sgd", "fused", ""),
        ("SGD, weight decay 5e-5", "sgd-little-decay", "fused", "74.5"),
        ("no RandAugment", "no-randaugment", "fused", "79.6"),
        ("no mixup", "no-mixup", "fused", "78.7"),
        ("no cutmix", "no-cutmix", "fused", "80.0"),
        ("neither mixup nor cutmix", "no-mixup-no-cutmix", "fused", "75.8"),
        ("no erasing", "no-erasing", "fused", "4.3"),
        ("no stochastic depth", "no-stochastic-depth", "fused", "3.4"),
        ("no repeated augmentation", "no-repeated-augmentation", "fused", "76.5"),
        ("with dropout", "dropout", "fused", "81.3"),
        ("moving average", "none", "ema.fused", "81.9"),
    ]
    rows = compared(found, "none", kinds)
    first = markdown("recipe | n | top-1 % | against the recipe | paper: DeiT-B", rows)
    parts = (("no-randaugment", "fused"), ("no-mixup-no-cutmix", "fused"))
    pair = ("no RandAugment - neither mixup nor cutmix", *parts)
    return first + "\n\n" + paired(found, pair)


def table10(found: Found) -> str:
    """Return what a higher resolution adds."""
    kinds = [
        ("32 pixels", "token", "fused", "81.8; distilled 83.4"),
        ("and on at 32, with the teacher", "token-on-at-32", "fused", ""),
        ("and on at 48, labels alone", "token-48-labels", "fused", "at 384: 83.1"),
        ("and on at 48, with the teacher", "token-48-teacher", "fused", "at 384: 84.5"),
        ("the same, the teacher at 32", "token-48-teacher-32", "fused", ""),
    ]
    rows = with_teachers(found, compared(found, "token", kinds), kinds, 4)
    head = "training | n | both heads, top-1 % | against 32 pixels | its teacher's top-1 %"
    first = markdown(f"{head} | paper: DeiT-B", rows)
    on, labels, own, at_32 = ((arm, "fused") for _, arm, *_ in kinds[1:])
    second = paired(
        found,
        ("on at 48, labels alone - on at 32", labels, on),
        ("on at 48, with the teacher - on at 32", own, on),
        ("the same, the teacher at 32 - on at 32", at_32, on),
        ("on at 48: with the teacher - labels alone", own, labels),
        ("on at 48: the teacher at 32 - at 48", at_32, own),
    )
    return first + "\n\n" + second


def figure3(found: Found) -> str:
    """Return what three times the epochs add."""
    rows = [
        [
            name,
            found.n(arm, "fused"),
            found.cell(arm, "fused"),
            found.n(f"{arm}-3x", "fused"),
            found.cell(f"{arm}-3x", "fused"),
            found.difference(f"{arm}-3x", "fused", arm, "fused"),
            paper,
        ]
        for name, arm, paper in (
            ("no teacher", "none", "saturates after 400 epochs"),
            ("distillation token", "token", "83.4 → 84.2 (300 → 1000 epochs)"),
        )
    ]
    head = "training | n | epochs as above | n | three times | gain | paper: DeiT-B"
    before, after = (found.gaps(f"token{x}", "fused", f"none{x}", "fused") for x in ("", "-3x"))
    ahead = before_after(before, after)
    rows_ahead = [["token - no teacher", str(len(ahead[0])), *map(interval, ahead)]]
    second = "runs of the same seed | n | epochs as above | three times | change"
    return markdown(head, rows) + "\n\n" + markdown(second, rows_ahead)


def table7(found: Found) -> str:
    """Return what starting from clothes is worth on digits."""
    starts = (("from scratch", "scratch"), ("from DeiT", "from-none"), ("distilled", "from-token"))
    rows = [
        [
            str(count),
            found.n(f"digits-{count}-scratch", "fused"),
            *(found.cell(f"digits-{count}-{start}", "fused") for _, start in starts),
            *(
                found.difference(
                    f"digits-{count}-{own}", "fused", f"digits-{count}-{base}", "fused"
                )
                for own, base in (("from-none", "scratch"), ("from-token", "from-none"))
            ),
        ]
        for count in (100, 400, 1438)
    ]
    head = "digits to train on | n | from scratch | from DeiT on clothes | from the distilled one"
    first = markdown(f"{head} | DeiT - scratch | distilled - DeiT", rows)
    more, fewer = ((f"digits-{count}-scratch", "fused") for count in (1438, 400))
    return first + "\n\n" + paired(found, ("from scratch: 1438 digits - 400", more, fewer))


def power() -> str:
    """Return how many seeds half a point needs, by the runs before and by those of the claim."""
    lengths = json.loads((RESULTS / "power.json").read_text())
    lengths["60 epochs, by the runs below"] = study([("claim", "token-3x", "hard-3x")])
    rows = [
        [
            length,
            str(len(of["pairs"])),
            f"{of['deviation']:.2f} ({of['interval'][0]:.2f} to {of['interval'][1]:.2f})",
            str(of["seeds_for_half_a_point"]),
            *(f"{of[f'found_with_{n}_seeds']:.2f}" for n in (5, 8)),
        ]
        for length, of in lengths.items()
    ]
    head = "training | pairs of rows | deviation of a difference | seeds for 0.5 points"
    return markdown(f"{head} | 5 seeds find | 8 seeds find", rows)


def claim(found: Found) -> str:
    """Return what was computed before, the three students at 60 epochs, and their differences."""
    kinds = [
        ("no teacher", "none-3x", "fused", "81.8"),
        ("hard, class token", "hard-3x", "fused", "83.0"),
        ("token: class head", "token-3x", "cls", "83.0"),
        ("token: distillation head", "token-3x", "dist", "83.1"),
        ("token: both heads", "token-3x", "fused", "83.4"),
    ]
    rows = compared(found, "none-3x", kinds)
    first = markdown("60 epochs | n | top-1 % | against no teacher | paper: DeiT-B", rows)
    second = paired(found, *((*pair, f"{paper:+.1f}") for *pair, paper in figures.COMPARISONS))
    return "\n\n".join((power(), first, second))


def matched(found: Found) -> str:
    """Return what teachers of two kinds and the same accuracy make of students."""
    kinds = [
        ("convnet", "by-matched-convnet-3x", "fused", "RegNetY-4GF 80.0 → 82.7"),
        ("transformer", "by-long-transformer-3x", "fused", "DeiT-B 81.8 → 81.9"),
    ]
    rows = with_teachers(found, compared(found, kinds[0][1], kinds), kinds, 1)
    head = "teacher | its top-1 % | n | student of 60 epochs, both heads | against the convnet's"
    pair = ("transformer's - convnet's", kinds[1][1], kinds[0][1])
    second = markdown(f"runs of the same seed | n | {HEADS}", by_heads(found, pair))
    return markdown(f"{head} | paper", rows) + "\n\n" + second


def frameworks(found: Found) -> str:
    """Return what either framework makes of the recipe, with crops of random size and shape."""
    heads = ("cls", "dist", "fused", "ema.fused")
    arms = {
        "ours, JAX": "recipe-ours",
        "timm, in our order": "recipe-timm-our-order",
        "timm, all in its one order": "recipe-timm",
        "ours, both tokens as timm's": "recipe-ours-timms-tokens",
        "ours, class token near 0": "recipe-ours-timms-class-token",
    }
    rows = []
    for name, arm in arms.items():
        cosines = list(found.seeds(arm, "input_cosine").values())
        opposed = f"{sum(cosine < OPPOSED for cosine in cosines)} of {len(cosines)}"
        rows.append([name, found.n(arm, "fused"), *(found.cell(arm, h) for h in heads), opposed])
    first = markdown(f"20 epochs, random crops | n | {HEADS} | opposed tokens", rows)
    ours, same, other, tokens, start = arms.values()
    rows = by_heads(
        found,
        ("ours - timm in our order", ours, same),
        ("both tokens as timm's - ours", tokens, ours),
        ("both tokens as timm's - timm in our order", tokens, same),
        ("class token near 0 - ours", start, ours),
        ("both tokens as timm's - class token near 0", tokens, start),
    )
    for name, *both in (
        ("ours - timm in our order", ours, same),
        ("ours - timm in its one order", ours, other),
        ("timm in our order - in its one order", same, other),
    ):
        values = [[list(found.seeds(arm, h).values()) for arm in both] for h in heads]
        n = " and ".join(str(len(of)) for of in values[0])
        rows.append([f"{name}, not paired", n, *(joint(*each) for each in values)])
    return first + "\n\n" + markdown(f"runs of the same seed | n | {HEADS}", rows)


def lengths(found: Found) -> str:
    """Return hard distillation and the token after trainings of several lengths."""
    rows = []
    for times in figures.lengths_of(found):
        token, hard = f"token-{times:g}x", f"hard-{times:g}x"
        cells = [(hard, "fused"), (token, "cls"), (token, "dist"), (token, "fused")]
        rows.append(
            [
                f"{times * found.all['scale']['epochs']:g}",
                str(len(found.pairs(token, "fused", hard, "fused"))),
                *(found.cell(arm, head) for arm, head in cells),
                found.difference(token, "fused", hard, "fused"),
                found.difference(token, "dist", hard, "fused"),
                found.difference(token, "dist", token, "cls"),
            ]
        )
    head = "epochs | n | hard, class token | token: class head | distillation head | both"
    head += " | both - hard | distillation - hard | distillation - class head"
    first, last = (figures.lengths_of(found)[i] for i in (0, -1))
    changes = []
    for name, of, base in (
        ("both - hard", ("token", "fused"), ("hard", "fused")),
        ("distillation - class head", ("token", "dist"), ("token", "cls")),
    ):
        short, long = (
            found.gaps(f"{of[0]}-{x:g}x", of[1], f"{base[0]}-{x:g}x", base[1])
            for x in (first, last)
        )
        *_, values = before_after(short, long)
        changes.append([name, str(len(values)), interval(values)])
    columns = "runs of the same seed | n | change from the shortest to the longest"
    return markdown(head, rows) + "\n\n" + markdown(columns, changes)


def tape(found: Found) -> str:
    """Return whether a tape gives the same weights, and how fast."""
    live = found.seeds("token", "weights")
    rows = []
    for name, arm in (
        ("live teacher", "token"),
        ("recording", "token-recorded"),
        ("replayed, no teacher", "token-replayed"),
    ):
        own = found.seeds(arm, "weights")
        same = sum(own[s] == live[s] for s in own if s in live)
        said = f"{same} of {len(own)} seeds" if own and arm != "token" else ""
        rate = found.cell(arm, "images_per_second", 0)
        rows.append([name, found.n(arm, "weights"), said, rate])
    return markdown("teacher | n | same weights as live, every bit | images/s", rows)


def foreign(found: Found) -> str:
    """Return what a teacher of timm and PyTorch makes of the student."""
    kinds = [
        ("no teacher", "none", "fused", ""),
        ("its decisions, through the token", "token-of-resnet18", "fused", ""),
        ("and its features", "token-and-features-of-resnet18", "fused", ""),
        ("its features alone", "features-of-resnet18", "fused", ""),
    ]
    rows = [row[:4] for row in compared(found, "none", kinds)]
    rows = with_teachers(found, rows, kinds, 1)
    # The same teacher, whose decisions nobody asks for where its features alone are learned.
    rows[-1][1] = rows[1][1]
    head = "what is learned | its teacher's top-1 % | n | student | against no teacher"
    token, both, features = ((arm, "fused") for _, arm, *_ in kinds[1:])
    second = paired(
        found,
        ("decisions and features - decisions", both, token),
        ("features - decisions", features, token),
    )
    return markdown(head, rows) + "\n\n" + second


SECTIONS = (
    ("claim", "A token, or hard distillation alone? (table 3, with power)", claim),
    ("lengths", "The token, by the length of the training (figure 3)", lengths),
    ("matched", "Convnet or transformer, of the same accuracy (table 2, with power)", matched),
    ("frameworks", "One recipe in two frameworks (not in the paper)", frameworks),
    ("table3", "Distillation (table 3)", table3),
    ("table2", "Teachers (table 2)", table2),
    ("tokens", "The two tokens (section 5.2)", tokens),
    ("table4", "Who disagrees with whom (table 4)", table4),
    ("table8", "The recipe, part by part (table 8)", table8),
    ("table10", "A higher resolution (tables 3 and 10)", table10),
    ("figure3", "Longer training (figure 3)", figure3),
    ("table7", "Transfer (table 7)", table7),
    ("tape", "Label tape (not in the paper)", tape),
    ("foreign", "A teacher of another framework (not in the paper)", foreign),
)

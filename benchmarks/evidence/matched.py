"""Does a convnet teach better than a transformer that is as good as it is?

    python benchmarks/evidence/matched.py --scale=cpu

Students of 60 epochs with the distillation token. The transformer is table 2's long-trained one;
the convnet is its small one, trained for as many epochs less as make it no better (study.py:
MATCHED). One teacher of each kind: what is told is told of these two.
"""

from study import TOKEN, Arm, Study

EXPECTED = """Written before the first run. The paper: RegNetY-4GF, 80.0, makes a student of 82.7,
DeiT-B, 81.8, one of 81.9. Table 2 here, 20 epochs and three seeds, says the contrary: the students
of the transformer are better than those of the small convnet, by 4.0, 0.5 and 2.3 points, though it
is the weaker teacher; a network of one's own kind is easier to imitate, and what a convnet knows
besides can show only later. Expected here: at 60 epochs, where imitation is no longer what is
hard, the transformer's students are ahead by less, one point at most, and it will not be told
whether they are at all; that the convnet's are ahead, as in the paper, is not expected yet."""

ARMS = [
    Arm(f"by-{name}-3x", TOKEN.changes | {"epochs": 3.0}, name)
    for name in ("matched-convnet", "long-transformer")
]

if __name__ == "__main__":
    Study("matched", EXPECTED, __doc__).run(ARMS)

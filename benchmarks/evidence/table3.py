"""DeiT's Table 3: no teacher, a soft one, a hard one through the class token or a token of its own.

python benchmarks/evidence/table3.py --scale=cpu
"""

from study import HARD, NONE, SOFT, TOKEN, Study

EXPECTED = """Written before the first run. As in the paper: soft distillation within a standard
error or two of no teacher; hard distillation well above both; the token's two heads together not
below hard distillation through the class token, the distillation head above the class head. Here
the student sees few images, and mixed ones: a teacher that names what is left in them says more
than their labels do, so that the gain of a hard teacher should be larger than the paper's 1.2 to
2.1 points, and a soft teacher should gain something too. With three seeds a difference between
hard and token below about one point will not be told from chance."""

if __name__ == "__main__":
    Study("table3", EXPECTED, __doc__).run([NONE, SOFT, HARD, TOKEN])

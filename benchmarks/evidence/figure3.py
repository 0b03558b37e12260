"""DeiT's Figure 3: what a longer training gives, with and without distillation.

python benchmarks/evidence/figure3.py --scale=cpu
"""

from study import NONE, NONE_LONG, TOKEN, TOKEN_LONG, Study

EXPECTED = """Written before the first run. The paper: from 300 to 1000 epochs the distilled
DeiT-B gains 0.8 points, while the undistilled one saturates after 400. Expected here: both gain
much from three times the epochs, since neither is near saturation; the distilled one stays ahead,
and its lead shrinks, for what it gained was mostly speed."""

ARMS = [NONE, TOKEN, NONE_LONG, TOKEN_LONG]

if __name__ == "__main__":
    Study("figure3", EXPECTED, __doc__).run(ARMS)

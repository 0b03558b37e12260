"""The paper's own point, with the seeds it takes: is a token better than hard distillation alone?

    python benchmarks/evidence/claim.py --scale=cpu

Students of 60 epochs: no teacher, hard distillation through the class token, and through the
distillation token. The latter's runs record a label tape, from which the former learn.
"""

from measures import token_cosines
from study import HARD_LONG, NONE_LONG, TOKEN_LONG, Study

EXPECTED = """Written before the first run. power.py says of the runs that were there: at 20
epochs the differences between runs of the same seed spread by 1.17 points, so that 45 seeds are
needed to find half a point; at 60 by 0.52 (three seeds, an interval from 0.27 to 3.3), so that 11
are, and 8 find 0.6. The paper: both heads 83.4, hard distillation through the class token 83.0,
no teacher 81.8. Expected here: both distilled students three to four points above no teacher,
whose interval excludes 0; both heads within half a point of hard distillation through the class
token, more likely above it than below, with an interval that includes 0; the distillation head
above the class head, by half a point to two, with an interval that excludes 0; both heads no
better than the distillation head alone."""

if __name__ == "__main__":
    Study("claim", EXPECTED, __doc__, seeds=8).run(
        [NONE_LONG, TOKEN_LONG, HARD_LONG], token_cosines
    )

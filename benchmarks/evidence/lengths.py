"""Is it the length of the training? The token's gain over hard distillation, from 10 to 90 epochs.

    python benchmarks/evidence/lengths.py --scale=cpu

At each length the token's runs record a tape from which hard distillation learns; those of 60
epochs are claim.py's.
"""

from measures import token_cosines
from study import Study, of_length

EXPECTED = """Written before the first run of 10, 20 and 90 epochs, when one seed of 60 had come
to +0.3. In figure 3 of the paper the token is ahead of hard distillation at every length, by 0.4
at 300 epochs and by 0.1 at 1000. In table 3 here, 20 epochs, it was behind by 0.9 (three seeds).
If a mistake were the reason, it would stay behind at every length; if the reason is that a second
token and a second head have to be learned first, the difference rises with the length. Expected:
behind by about a point at 10 epochs, by half a point at 20, level or ahead by less than half a
point at 60 and 90. The distillation head's lead over the class head falls with the length, from
some points to none: both heads see the same features, and agree once these are learned."""

LENGTHS = (0.5, 1.0, 3.0, 4.5)  # of the scale's 20 epochs
ARMS = [arm for times in LENGTHS for arm in of_length(times)]

if __name__ == "__main__":
    Study("lengths", EXPECTED, __doc__).run(ARMS, token_cosines)

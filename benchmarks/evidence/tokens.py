"""DeiT, section 5.2: are the two tokens different, and would a second class token do as well?

python benchmarks/evidence/tokens.py --seeds=3 --scale=cpu
"""

from measures import token_cosines
from study import NONE, TOKEN, TWO_CLASS_TOKENS, Study

EXPECTED = """Written before the first run. The paper: the learned tokens have a cosine of 0.06,
their embeddings come closer from layer to layer, to 0.93 after the last, short of 1; two class
tokens with the same target end at 0.999 and gain nothing. Expected here: the same order of
things. With 64 numbers instead of 768, random vectors already have cosines of about 0.12, and
with few steps the two class tokens may not come as close as 0.999; the distilled pair must stay
below them in the last layers. Two class tokens: no gain over one that chance does not explain."""

if __name__ == "__main__":
    Study("tokens", EXPECTED, __doc__).run([NONE, TWO_CLASS_TOKENS, TOKEN], token_cosines)

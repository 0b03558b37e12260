"""DeiT, section 5.2: are the two tokens different, and would a second class token do as well?

python benchmarks/evidence/tokens.py --scale=cpu
"""

import dataclasses

from measures import token_cosines
from study import NONE, TOKEN, TWO_CLASS_TOKENS, Study

EXPECTED = """Written before the first run. The paper: the learned tokens have a cosine of 0.06,
their embeddings come closer from layer to layer, to 0.93 after the last, short of 1; two class
tokens with the same target end at 0.999 and gain nothing. Expected here: the same order of
things. With 64 numbers instead of 768, random vectors already have cosines of about 0.12, and
with few steps the two class tokens may not come as close as 0.999; the distilled pair must stay
below them in the last layers. Two class tokens: no gain over one that chance does not explain.

Added when two class tokens had stayed at right angles, before the first run of these rows: weight
decay forgets in what the heads began to differ, by exp(-sum of lr x decay): exp(-9.4) in the
paper's 375 300 steps, exp(-0.16) here. With a decay of 3, exp(-9.4) here too, the two class tokens
should come to a cosine above 0.95 after the last block, and the distilled pair stay below them."""

DECAY = {"optim.weight_decay": 3.0}
DECAYED = [
    dataclasses.replace(arm, name=f"{arm.name}-decayed", changes={**arm.changes, **DECAY})
    for arm in (TWO_CLASS_TOKENS, TOKEN)
]

if __name__ == "__main__":
    Study("tokens", EXPECTED, __doc__).run([NONE, TWO_CLASS_TOKENS, TOKEN, *DECAYED], token_cosines)

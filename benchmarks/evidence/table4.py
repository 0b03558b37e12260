"""DeiT's Table 4: on how many images the classifiers disagree.

python benchmarks/evidence/table4.py --scale=cpu
"""

from measures import disagreement
from study import NONE, TOKEN, Study

EXPECTED = """Written before the first run. The paper: the distillation head agrees more with the
convnet than the class head does (0.100 and 0.112), and both more than a DeiT without a teacher
(0.133); the class head is as near to the plain DeiT (0.109) as the distillation head (0.110).
Expected here: the same orders, the distillation head being further from the plain DeiT."""

if __name__ == "__main__":
    Study("table4", EXPECTED, __doc__).run([NONE, TOKEN], disagreement)

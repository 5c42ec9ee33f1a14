"""Bytes that one case adds to the resident peak of this process.

python -m tests.benchmarks.peak OPERATION SHAPE DTYPE CASE
"""

import sys

from tests.benchmarks.cases import groups_of
from tests.benchmarks.measure import resident_growth

if __name__ == "__main__":
    *wanted, case = sys.argv[1:]
    (found,) = [g for g in groups_of("cpu") if [g.operation, g.shape, g.dtype] == wanted]
    print(resident_growth(found.cases[case]))

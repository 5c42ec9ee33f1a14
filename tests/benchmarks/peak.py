"""Bytes that one case adds to the resident peak of this process.

python -m tests.benchmarks.peak OPERATION SHAPE DTYPE CASE
"""

import sys

from tests.benchmarks.cases import MODULES
from tests.benchmarks.measure import all_groups, resident_growth

if __name__ == "__main__":
    *wanted, case = sys.argv[1:]
    (found,) = [g for g in all_groups(list(MODULES.values()), "cpu") if [g.operation, g.shape, g.dtype] == wanted]
    print(resident_growth(found.cases[case]))

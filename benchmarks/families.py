"""Every family of tests/support/families.py: its sites found out, converted in each way, checked, and served by vLLM.

python -m benchmarks.families [NAME ...] [--json FILE]
"""

import argparse
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks import record
from benchmarks.testbed import PYTHON
from tests.support.coverage import Served, prove, serve
from tests.support.families import FAMILIES

_ENGINES = 12
"""Engines in one process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(FAMILIES))
    parser.add_argument("--json", type=Path, default=record.RESULTS / "families.json")
    arguments = parser.parse_args()
    text, rows = Path(PYTHON.model).parent / "calibration.txt", []
    wanted = [FAMILIES[name] for name in arguments.names]
    for start in range(0, len(wanted), _ENGINES):
        families = wanted[start : start + _ENGINES]
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["XDG_CACHE_HOME"] = scratch  # nothing was found out before
            proofs = [prove(family, Path(scratch, family.name), text) for family in families]
            served = {family.name: Served(family.name, error=family.unserved) for family in families}
            served |= {one.family: one for one in serve([f for f in families if not f.unserved], Path(scratch))}
        rows += [asdict(proof) | {"served": asdict(served[proof.family])} for proof in proofs]
        record.write(arguments.json, rows)


if __name__ == "__main__":
    main()

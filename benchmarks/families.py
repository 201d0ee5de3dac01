"""Every family of tests/support/families.py: its sites found out, converted in each way, checked, and served by vLLM.

python -m benchmarks.families [NAME ...] [--json FILE]

With names, the rows of the others in the file stay as they are; each says of which commit it is.
"""

import argparse
import json
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
    text, rows = Path(PYTHON.model).parent / "calibration.txt", {}
    if arguments.names != list(FAMILIES) and arguments.json.exists():
        rows = {row["family"]: row for row in json.loads(arguments.json.read_text())["rows"]}
    wanted = [FAMILIES[name] for name in arguments.names]
    for start in range(0, len(wanted), _ENGINES):
        families = wanted[start : start + _ENGINES]
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["XDG_CACHE_HOME"] = scratch  # nothing was found out before
            proofs = [prove(family, Path(scratch, family.name), text) for family in families]
            served = {family.name: Served(family.name, error=family.unserved) for family in families}
            served |= {one.family: one for one in serve([f for f in families if not f.unserved], Path(scratch))}
        for proof in proofs:
            rows[proof.family] = asdict(proof) | {"served": asdict(served[proof.family]), "commit": record.COMMIT}
        record.write(arguments.json, [rows[name] for name in FAMILIES if name in rows])


if __name__ == "__main__":
    main()

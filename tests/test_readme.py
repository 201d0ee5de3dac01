import re
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "docs" / "results.md"
SHOWN = "\n".join([README, *([RESULTS.read_text()] if RESULTS.exists() else [])])
TABLES = tables.every()


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_the_committed_results(name):
    assert TABLES[name] in SHOWN


def test_files_that_it_names_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target

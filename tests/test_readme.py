import re
from pathlib import Path

import pytest

from benchmarks import plot

README = (Path(__file__).parents[1] / "README.md").read_text()


TABLES = (
    plot.demo_table,
    plot.accuracy_table,
    plot.plants_table,
    plot.served_table,
    plot.accuracy_targets_table,
    plot.gemm_table,
    plot.throughput_table,
    plot.conversions_table,
    plot.conversion_targets_table,
)


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_the_committed_results(table):
    assert table() in README


def test_files_that_it_names_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target

import re
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLES = tables.every()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_the_committed_results(page):
    text = page.read_text()
    assert tables.put(text, TABLES) == text, f"python -m benchmarks.tables {page.relative_to(ROOT)}"


def test_every_table_is_shown():
    shown = "".join(page.read_text() for page in PAGES)
    for name, table in TABLES.items():
        assert f"<!-- {name} -->\n\n{table}\n" in shown, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_it_names_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)[)#]", page.read_text()):
        assert (page.parent / target).exists(), target

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


def test_a_table_is_put_between_blank_lines():
    found, old = {"kernels of x.json": "| a |\n|--:|\n| 2 |"}, "| a |\n|--:|\n| 1 |\n| 0 |\n"
    for text in ("", old, f"{old}\n", f"\n{old}\n"):
        page = tables.put(f"before\n\n<!-- kernels of x.json -->\n{text}after\n", found)
        assert page == f"before\n\n<!-- kernels of x.json -->\n\n{found['kernels of x.json']}\n\nafter\n"

"""The table in a model card: it replaces itself, and nothing else changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.conversion import convert
from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.recipe import Recipe
from vllm_w8a8_bismooth.report import card, section
from vllm_w8a8_bismooth.report.labels import Labels

CARDS = [
    b"",
    b"# Model",
    b"# Model\n",
    b"# Model\n\n",
    b"# Model\r\n\r\n## Verify\r\n\r\ntext\r\n",
    b"# Mod\xe8le\n\n## Verify\n\ntext\n",
    "# Modèle ☃\n".encode(),
]


@pytest.mark.parametrize("before", CARDS)
def test_the_users_text_stays(before):
    once = section.put(before, "| a |")
    assert once.count(section.BEGIN.encode()) == once.count(section.END.encode()) == 1
    assert section.without(once).strip() == before.strip()
    assert section.put(once, "| a |") == once
    twice = section.put(once, "| b |\n| c |")
    assert b"| a |" not in twice and b"| b |\n| c |\n" in twice
    assert section.without(twice) == section.without(once)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_whatever_stands_around_it(before, after):
    marked = f"{before}{section.BEGIN}\nold\n{section.END}{after}".encode()
    found = section.put(marked, "new")
    assert found == f"{before}{section.BEGIN}\nnew\n{section.END}{after}".encode()


@pytest.mark.parametrize(
    "text",
    [section.BEGIN, section.END, f"{section.END}{section.BEGIN}", f"{section.BEGIN}{section.END}" * 2],
    ids=["no end", "no begin", "turned round", "twice"],
)
def test_broken_marks_are_refused(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(BismoothError, match="leave one of each, in this order, or none"):
        section.write(path, "new")
    assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


def test_a_card_that_is_not_there_is_made_and_one_that_cannot_be_read_refused(tmp_path):
    section.write(tmp_path / "README.md", "table")
    assert (tmp_path / "README.md").read_text() == f"{section.BEGIN}\ntable\n{section.END}\n"
    (tmp_path / "folder").mkdir()
    with pytest.raises(BismoothError, match="cannot be read"):
        section.write(tmp_path / "folder", "table")


def test_our_card_takes_labels_with_the_table_in_it(make_checkpoint, tmp_path):
    """The section is before Verify, and the card counts as unchanged; other changes are refused as before."""
    source, out = make_checkpoint(), tmp_path / "out"
    convert(source, out, Recipe.of("rtn"))
    path = out / "README.md"
    drawn = path.read_bytes()
    section.write(path, "| table |")
    scored = path.read_bytes()
    assert section.without(scored) == drawn and b"<!-- bismooth score: end -->\n\n## Verify\n" in scored
    assert card.relabel(out, Labels(license="mit"))
    relabelled = path.read_text()
    assert "license: mit" in relabelled and f"{section.BEGIN}\n| table |\n{section.END}\n\n## Verify" in relabelled
    path.write_text(relabelled + "my own words\n")
    with pytest.raises(BismoothError, match="what was changed in it would be lost"):
        card.relabel(out, Labels(license="apache-2.0"))

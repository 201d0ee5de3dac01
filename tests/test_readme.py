import re
from pathlib import Path

import pytest
import typer
import yaml

from benchmarks import tables
from vllm_w8a8_bismooth.cli.main import app
from vllm_w8a8_bismooth.recipe import DEFAULTS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "RELEASE.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
TABLES = tables.every()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_the_committed_results(page):
    text = page.read_text()
    assert tables.put(text, TABLES) == text, f"python -m benchmarks.tables {page.relative_to(ROOT)}"


def test_every_table_is_shown():
    shown = "".join(page.read_text() for page in PAGES)
    for name, table in TABLES.items():
        assert f"<!-- {name} -->\n\n{table}\n" in shown, name


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_it_links_to_exists(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or anchor in headings(there), f"{target}#{anchor}"


def test_a_table_is_put_between_blank_lines():
    found, old = {"kernels of x.json": "| a |\n|--:|\n| 2 |"}, "| a |\n|--:|\n| 1 |\n| 0 |\n"
    for text in ("", old, f"{old}\n", f"\n{old}\n"):
        page = tables.put(f"before\n\n<!-- kernels of x.json -->\n{text}after\n", found)
        assert page == f"before\n\n<!-- kernels of x.json -->\n\n{found['kernels of x.json']}\n\nafter\n"


def test_the_readme_is_short_and_has_no_placeholders():
    text = README.read_text()
    assert len(text.split()) <= 1650
    assert not re.findall(r"<[^!>]+>", text.replace("\n<!--", ""))


def python_of(page: Path) -> list[str]:
    """The examples of a page."""
    return re.findall(r"```python\n(.+?)```", page.read_text(), re.DOTALL)


@pytest.fixture
def workplace(make_checkpoint, calibration_text, tmp_path, monkeypatch) -> Path:
    """The current folder has what examples name: SRC and text.txt."""
    make_checkpoint().rename(tmp_path / "SRC")
    calibration_text.rename(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.engine  # verify asks vLLM
def test_the_readmes_python_runs(workplace, capsys):
    (code,) = python_of(README)
    assert len(code.splitlines()) <= 10
    exec(code, {})
    assert (workplace / "DST" / "config.json").exists()
    assert capsys.readouterr().out == "[] True\n"


def test_the_python_of_the_page_on_python_runs(workplace, capsys):
    names: dict = {}
    for code in python_of(ROOT / "docs/python.md"):
        exec(code, names)
    said = capsys.readouterr().out
    assert "['model.layers.0.mlp.down_proj']" in said and "True [] []" in said
    assert "DST | holds another conversion" in said and "convert: 3 of 3" in said
    assert (workplace / "DST-8bit" / "config.json").exists()


def options() -> dict[str, str]:
    """Option -> methods that it goes with, as docs/converter.md has them."""
    table = (ROOT / "docs/converter.md").read_text().partition("\n## Options\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(--[a-z-]+)[^`]*` \| (.*?) ?\|", table, re.MULTILINE))


def test_the_table_of_options_is_that_of_the_command():
    parameters = typer.main.get_command(app).commands["convert"].params
    named = {each.opts[0] for each in parameters if each.param_type_name == "option"}
    assert options().keys() == named


def test_the_table_of_options_says_which_methods_they_go_with():
    for option, methods in options().items():
        name = option.removeprefix("--").replace("-", "_")
        takers = [method for method, given in DEFAULTS.items() if name in given]
        if takers:
            assert methods == ", ".join(f"`{method}`" for method in takers), option


def test_the_walks_name_what_there_is():
    """Every ``file:name`` of CONTRIBUTING.md is defined in that file."""
    places = re.findall(r"`([\w/]+\.(?:py|cpp|cu)):(\w+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(places) >= 25
    missing = []
    for file, name in places:
        path = ROOT / file if file.startswith("csrc") else ROOT / "vllm_w8a8_bismooth" / file
        defined = rf"^\s*(?:def|class|\w[\w:<>, ]*) {name}\b[(:]"
        if not path.exists() or not re.search(defined, path.read_text(), re.MULTILINE):
            missing.append(f"{file}:{name}")
    assert not missing


def test_the_bug_form_asks_for_what_helps():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    required = {field["id"] for field in form["body"] if field.get("validations", {}).get("required")}
    assert required == {"doctor", "command", "message", "model"}
    assert "bismooth doctor --json" in str(form)

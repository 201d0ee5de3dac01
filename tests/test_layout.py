"""What test modules share lies in tests/support, so that each of them can be read, run and moved alone."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def imported(file: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_of_the_tests_only_support_is_imported():
    files = {file: imported(file) for file in TESTS.rglob("*.py")}
    assert any(name.startswith("tests.support.") for names in files.values() for name in names)
    strange = {
        (str(file.relative_to(TESTS)), name)
        for file, names in files.items()
        for name in names
        if name.split(".")[0] == "tests" and not name.startswith("tests.support")
    }
    assert strange == set()


def test_rooms_are_those_of_the_package():
    """benchmarks/ and csrc/ lie beside the package, data and support serve the tests, families the whole."""
    package = TESTS.parent / "vllm_w8a8_bismooth"
    rooms = {file.parent.name for file in TESTS.rglob("test_*.py") if file.parent != TESTS}
    assert rooms - {"benchmarks", "families"} <= {folder.name for folder in package.iterdir() if folder.is_dir()}

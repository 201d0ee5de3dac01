"""Who imports whom: the rooms of the package in one order, no circle, and the three parts that keep apart."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "vllm_w8a8_bismooth"
OFFLINE = (
    "errors", "switch", "progress", "grouping", "fourbits", "patterns", "shell", "model", "discovery", "checkpoint",
    "recipe", "method", "measure", "report", "conversion", "engine", "verification", "scoring", "publication", "given",
    "api", "doctor", "cli", "__main__",
)  # fmt: skip
"""Rooms and single modules of the offline half; each may import those before it."""
MORE = {"doctor": {"ops"}}
"""What a room may import besides; the doctor looks for the compiled kernels."""
APART = {
    "ops": {"errors", "fourbits", "grouping", "ops", "switch"},
    "serving": {"errors", "fourbits", "grouping", "switch", "checkpoint.files", "checkpoint.reader", "ops", "serving"},
}
"""All that a part beside the offline half may import of the package, and its root."""
LONGEST = 400
"""Lines of a module."""


def modules(package: str) -> dict[str, Path]:
    """Dotted name below a package, ``""`` for its root -> file."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules(PACKAGE)


def imported(source: str) -> Iterator[str]:
    """Every name that is imported, wherever that stands; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def targets(source: str) -> set[str]:
    """The modules of the package that are imported."""
    found = set()
    for name in imported(source):
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            inside = name.removeprefix(PACKAGE).removeprefix(".")
            found.add(inside if inside in MODULES else inside.rpartition(".")[0])
    return found


@functools.cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    return {name: targets(path.read_text()) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.partition(".")[0]


def violations(edges: dict[str, set[str]]) -> Iterator[str]:
    """Imports that run back, or across from one part to another."""
    for module, others in edges.items():
        for other in others - {""}:
            if module == "":  # the entry point that vLLM calls, and the functions that users import
                allowed = other in ("serving", "api")
            elif room(module) in APART:
                allowed = any(f"{other}.".startswith(f"{name}.") for name in APART[room(module)])
            else:
                before = OFFLINE[: OFFLINE.index(room(module)) + 1]
                allowed = room(other) in {*before, *MORE.get(room(module), ())}
            if not allowed:
                yield f"{module} imports {other}"


def circle(edges: dict[str, set[str]]) -> set[str]:
    """The modules that are in a circle, or lead into one. The root is left out: its entry point leads to serving."""
    left = {module: others - {"", module} for module, others in edges.items() if module}
    while done := {module for module, others in left.items() if not others}:
        left = {module: others - done for module, others in left.items() if module not in done}
    return set(left)


def test_imports_run_one_way():
    assert not list(violations(graph()))


def test_no_circles():
    assert not circle(graph())


def test_only_serving_imports_vllm():
    for module, path in MODULES.items():
        if room(module) != "serving":
            assert not [name for name in imported(path.read_text()) if name.partition(".")[0] == "vllm"], module


def test_no_module_is_too_long():
    lengths = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert not {module: length for module, length in lengths.items() if length > LONGEST}


def test_test_modules_share_nothing_but_support():
    for module, path in modules("tests").items():
        others = {name for name in imported(path.read_text()) if name.startswith("tests.")}
        assert all(name.startswith("tests.support") for name in others), f"{module} imports {others}"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("checkpoint.reader", "from vllm_w8a8_bismooth.method import rows"),
        ("recipe", "def late():\n    import vllm_w8a8_bismooth.conversion.plan"),
        ("conversion.plan", "from vllm_w8a8_bismooth.serving.guard import check_files"),
        ("ops.reference", "from vllm_w8a8_bismooth.checkpoint import files"),
        ("serving.guard", "from vllm_w8a8_bismooth.checkpoint import layout"),
        ("method.rows", "from vllm_w8a8_bismooth import ops"),
    ],
)
def test_imports_that_run_back_are_noticed(module, line):
    (found,) = violations({module: graph()[module] | targets(line)})
    assert found.startswith(f"{module} imports")


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("checkpoint.files", "if TYPE_CHECKING:\n    from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint"),
        ("serving.config", "def late():\n    from vllm_w8a8_bismooth.serving.claim import Claim"),
    ],
)
def test_circles_are_noticed(module, line):
    edges = graph()
    assert module in circle(edges | {module: edges[module] | targets(line)})

"""What serving/ takes from vLLM and what it overrides there, held against the vLLM that is there."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import vllm

from vllm_w8a8_bismooth import serving
from vllm_w8a8_bismooth.serving import versions

FILES = sorted(Path(serving.__file__).parent.glob("*.py"))


def imports(file: Path) -> list[tuple[str, str]]:
    """Module and name of everything that a file imports from vLLM, wherever in it."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    return [(n.module, alias.name) for n in nodes if n.module.split(".")[0] == "vllm" for alias in n.names]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_imports(file):
    """Also those that only run later. What a release may lack goes through ``versions.SINCE``."""
    missing = [name for name in imports(file) if not hasattr(importlib.import_module(name[0]), name[1])]
    assert missing == []


@pytest.mark.parametrize("name", versions.SINCE)
def test_what_some_releases_lack(name):
    assert (versions.find(name) is not None) == (vllm.__version_tuple__[:2] >= versions.SINCE[name][1])


def overrides() -> list[tuple[str, type, type]]:
    """Name, our class and vLLM's for every function that a class of serving/ overrides."""
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(serving.__path__, f"{serving.__name__}.")]
    ours = {c for m in modules for c in vars(m).values() if inspect.isclass(c) and c.__module__ == m.__name__}
    return [
        (name, c, base)
        for c in ours
        for name in vars(c)
        for base in c.__mro__[1:]
        if name in vars(base) and base.__module__.startswith("vllm.") and inspect.isroutine(getattr(base, name))
    ]


def test_overrides_take_what_vllm_gives():
    """Whatever vLLM's function can be called with, by place or by name, ours can."""
    found = overrides()
    assert {name for name, *_ in found} >= {"override_quantization_method", "from_config", "_get_scheme_from_parts"}
    for name, ours, base in found:
        mine, theirs = (inspect.signature(getattr(c, name)) for c in (ours, base))
        given = list(theirs.parameters.values())
        if name == "__init__" or any(p.kind == p.VAR_POSITIONAL for p in given):
            continue  # called by us alone; says nothing of what it takes
        owner = [given.pop(0)] if inspect.isfunction(inspect.getattr_static(base, name)) else []
        by_place = [p for p in given if p.kind == p.POSITIONAL_OR_KEYWORD]
        by_name = {p.name: p for p in given if p not in by_place}
        if any(p.kind == p.VAR_KEYWORD for p in given):  # what else we name is among those
            by_name |= {n: p for n, p in mine.parameters.items() if n not in theirs.parameters}
        try:
            mine.bind(*owner, *by_place, **by_name)
            mine.bind(*owner, **{p.name: p for p in by_place}, **by_name)
        except TypeError as error:
            raise AssertionError(f"{ours.__name__}.{name}{mine} for {base.__name__}.{name}{theirs}") from error

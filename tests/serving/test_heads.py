"""What the converter believes of the heads of vLLM's classes, held against the sources of the installed vLLM."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from vllm_w8a8_bismooth.model import classes

_MODULES = {"cohere": "commandr", "cohere2": "commandr", "gemma3n_text": "gemma3n"}
"""Type of a model -> vLLM's module, where they have different names."""
_DRAFTERS = re.compile("Eagle|MTP|DSpark|DFlash|XPress")
TYPES = [kind for kinds in classes._FLOAT_HEADS.values() for kind in kinds.split()]


def folder() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model_executor" / "models"


def why_in_float(source: str) -> str | None:
    """Why vLLM cannot give INT8 to a head of a module's language models, by how the module makes it."""
    heads = [
        {keyword.arg for keyword in node.keywords}
        for made in ast.parse(source).body
        if isinstance(made, ast.ClassDef) and made.name.endswith("ForCausalLM") and not _DRAFTERS.search(made.name)
        for node in ast.walk(made)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ParallelLMHead"
    ]
    if any("quant_config" not in given for given in heads):
        return classes._NO_CONFIG
    if any("prefix" not in given for given in heads):
        return classes._NO_NAME
    always = not heads and "logits_processor(self.model.embed_tokens" in source
    return classes._EMBEDDING if always else None


@pytest.mark.parametrize("model_type", TYPES)
def test_what_is_refused_has_its_reason(model_type):
    module = folder() / f"{_MODULES.get(model_type, model_type)}.py"
    if not module.exists():
        pytest.skip("this vLLM has no such class")
    assert why_in_float(module.read_text()) == classes.float_head({"model_type": model_type})


def test_what_has_a_reason_is_refused():
    known = {_MODULES.get(model_type, model_type) for model_type in TYPES}
    modules = [path for path in sorted(folder().glob("*.py")) if why_in_float(path.read_text())]
    assert len(modules) > 10
    elsewhere, since_mended = {"qwen3_omni_moe_thinker", "nemotron_parse3_5"}, {"gemma", "plamo2"}  # of 0.26
    assert {path.stem for path in modules} - known <= elsewhere | since_mended

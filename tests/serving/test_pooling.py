"""Embedding models, classifiers and reward models: converted, and served by vLLM's pooling runner as the source is."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.testbed import PYTHON
from tests.support.command import run
from tests.support.damage import edit_json
from tests.support.embedders import projector
from tests.support.models import tiny_model, write_checkpoint
from tests.support.predictions import PECULIAR, SERVABLE
from tests.support.rename import architecture, bare, edit_tensors, renamed
from tests.support.workers import pooling

pytestmark = [pytest.mark.slow, pytest.mark.engine]
PROMPTS = [
    "def read(path):\n    with open(path) as file:\n        return file.read()\n",
    "class Node:\n    def __init__(self, value, next=None):\n        self.value = value\n",
    "import os\nfor name in os.listdir('.'):\n    print(name)\n",
    "try:\n    import json\nexcept ImportError:\n    json = None\n",
]
TEXT = Path(PYTHON.model).parent / "calibration.txt"


def decoder(folder: Path) -> Path:
    """The trained test bed without its head, under the names of the bare decoder."""
    AutoModel.from_pretrained(PYTHON.model, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(PYTHON.model).save_pretrained(folder)
    return folder


def headed(folder: Path, source: Path, name: str, head: dict[str, tuple[int, ...]], **changes) -> Path:
    """The same with another head."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(1)
    edit_tensors(
        folder,
        lambda tensors: (
            {f"model.{n}": t for n, t in tensors.items()}
            | {n: (torch.randn(shape, generator=generator) / 20).bfloat16() for n, shape in head.items()}
        ),
    )
    architecture(folder, name)
    edit_json(folder / "config.json", lambda config: config.update(changes))
    return folder


def small(folder: Path, model_type: str, name_of: Callable[[str], str | None], name: str, **changes) -> Path:
    """A model of random weights, its tensors and its class renamed."""
    model = tiny_model(model_type, **SERVABLE, **PECULIAR.get(model_type, {}), **changes)
    write_checkpoint(folder, model, sharded=False)
    renamed(folder, name_of)
    architecture(folder, name)
    return folder


def gemma(folder: Path) -> Path:
    """As EmbeddingGemma is stored: the bare decoder, its norms around each half of a block, a projector."""
    small(folder, "gemma3_text", bare, "Gemma3TextModel")
    projector(folder, width=128)
    return folder


def reward(folder: Path) -> Path:
    """As Qwen2.5-Math-RM is stored: a head of two linears, to which vLLM gives no names."""
    small(folder, "qwen2", lambda name: None if name.startswith("lm_head") else name, "Qwen2ForRewardModel")
    head = {"score.0.weight": (128, 128), "score.0.bias": (128,), "score.2.weight": (1, 128), "score.2.bias": (1,)}
    generator = torch.Generator().manual_seed(1)
    more = {n: (torch.randn(shape, generator=generator) / 10).bfloat16() for n, shape in head.items()}
    edit_tensors(folder, lambda tensors: tensors | more)
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, dict]:
    """What vLLM answers on each source and on its conversion, ``<name>-int8``."""
    folder = tmp_path_factory.mktemp("pooling")
    plain = decoder(folder / "plain")
    projected = shutil.copytree(plain, folder / "projected")
    projector(projected, width=384)
    labels = {"id2label": {str(i): f"LABEL_{i}" for i in range(3)}, "label2id": {f"LABEL_{i}": i for i in range(3)}}
    sources = {
        "projected": (projected, "embed"),
        "classifier": (
            headed(
                folder / "classifier", plain, "LlamaForSequenceClassification", {"score.weight": (3, 384)}, **labels
            ),
            "classify",
        ),
        "gemma": (gemma(folder / "gemma"), "embed"),
        "reward": (reward(folder / "reward"), "reward"),
    }
    models = {}
    for name, (source, task) in sources.items():
        out = folder / f"{name}-int8"
        code, message = run("convert", source, out, "--calibration", TEXT, "--calibration-tokens", "4096")
        assert code == 0, message
        code, message = run("verify", out, "--against", source)
        assert code == 0, message
        models |= {name: (source, task), f"{name}-int8": (out, task)}
    found, log = pooling.run(folder, PROMPTS, models)
    assert found.keys() == models.keys(), log[-4000:]
    for name, answer in found.items():
        assert "error" not in answer, (name, answer, log[-4000:])
    return found


def vectors(answers: dict[str, dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array(answers[n]["vectors"]) for n in (name, f"{name}-int8"))


@pytest.mark.parametrize("name", ["projected", "gemma"])
def test_vectors_point_where_the_source_s_do(answers, name):
    before, after = vectors(answers, name)
    assert before.shape == after.shape == (len(PROMPTS), 32)
    cosines = (before * after).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(after, axis=-1)
    assert cosines.min() >= 0.999, cosines
    assert answers[f"{name}-int8"]["quantization"] == "w8a8_bismooth"
    assert answers[f"{name}-int8"]["linears"] == {"None": 4 * (3 if name == "gemma" else 6)}


def test_classes_are_as_likely(answers):
    before, after = vectors(answers, "classifier")
    assert before.shape == after.shape == (len(PROMPTS), 3) and np.ptp(before) > 0.01
    assert np.abs(before - after).max() < 0.03  # 0.011 was seen


def test_rewards_are_as_high(answers):
    before, after = vectors(answers, "reward")
    assert before.shape == after.shape == (len(PROMPTS), 1) and np.ptp(before) > 0
    assert answers["reward-int8"]["linears"] == {"None": 4 * 3}, "the head stays in float"
    assert np.abs(before - after).max() < 0.15  # of a range of 0.8; 0.065 was seen

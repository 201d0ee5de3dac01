"""The record of a config: the same every time, kept, and refused with a reason where no model can be made."""

import json
from pathlib import Path

import pytest

from tests.support.models import tiny_config
from vllm_w8a8_bismooth.discovery import discover as module
from vllm_w8a8_bismooth.discovery.discover import discover
from vllm_w8a8_bismooth.discovery.find import find
from vllm_w8a8_bismooth.discovery.origin import MOST_BLOCKS, MOST_EXPERTS
from vllm_w8a8_bismooth.discovery.record import Discovery
from vllm_w8a8_bismooth.errors import BismoothError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bismooth" / "discovery"


@pytest.fixture(scope="module")
def config() -> dict:
    return tiny_config("llama", num_hidden_layers=2).to_dict()


def test_a_record_is_kept_and_the_same_every_time(config, cache):
    first = discover(config)
    (kept,) = cache.iterdir()
    assert kept.read_text() == json.dumps(first.to_json())
    kept.write_text(kept.read_text().replace("norm->qkv", "kept"))
    assert "kept" in {site.name for site in discover(config).layers[0].sites}
    kept.write_text("{")  # a file that cannot be read is as none
    assert discover(config) == first
    assert kept.read_text() == json.dumps(first.to_json())


def test_another_config_has_another_record(config, cache):
    discover(config)
    discover({**config, "torch_dtype": "float16", "architectures": ["Other"]})
    assert len(list(cache.iterdir())) == 1
    discover({**config, "attention_bias": True})
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_none(config, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert discover(config).model_type == "llama"


def test_progress_is_per_block(config):
    seen = []
    find(config, progress=lambda stage, done, total, written=0: seen.append((stage, done, total)))
    assert seen == [("discover", 1, 2), ("discover", 2, 2)]


def test_json_has_experts_once():
    mixture = tiny_config("mixtral", num_local_experts=64, num_hidden_layers=2).to_dict()
    found = find(mixture)
    assert found.experts == (64,)
    assert len(found.layers[0].experts) == 3 * 64 and len(found.layers[0].sites) == 3 + 64
    text = json.dumps(found.to_json())
    assert len(text) < 5000 and "experts.{}.w1" in text and "experts.1.w1" not in text
    assert Discovery.from_json(json.loads(text)) == found


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (dict(num_hidden_layers=MOST_BLOCKS + 1), "num_hidden_layers"),
        (dict(num_hidden_layers=10**12), "num_hidden_layers"),
        (dict(num_experts=MOST_EXPERTS + 1), "num_experts"),
        (dict(hidden_size=2**40), "hidden_size"),
        (dict(num_attention_heads=2**30), "num_attention_heads"),
        (dict(layer_types=["full_attention"] * 10**5), "layer_types"),
        (dict(text_config=dict(num_hidden_layers=10**9)), "num_hidden_layers"),
        (dict(model_type="no-such-model"), "no-such-model"),
        (dict(model_type=None), "transformers refuses it"),
        (dict(hidden_size=-1), "transformers refuses it"),
        (dict(hidden_act="no-such-function"), "no-such-function"),
        (dict(num_attention_heads=0), "refuses|builds no model|runs"),
    ],
)
def test_configs_of_which_no_model_is_made_are_refused(config, changes, what):
    with pytest.raises(BismoothError, match=what) as caught:
        discover({**config, **changes})
    assert "--method rtn" in str(caught.value)


CONFIGURATION = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=160, **rest):
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.vocab_size = num_hidden_layers, vocab_size
        super().__init__(**rest)
"""
MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_own import OwnConfig

class OwnBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln = nn.LayerNorm(config.hidden_size)
        self.wi = nn.Linear(config.hidden_size, config.intermediate_size)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return x + self.wo(self.wi(self.ln(x)).relu())

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList([OwnBlock(config) for _ in range(config.num_hidden_layers)])
        self.ln = nn.LayerNorm(config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, use_cache=False):
        x = self.wte(input_ids)
        for block in self.stack:
            x = block(x)
        return CausalLMOutput(logits=self.out(self.ln(x)))
"""


def test_a_models_own_code_runs_only_if_it_may(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    config = dict(
        model_type="own",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        vocab_size=160,
        auto_map={"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
    )
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BismoothError, match="--trust-remote-code"):
        discover(config)
    found = discover(config, code=folder)
    assert found.blocks == (0, 0, 0) and found.names.blocks == "stack." and found.names.head == "out.weight"
    sites = {(site.producer, site.consumers, site.rows) for site in found.layers[0].sites}
    assert sites == {("wi", ("wo",), None), ("ln", ("wi",), None)}
    assert module.discover(config, code=folder) == found

"""The record of a config: the same every time, kept, and refused with a reason where no model can be made."""

import json
import os
from pathlib import Path

import pytest

from tests.support import own
from tests.support.models import tiny_config
from vllm_w8a8_bismooth.discovery import discover as module
from vllm_w8a8_bismooth.discovery.bounds import MOST_BLOCKS, MOST_EXPERTS
from vllm_w8a8_bismooth.discovery.discover import discover
from vllm_w8a8_bismooth.discovery.find import find
from vllm_w8a8_bismooth.discovery.record import Discovery
from vllm_w8a8_bismooth.errors import BismoothError, UnknownModel, Unproven


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
    ("kind", "changes", "what"),
    [
        (BismoothError, dict(num_hidden_layers=MOST_BLOCKS + 1), "num_hidden_layers"),
        (BismoothError, dict(num_hidden_layers=10**12), "num_hidden_layers"),
        (BismoothError, dict(num_experts=MOST_EXPERTS + 1), "num_experts"),
        (BismoothError, dict(hidden_size=2**40), "hidden_size"),
        (BismoothError, dict(num_attention_heads=2**30), "num_attention_heads"),
        (BismoothError, dict(layer_types=["full_attention"] * 10**5), "layer_types"),
        (BismoothError, dict(text_config=dict(num_hidden_layers=10**9)), "num_hidden_layers"),
        (UnknownModel, dict(model_type="no-such-model"), "no-such-model"),
        (UnknownModel, dict(model_type=None), "model_type = None is unknown"),
        (BismoothError, dict(text_config=json.loads('{"a":' * 40 + "0" + "}" * 40)), "nested more than 32 deep"),
        (BismoothError, dict(hidden_size=-1), "hidden_size = -1 is no positive integer"),
        (BismoothError, dict(hidden_act="no-such-function"), "no-such-function"),
        (BismoothError, dict(num_attention_heads=0), "is no positive integer"),
    ],
)
def test_configs_of_which_no_model_is_made_are_refused(config, kind, changes, what):
    with pytest.raises(BismoothError, match=what) as caught:
        discover({**config, **changes})
    assert type(caught.value) is kind
    assert ("--method rtn" in str(caught.value)) is issubclass(kind, Unproven), "absurd ones are converted in no way"


def test_a_models_own_code_runs_only_if_it_may(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / f"discovered{os.getpid()}"  # transformers keeps code by this name, for all processes
    config = own.write_code(folder, num_hidden_layers=3)
    with pytest.raises(BismoothError, match="--trust-remote-code"):
        discover(config)
    found = discover(config, code=folder)
    assert found.blocks == (0, 0, 0) and found.names.blocks == "stack." and found.names.head == "out.weight"
    sites = {(site.producer, site.consumers, site.rows) for site in found.layers[0].sites}
    assert sites == {("wi", ("wo",), None), ("ln", ("wi",), None)}
    assert module.discover(config, code=folder) == found


def test_experts_that_are_rows_of_one_matrix():
    """DBRX's: each is a part of a parameter that is no stack, and only whole ones could be told apart before."""
    config = dict(
        model_type="dbrx",
        d_model=128,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        vocab_size=160,
        tie_word_embeddings=False,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000.0},
        ffn_config={
            "ffn_hidden_size": 192,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
            "moe_normalize_expert_weights": 1.0,
        },
    )
    found = discover(config)
    (layer,) = found.templates
    assert found.proof.unseen == () and [site.name for site in layer.sites] == ["norm->Wqkv"]
    assert {f"ffn.experts.mlp.{name}" for name in ("w1", "v1", "w2")} < layer.floats.keys()
    # clipped values move nothing on to what reads them
    assert set(found.proof.dropped.values()) == {"does not hold where weights are large"}

"""A language model that transformers does not have: its code lies beside its config, as ``auto_map`` says."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.models import tiny_tokenizer

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
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from .configuration_own import OwnConfig

class OwnBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln = nn.LayerNorm(config.hidden_size)
        self.wi = nn.Linear(config.hidden_size, config.intermediate_size)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return x + self.wo(self.wi(self.ln(x)).relu())

class OwnFlat(PreTrainedModel):
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

class OwnMixing(OwnBlock):
    \"\"\"Reads a token's last one too, by a share that is in no checkpoint.\"\"\"

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("share", torch.linspace(0.1, 0.9, config.hidden_size), persistent=False)

    def forward(self, x):
        return super().forward(x + self.share * torch.cat([x[:, :1], x[:, :-1]], 1))

class OwnDecoder(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList([OwnMixing(config) for _ in range(config.num_hidden_layers)])
        self.ln = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids, use_cache=False):
        x = self.wte(input_ids)
        for block in self.stack:
            x = block(x)
        return BaseModelOutput(last_hidden_state=self.ln(x))

class OwnNested(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "transformer"

    def __init__(self, config):
        super().__init__(config)
        self.transformer = OwnDecoder(config)
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, use_cache=False):
        return CausalLMOutput(logits=self.out(self.transformer(input_ids).last_hidden_state))
"""
CLASSES = ("OwnFlat", "OwnNested")


def write_code(folder: Path, model_class: str = CLASSES[0], **changes: Any) -> dict[str, Any]:
    """Config and code, without weights; returns the config."""
    folder.mkdir()
    # transformers keeps classes by what is in their files, and knows one model of each config
    (folder / "configuration_own.py").write_text(f"{CONFIGURATION}# of {model_class}\n")
    (folder / "modeling_own.py").write_text(f"{MODELING}# of {model_class}\n")
    config = {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "vocab_size": 160,
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": f"modeling_own.{model_class}",
        },
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return config


def write(folder: Path, model_class: str) -> Path:
    """The same with random weights and a tokenizer. Runs the code."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    write_code(folder, model_class)
    tiny_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(load_config(folder), trust_remote_code=True)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.dim() == 1 else 0.08
        parameter.data.normal_(1.0 if name.endswith("ln.weight") else 0.0, scale)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def load_config(folder: Path):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=True)

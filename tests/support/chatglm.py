"""A model as ChatGLM's second and third generation are, whose code is their own.

States are ``[length, batch, hidden]``, blocks return tuples, the head is a part of the trunk, and nothing says which
module it is.
"""

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.models import tiny_tokenizer

CONFIGURATION = """
from transformers import PretrainedConfig

class ChatGLMConfig(PretrainedConfig):
    model_type = "chatglm"

    def __init__(
        self,
        num_layers=2,
        padded_vocab_size=160,
        hidden_size=192,
        ffn_hidden_size=320,
        kv_channels=32,
        num_attention_heads=6,
        seq_length=256,
        layernorm_epsilon=1e-5,
        add_bias_linear=False,
        add_qkv_bias=False,
        multi_query_group_num=2,
        **rest,
    ):
        self.num_layers = num_layers
        self.vocab_size = self.padded_vocab_size = padded_vocab_size
        self.hidden_size, self.ffn_hidden_size, self.kv_channels = hidden_size, ffn_hidden_size, kv_channels
        self.num_attention_heads, self.multi_query_group_num = num_attention_heads, multi_query_group_num
        self.seq_length, self.layernorm_epsilon = seq_length, layernorm_epsilon
        self.add_bias_linear, self.add_qkv_bias = add_bias_linear, add_qkv_bias
        super().__init__(**rest)
"""
MODELING = """
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from .configuration_chatglm import ChatGLMConfig

class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        size = x.float().square().mean(-1, keepdim=True)
        return (x * torch.rsqrt(size + self.eps)).to(x.dtype) * self.weight

class RotaryEmbedding(nn.Module):
    \"\"\"Half of a head's channels turn, in neighbouring pairs.\"\"\"

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, channels, 2).float() / channels))

    def forward(self, length):
        angles = torch.outer(torch.arange(length, device=self.inv_freq.device).float(), self.inv_freq)
        return torch.stack([angles.cos(), angles.sin()], dim=-1)[:, None]  # [length, 1, pairs, 2]

def rotated(x, table):
    cos, sin = table.to(x.dtype)[:, :, None].unbind(-1)
    pairs = x[..., : 2 * cos.shape[-1]].unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., 2 * cos.shape[-1] :]], dim=-1)

class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.channels, self.heads = config.kv_channels, config.num_attention_heads
        self.groups = config.multi_query_group_num
        width, qkv = self.heads * self.channels, (self.heads + 2 * self.groups) * self.channels
        biased = config.add_bias_linear or config.add_qkv_bias
        self.query_key_value = nn.Linear(config.hidden_size, qkv, bias=biased)
        self.dense = nn.Linear(width, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x, attention_mask, table):
        heads = self.query_key_value(x).unflatten(-1, (-1, self.channels))
        q, k, v = heads.split([self.heads, self.groups, self.groups], dim=-2)
        q, k = rotated(q, table), rotated(k, table)
        k, v = (part.repeat_interleave(self.heads // self.groups, dim=-2) for part in (k, v))
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, attention_mask, is_causal=attention_mask is None)
        return self.dense(mixed.permute(2, 0, 1, 3).flatten(-2))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x):
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(functional.silu(gate) * up)

class GLMBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden_states, attention_mask, rotary_pos_emb, kv_cache=None, use_cache=False):
        x = hidden_states + self.self_attention(self.input_layernorm(hidden_states), attention_mask, rotary_pos_emb)
        return x + self.mlp(self.post_attention_layernorm(x)), kv_cache

class GLMTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([GLMBlock(config) for _ in range(config.num_layers)])
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden_states, attention_mask, rotary_pos_emb, use_cache=False):
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states, attention_mask, rotary_pos_emb, use_cache=use_cache)
        return self.final_layernorm(hidden_states)

class Embedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids):
        return self.word_embeddings(input_ids).transpose(0, 1).contiguous()

class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["GLMBlock"]

    def _init_weights(self, module):
        return

class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryEmbedding(config.kv_channels // 2)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding.word_embeddings

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        table = self.rotary_pos_emb(input_ids.shape[1])
        hidden_states = self.encoder(self.embedding(input_ids), None, table, use_cache=bool(use_cache))
        return BaseModelOutput(last_hidden_state=hidden_states)

class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, labels=None):
        hidden_states = self.transformer(input_ids, attention_mask, use_cache).last_hidden_state
        return CausalLMOutput(logits=self.transformer.output_layer(hidden_states).transpose(0, 1).contiguous())
"""
CONFIG = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "num_layers": 2,
    "padded_vocab_size": 160,
    "hidden_size": 192,
    "ffn_hidden_size": 320,
    "kv_channels": 32,
    "num_attention_heads": 6,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "seq_length": 256,
    "layernorm_epsilon": 1e-5,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
    "fp32_residual_connection": False,
    "apply_residual_connection_post_layernorm": False,
    "tie_word_embeddings": False,
    "quantization_bit": 0,
    "torch_dtype": "float32",
}


def write(folder: Path, **changes: Any) -> Path:
    """Save config, code, random weights and a tokenizer; runs the code. Returns the folder."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "configuration_chatglm.py").write_text(CONFIGURATION)
    (folder / "modeling_chatglm.py").write_text(MODELING)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    tiny_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    model = build(folder)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
        else:
            parameter.data.normal_(0, 0.08)
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def build(folder: Path) -> torch.nn.Module:
    """The model of a folder's config and code, without its weights, in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32).eval()

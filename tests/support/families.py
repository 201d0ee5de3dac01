"""Small real models of many types, made by transformers with random weights: every kind of block, every width its own.

The numbers are those that vLLM's CPU kernels take, too: heads of 32 or 64 channels, latents of 512 (MLA).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.support.damage import edit_json
from tests.support.models import tiny_tokenizer

_HIDDEN, _BLOCKS, _HEAD, _INNER = 192, 2, 64, 320
_SIZES = {
    "hidden_size n_embd d_model embed_dim word_embed_proj_dim conv_dim block_dim": _HIDDEN,
    "num_hidden_layers n_layer n_layers num_layers": _BLOCKS,
    "num_attention_heads n_head n_heads": 6,
    "num_key_value_heads num_kv_heads": 2,
    "head_dim global_head_dim": _HEAD,
    "intermediate_size ffn_dim ffn_hidden_size n_inner intermediate_size_mlp": _INNER,
    "vocab_size vocab_size_per_layer_input": 160,
    "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length seq_length": 256,
    "sliding_window attention_chunk_size index_topk": 16,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts": 2,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size": 224,
    "n_shared_experts moe_num_shared_experts n_group topk_group num_expert_group": 1,
    "moe_layer_start_index first_k_dense_replace": 1,
    "q_lora_rank": 352,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim v_head_dim": 64,
    "index_head_dim": 64,
    "index_n_heads": 2,
    "linear_key_head_dim linear_value_head_dim linear_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads linear_num_heads": 4,
    "mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size": 16,
    "mamba_d_head mamba_head_dim": 32,
    "mamba_n_heads mamba_num_heads": 12,
    "mamba_n_groups n_groups": 1,
    "mamba_d_ssm": 384,
    "mamba_d_conv conv_kernel": 4,
    "mamba_dt_rank time_step_rank": 8,
    "mamba_expand expand": 2,
    "hidden_size_per_layer_input block_multiple_of": 32,
    "laurel_rank": 16,
}
"""Keys of configs, in all spellings -> the number."""
_SIZE_OF = {key: size for keys, size in _SIZES.items() for key in keys.split()}
_TOWER = {
    "hidden_size": 64,
    "embed_dim": 64,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": _HIDDEN,
    "projection_dim": 64,
    "spatial_merge_size": 2,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
    "head_dim": 32,
    "vision_output_dim": 128,
    "projector_input_dim": 128,
    "projector_output_dim": 128,
}
"""The same of a vision tower."""
_TOWERS = ("vision_config", "audio_config")
_EACH_BLOCK = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
_OWN = ("model_type", "transformers_version", "architectures", "dtype", "id2label", "label2id")
_LINEAR = dict(num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"])
_FALCON = dict(
    ffn_hidden_size=4 * _HIDDEN,
    bias=False,
    alibi=False,
    new_decoder_architecture=False,
    multi_query=True,
    parallel_attn=True,
)
_GEMMA4 = dict(
    num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], per_layer_config={1: {"head_dim": 128}}
)
_MLA = dict(head_dim=64, num_key_value_heads=6)

_NO_CLASS = "vLLM has no class of it, nor can it use that of transformers"
_MAMBA1 = "vLLM has no scan of Mamba-1 for CPUs"
_NO_TOWER = "vLLM's class imports torchvision, which is not here"

_FLOATS = {
    "altup.prediction_coefs": "gemma3n_text",
    "altup.modality_router": "gemma3n_text",
    "altup.correction_coefs": "gemma3n_text",
    "block_sparse_moe.gate": "mixtral phimoe minimax_m2 minimax kimi_linear",
    "block_sparse_moe.router.layer": "granitemoe granitemoeshared granitemoehybrid",
    "conv.conv": "lfm2 lfm2_moe",
    "feed_forward.gate": "lfm2_moe",
    "feed_forward.router": "llama4_text llama4 jamba",
    "linear_attn.conv1d": "qwen3_5_text qwen3_5 qwen3_next qwen3_5_moe_text",
    "linear_attn.in_proj_a": "qwen3_5_text qwen3_5 qwen3_5_moe_text",
    "linear_attn.in_proj_b": "qwen3_5_text qwen3_5 qwen3_5_moe_text",
    "linear_attn.in_proj_ba": "qwen3_next",
    "mamba.A_log": "jamba",
    "mamba.conv1d": "bamba falcon_h1 granitemoehybrid jamba",
    "mamba.dt_proj": "jamba",
    "mamba.in_proj": "jamba",
    "mamba.out_proj": "jamba",
    "mamba.x_proj": "jamba",
    "mixer.conv1d": "mamba2 nemotron_h nemotron_h@dense",
    "mixer.gate": "nemotron_h",
    "mlp.experts.down_proj": "gpt_oss",
    "mlp.experts.down_proj_bias": "gpt_oss",
    "mlp.experts.gate_up_proj": "gpt_oss",
    "mlp.experts.gate_up_proj_bias": "gpt_oss",
    "mlp.gate": (
        "qwen2_moe qwen3_moe qwen3_next qwen3_5_moe_text qwen3_vl_moe olmoe flex_olmo dots1 deepseek_v2 deepseek_v3 "
        "glm4_moe glm4_moe_lite ernie4_5_moe"
    ),
    "mlp.gate.wg": "hunyuan_v1_moe",
    "mlp.input_linear": "jetmoe",
    "mlp.moe_statics.e_score_correction_bias": "ernie4_5_moe",
    "mlp.output_linear": "jetmoe",
    "mlp.router": "gpt_oss",
    "mlp.router.layer": "jetmoe",
    "mlp.shared_expert_gate": "qwen2_moe qwen3_next qwen3_5_moe_text",
    "per_layer_input_gate": "gemma3n_text gemma4_text gemma4_text@moe",
    "per_layer_projection": "gemma3n_text gemma4_text gemma4_text@moe",
    "router.proj": "gemma4_text@moe",
    "self_attention.experts.input_linear": "jetmoe",
    "self_attention.experts.output_linear": "jetmoe",
    "self_attention.experts.router.layer": "jetmoe",
    "self_attn.A_log": "kimi_linear",
    "self_attn.b_proj": "kimi_linear",
    "self_attn.diagonal_decay": "minimax",
    "self_attn.indexer.weights_proj": "deepseek_v32",
    "self_attn.indexer.wk": "deepseek_v32",
    "self_attn.k_conv1d": "kimi_linear",
    "self_attn.key_decay": "minimax",
    "self_attn.q_conv1d": "kimi_linear",
    "self_attn.query_decay": "minimax",
    "self_attn.slope_rate": "minimax",
    "self_attn.v_conv1d": "kimi_linear",
}
"""A module inside the blocks whose matrices stay in float -> the families that have it."""


def _mrope(*pairs: int) -> dict[str, Any]:
    """How many pairs of a head's channels turn with time, height and width."""
    return {"text_config": {"rope_parameters": {"mrope_section": list(pairs)}}}


@dataclass(frozen=True)
class Family:
    """A type of model, or one of its layouts.

    Attributes:
        name: the type, perhaps with ``@`` and the layout.
        changes: to the config that the sizes make.
        architecture: as published checkpoints say it, where transformers says it otherwise.
        dtype: in which vLLM computes.
        uncalibrated: whether calibration refuses it.
        apart: how many more linears vLLM has than model/fusions.py merges: its class keeps some apart.
        unserved: why vLLM does not serve it on a CPU; empty if it does.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = ""
    dtype: str = "float32"
    uncalibrated: bool = False
    apart: int = 0
    unserved: str = ""

    @property
    def model_type(self) -> str:
        return self.name.partition("@")[0]

    @property
    def floats(self) -> set[str]:
        """Modules inside the blocks whose matrices stay in float."""
        return {module for module, families in _FLOATS.items() if self.name in families.split()}

    def config(self) -> Any:
        """Transformers' config."""
        from transformers import AutoConfig

        try:  # some lists are checked against others as soon as a config is made
            default = AutoConfig.for_model(self.model_type, **self.changes)
        except Exception:
            default = AutoConfig.for_model(self.model_type)
        entries = _merged(_fitted(default.to_dict()), self.changes)
        return AutoConfig.for_model(self.model_type, **{k: v for k, v in entries.items() if k not in _OWN})

    def model(self) -> torch.nn.Module:
        """Random weights, in fp32: vectors moved away from how their class begins."""
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        torch.manual_seed(0)
        config = self.config()
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn(parameter.shape)
                else:
                    parameter.normal_(0, 0.08)
        return model

    def write(self, folder: Path) -> Path:
        """Save model and tokenizer; returns the folder."""
        self.model().save_pretrained(folder)
        if self.architecture:
            edit_json(folder / "config.json", lambda config: config.update(architectures=[self.architecture]))
        tiny_tokenizer().save_pretrained(folder)
        return folder


def _merged(entries: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Entries with changes, also inside mappings that both have."""
    found = dict(entries)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = _merged(found[key], value) if both else value
    return found


def _fitted(entries: Mapping[str, Any]) -> dict[str, Any]:
    """A config's entries with the sizes above."""
    found: dict[str, Any] = {}
    for key, value in entries.items():
        if isinstance(value, dict) and key in _TOWERS:
            found[key] = {k: _TOWER.get(k, v) if v is not None else v for k, v in value.items()}
        elif isinstance(value, dict) and key.endswith("_config"):
            found[key] = _fitted(value)
        elif key in _SIZE_OF and value is not None and not isinstance(value, bool):
            found[key] = [_SIZE_OF[key]] * _BLOCKS if isinstance(value, list) else _SIZE_OF[key]
        elif key in _EACH_BLOCK and isinstance(value, list):
            found[key] = value[:_BLOCKS]
        elif key.endswith("token_id") and value is not None:
            found[key] = 1
        else:
            found[key] = value
    return found


FAMILIES = {
    family.name: family
    for family in (
        # the original decoders
        Family("gpt2"),
        Family("gpt_bigcode"),
        Family(
            "gpt_neo",
            dict(num_layers=2, attention_types=[[["global", "local"], 1]], attention_layers=["global", "local"]),
            unserved=_NO_CLASS,
        ),
        Family("gpt_neox"),
        Family("gptj", dict(rotary_dim=16)),
        Family("codegen", dict(rotary_dim=16, n_head=4), unserved=_NO_CLASS),
        Family("opt"),
        Family("opt@350m", dict(word_embed_proj_dim=96, do_layer_norm_before=False)),
        Family("bloom"),
        Family("mpt", unserved=_NO_CLASS),
        Family("falcon@7b", _FALCON),
        Family("falcon@40b", dict(_FALCON, new_decoder_architecture=True, num_kv_heads=2)),
        Family(
            "falcon@rw", dict(_FALCON, alibi=True, bias=True, parallel_attn=False, multi_query=False, num_kv_heads=6)
        ),
        Family("persimmon"),
        Family("stablelm"),
        Family(
            "stablelm@12b",
            dict(use_parallel_residual=True, qk_layernorm=True),
            unserved="vLLM's class has neither parallel residuals nor norms of queries and keys",
        ),
        Family("phi", dict(num_key_value_heads=6)),
        # like llama
        Family("llama"),
        Family("mistral"),
        Family("ministral", dict(head_dim=64)),
        Family("ministral3"),
        Family("qwen2"),
        Family("qwen3"),
        Family("phi3"),
        Family("granite"),
        Family("smollm3"),
        Family("seed_oss"),
        Family("arcee"),
        Family("helium", dict(head_dim=32)),
        Family("bitnet"),
        Family("apertus"),
        Family("exaone4"),
        Family("hunyuan_v1_dense", dict(head_dim=64, num_key_value_heads=2)),
        Family("ernie4_5"),
        Family("starcoder2"),
        Family("nemotron", dict(head_dim=32, num_key_value_heads=2)),
        Family("gemma"),
        Family("gemma2"),
        Family("gemma3_text", dict(layer_types=["sliding_attention", "full_attention"])),
        Family(
            "gemma3n_text",
            dict(
                activation_sparsity_pattern=[0.95, 0.0],
                intermediate_size=[_INNER] * 2,
                layer_types=["sliding_attention", "full_attention"],
                num_kv_shared_layers=0,
            ),
            uncalibrated=True,
        ),
        Family("gemma4_text", _GEMMA4),
        Family(
            "gemma4_text@moe",
            dict(_GEMMA4, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=96),
        ),
        Family("vaultgemma"),
        Family("cohere"),
        Family("cohere2"),
        Family("olmo"),
        Family("olmo2"),
        Family("olmo3"),
        Family("glm"),
        Family("glm4"),
        Family("minicpm3", dict(_MLA, qk_nope_head_dim=64), apart=2),
        # mixtures
        Family("mixtral"),
        Family("qwen2_moe"),
        Family("qwen3_moe"),
        Family("olmoe"),
        Family("flex_olmo"),
        Family(
            "phimoe",
            architecture="PhiMoEForCausalLM",
            unserved="vLLM's predictions of the source itself are not finite on CPUs",
        ),
        Family("granitemoe"),
        Family("granitemoeshared"),
        Family("glm4_moe", dict(head_dim=64)),
        Family("ernie4_5_moe"),
        Family("hunyuan_v1_moe", dict(head_dim=64, num_key_value_heads=2, moe_topk=[2, 2], num_shared_expert=[1, 1])),
        Family(
            "dots1",
            dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, num_key_value_heads=2),
        ),
        Family(
            "minimax_m2",
            dict(rotary_dim=32, scoring_func="sigmoid", use_routing_bias=True),
            unserved="vLLM's router of experts for CPUs takes softmax alone",
        ),
        Family("gpt_oss"),
        Family("jetmoe", unserved=_NO_CLASS),
        Family(
            "llama4_text",
            dict(
                num_hidden_layers=4,
                interleave_moe_layer_step=2,
                moe_layers=[1, 3],
                attention_chunk_size=128,  # a multiple of vLLM's blocks
                num_experts_per_tok=1,
                intermediate_size=96,
                layer_types=None,
                no_rope_layers=None,
            ),
        ),
        # latent attention
        Family("deepseek_v2", dict(_MLA, num_experts_per_tok=2, n_group=1, topk_group=1), dtype="bfloat16"),
        Family("deepseek_v3", dict(_MLA, topk_method="noaux_tc", scoring_func="sigmoid"), dtype="bfloat16"),
        Family(
            "deepseek_v32",
            dict(_MLA, topk_method="noaux_tc", scoring_func="sigmoid"),
            unserved="vLLM has no sparse attention on CPUs",
        ),
        Family("glm4_moe_lite", dict(_MLA, first_k_dense_replace=1), dtype="bfloat16"),
        # linear attention, state spaces, convolutions
        Family(
            "qwen3_next",
            dict(_LINEAR, mlp_only_layers=[], decoder_sparse_step=1, full_attention_interval=4),
            dtype="bfloat16",
        ),
        Family("qwen3_5_text", _LINEAR, unserved=_NO_TOWER),
        Family("qwen3_5_moe_text", _LINEAR, unserved=_NO_TOWER),
        Family(
            "kimi_linear",
            dict(_MLA, layer_types=["linear_attention", "full_attention"]),
            dtype="bfloat16",
            unserved="vLLM fails on CPUs when it replaces the Triton kernels that its class imports",
        ),
        Family("minimax", unserved=_NO_CLASS),
        Family("mamba2", dict(num_heads=12, head_dim=32)),
        Family("jamba", dict(num_hidden_layers=4), unserved=_MAMBA1),
        Family("bamba", dict(attn_layer_indices=[1]), unserved=_NO_CLASS),
        Family("falcon_h1"),
        Family("nemotron_h", unserved="vLLM has experts without a gate for GPUs only"),
        Family("nemotron_h@dense", dict(num_hidden_layers=3, layers_block_type=["mamba", "mlp", "attention"])),
        Family("granitemoehybrid", dict(layer_types=["mamba", "attention"])),
        Family("lfm2", dict(conv_dim=_HIDDEN, block_dim=_HIDDEN, layer_types=["conv", "full_attention"])),
        Family(
            "lfm2_moe",
            dict(num_hidden_layers=4, conv_dim=_HIDDEN, num_dense_layers=2, layer_types=["conv", "full_attention"] * 2),
        ),
        # with towers
        Family("gemma3", unserved=_NO_TOWER),
        Family("llava", unserved=_NO_TOWER),
        Family("mistral3", unserved=_NO_TOWER),
        Family("llama4", unserved=_NO_TOWER),
        Family("qwen2_vl", _mrope(4, 6, 6), unserved=_NO_TOWER),
        Family("qwen2_5_vl", _mrope(4, 6, 6), unserved=_NO_TOWER),
        Family("qwen3_vl", unserved=_NO_TOWER),
        Family("qwen3_vl_moe", unserved=_NO_TOWER),
        Family("qwen3_5", dict(text_config=_LINEAR), unserved=_NO_TOWER),
        Family("glm4v", _mrope(4, 6, 6), unserved=_NO_TOWER),
        Family("internvl", unserved=_NO_TOWER),
    )
}

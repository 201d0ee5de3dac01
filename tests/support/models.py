"""Small real checkpoints, made by transformers with random weights and written to disk."""

from pathlib import Path

import torch

from tests.support.table import ARCHITECTURES, sizes_of
from vllm_w8a8_bismooth.model.layers import Layer

SHARD = "60KB"
_EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[0], norm_topk_prob=True
)
# What a type needs beyond the common sizes, so that each of its peculiarities takes part.
EXTRA = {
    "gemma2": dict(sliding_window=16, query_pre_attn_scalar=24),
    "gemma3_text": dict(
        sliding_window=16,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "granite": dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.2, logits_scaling=8.0),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=16, layer_types=None),
    "granitemoe": dict(num_local_experts=4, num_experts_per_tok=2, attention_multiplier=0.2),
    "llama4_text": dict(
        num_local_experts=4,
        num_hidden_layers=4,
        interleave_moe_layer_step=2,  # by which vLLM knows the blocks that have experts
        intermediate_size_mlp=128,
        no_rope_layers=[1, 0, 1, 1],
        layer_types=None,
    ),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "phi3": dict(pad_token_id=1, head_dim=16),
    "qwen2_moe": dict(**_EXPERTS, shared_expert_intermediate_size=64),
    "qwen3_moe": _EXPERTS,
}
MODEL_TYPES = [
    "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
]  # fmt: skip


def tiny_config(model_type: str, **changes):
    """Three blocks with grouped-query attention; widths are multiples of 32 and differ from each other."""
    from transformers import AutoConfig

    settings = {**EXTRA.get(model_type, {}), **changes}
    base = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        vocab_size=160,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    return AutoConfig.for_model(model_type, **{**base, **settings})


def tiny_model(model_type: str, seed: int = 0, **changes) -> torch.nn.Module:
    """Random weights, biases and norm gains, in fp32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                gain = "norm" in name and not model_type.startswith("gemma")  # whose norms store gain - 1
                parameter.normal_(1.0 if gain else 0.0, 0.3)
            else:
                parameter.normal_(0, 0.08)
    return model.eval()


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:158]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_checkpoint(folder: Path, model: torch.nn.Module, dtype=torch.bfloat16, sharded: bool = True) -> Path:
    """Save model, tokenizer and a few more side files; ``model`` is left in ``dtype``."""
    model.to(dtype).save_pretrained(folder, max_shard_size=SHARD if sharded else "5GB")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n\xc3\xa9")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.bin.txt").write_bytes(bytes(range(256)))
    return folder


def layer_of(model_type: str, dense: bool = True, **changes) -> Layer:
    """A block of a tiny model of some type, by the table."""
    config = tiny_config(model_type, **changes).to_dict()
    architecture = ARCHITECTURES[model_type]
    template = architecture.dense if dense else architecture.sparse
    return template.sized(sizes_of(config, architecture), config, architecture.offset)

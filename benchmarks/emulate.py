"""A converted checkpoint on transformers and this package's ops: fp32 elsewhere, no engine, seconds to load.

Cross-checks what vLLM measures, and makes sweeps over many plants affordable.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch

from vllm_w8a8_bismooth import fourbits, ops
from vllm_w8a8_bismooth.checkpoint.blueprint import Blueprint
from vllm_w8a8_bismooth.discovery.discover import discover
from vllm_w8a8_bismooth.measure.experts import separate_experts


class W8A8Linear(torch.nn.Module):
    """A linear of the checkpoint: int8 ``weight`` ``[N, K]``, fp32 ``weight_scale`` ``[N, 1]`` or ``[N, G]``.

    Activations are quantized by ``input_scale``, fp32 ``[1]``, or, where there is none, with as many groups as the
    weights have, as our converter's checkpoints say.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        input_scale: torch.Tensor | None,
    ):
        super().__init__()
        self.weight, self.weight_scale, self.bias, self.input_scale = weight, weight_scale, bias, input_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.input_scale is not None:
            return ops.static_linear(x, self.weight, self.weight_scale, self.input_scale.reshape(1, 1), self.bias)
        group_size = self.weight.shape[1] // self.weight_scale.shape[1]
        return ops.linear(x, self.weight, self.weight_scale, group_size, self.bias)


def attention_of(config) -> str:
    """The implementation of attention: sdpa would drop the soft cap on attention logits without a word."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def load(folder: Path) -> torch.nn.Module:
    """A causal language model in fp32 from a converted or an ordinary checkpoint."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads((folder / "config.json").read_text())
    settings.pop("quantization_config", None)
    config, construction = (
        AutoConfig.for_model(**settings),
        Blueprint.discovered(settings, discover(settings)).construction,
    )
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            if block := re.match(r"model\.layers\.(\d+)\.", name):
                module, _, leaf = name.removeprefix(block[0]).rpartition(".")
                name = f"{block[0]}{construction.built(int(block[1]), module)}.{leaf}"
            tensors[name] = tensor
    for name in [name.removesuffix("_packed") for name in tensors if name.endswith(".weight_packed")]:
        tensors[name] = fourbits.Rows.of(name, tensors).codes()
        for part in fourbits.DTYPES:
            tensors.pop(f"{name}_{part}", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention_of(config))
    separate_experts(model.model.layers, construction)
    for scale in [name for name in tensors if name.endswith(".weight_scale")]:
        linear = scale.removesuffix(".weight_scale")
        parent, _, child = linear.rpartition(".")
        bias, weight = tensors.pop(f"{linear}.bias", None), tensors.pop(f"{linear}.weight")
        # llm-compressor stores scales in the model's dtype, and one a tensor as [1]
        weight_scale, input_scale = tensors.pop(scale).float(), tensors.pop(f"{linear}.input_scale", None)
        if weight_scale.numel() == 1:
            weight_scale = weight_scale.expand(len(weight), 1)
        module = W8A8Linear(weight, weight_scale, bias, None if input_scale is None else input_scale.float())
        setattr(model.get_submodule(parent), child, module)
    left = model.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not left.unexpected_keys and set(left.missing_keys) <= tied, left
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, windows: np.ndarray) -> np.ndarray:
    """fp32 ``[n, length - 1, vocab]`` for integer windows ``[n, length]``, as :mod:`benchmarks.score` gives them."""
    rows = [model(input_ids=row[None, :-1]).logits.log_softmax(-1) for row in torch.from_numpy(windows)]
    return torch.cat(rows).numpy()

"""An EAGLE head for a LLaMA: the smallest there is, a linear map found by least squares.

EAGLE predicts the model's next state from its last one and from the token that was chosen; the model's own head makes a
token of it. Trained heads have a decoder block behind the map. This one has a block that adds nothing, so that vLLM
loads it as any other; it guesses one token in four, and shows what quantization does to a head that reads states.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.real import texts
from vllm_w8a8_bismooth.checkpoint.files import CONFIG

WINDOWS, LENGTH = 128, 256
"""Of calibration text, in tokens."""
_RIDGE = 1e-4  # of the mean square of an input
_BATCH = 8


def fit(source: Path, destination: Path, windows: int = WINDOWS) -> None:
    """Write the head of a model, fitted to its states in bf16.

    Args:
        source: a LLaMA's folder.
        destination: folder to write.
        windows: how many of :data:`LENGTH` tokens are read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tensors = {"fc.weight": _fit(model, torch.from_numpy(texts.own_windows(tokenizer, windows, LENGTH)))}
    for name, parameter in model.model.layers[-1].named_parameters():
        silent = name.removesuffix(".weight") in ("self_attn.o_proj", "mlp.down_proj")
        if name != "input_layernorm.weight":  # EAGLE's first block has none
            tensors[f"layers.0.{name}"] = torch.zeros_like(parameter) if silent else parameter.detach().clone()
    destination.mkdir(parents=True)
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / CONFIG).read_text()) | {"num_hidden_layers": 1}
    (destination / CONFIG).write_text(json.dumps(config, indent=2))


@torch.no_grad()
def _fit(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """bf16 ``[hidden, 2 * hidden]``: the next token's embedding and this token's state -> the next token's state."""
    width = 2 * model.config.hidden_size
    inner = torch.zeros(width, width, dtype=torch.float64)
    outer = torch.zeros(width, width // 2, dtype=torch.float64)
    for tokens in windows.split(_BATCH):
        states, embedded = model.model(input_ids=tokens).last_hidden_state, model.get_input_embeddings()(tokens)
        inputs = torch.cat([embedded[:, 1:], states[:, :-1]], dim=-1).reshape(-1, width).double()
        inner += inputs.T @ inputs
        outer += inputs.T @ states[:, 1:].reshape(-1, width // 2).double()
    inner.diagonal().add_(_RIDGE * inner.diagonal().mean())
    return torch.linalg.solve(inner, outer).T.contiguous().bfloat16()

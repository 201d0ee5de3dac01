"""A servable checkpoint of each model type, and how far two models' predictions lie apart."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks import emulate
from tests.support.models import tiny_model, write_checkpoint

SPARSE = ["mixtral", "qwen2_moe", "qwen3_moe"]
# Heads of 32 channels, the least that vLLM's attention takes on CPU.
SERVABLE = dict(hidden_size=128, intermediate_size=192, head_dim=32)
PECULIAR = {
    "gemma2": dict(tie_word_embeddings=True, attn_logit_softcapping=5.0),  # vLLM knows no untied one
    "gemma3_text": dict(tie_word_embeddings=True),
    "mistral": dict(sliding_window=16),
}
WINDOWS = np.random.default_rng(3).integers(2, 160, (8, 41))


def write(folder: Path, model_type: str) -> Path:
    return write_checkpoint(folder, tiny_model(model_type, **SERVABLE, **PECULIAR.get(model_type, {})))


def divergence(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL divergence of each token's prediction, in nats."""
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    return (np.exp(expected) * (expected - found)).sum(-1)


def transformers_predictions(folder: Path) -> tuple[np.ndarray, float]:
    """fp32 log-probabilities of a checkpoint, and how far they move without the last block, which is the yardstick.

    On these models INT8 costs 0.1 to 0.5 % of that, whatever the type; bf16 in vLLM 0.03 %, but 0.2 % of
    Granite, whose multipliers leave its blocks little to say.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model.config.use_cache = False
    whole = emulate.log_probabilities(model, WINDOWS)
    path, blocks = next((path, m) for path, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    model.set_submodule(path, blocks[:-1])
    return whole, divergence(whole, emulate.log_probabilities(model, WINDOWS)).mean()

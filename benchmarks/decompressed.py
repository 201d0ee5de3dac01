"""A converted checkpoint as any user of transformers has it: read and run by compressed-tensors, by no code of ours.

The third way of scoring, beside real vLLM (:mod:`benchmarks.score`) and this package's ops (:mod:`benchmarks.emulate`).
The first forward pass decompresses the weights; the inputs of each linear are quantized and dequantized, per token or
per token and group as the checkpoint says. compressed-tensors' step for activations is ``amax / 127.5``, vLLM's and
ours is ``amax / 127``: the largest value of a row then lies half a step beyond its grid. So distances to the source
agree with the other two to a few per cent (about 8 % where groups are as small as 32), not in all digits.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch

from benchmarks import emulate


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A causal language model from a converted or an ordinary checkpoint.

    Args:
        folder: the checkpoint.
        dtype: what it runs in; the weights' scales are rounded to it too.

    Raises:
        RuntimeError: tensors are missing, or left over because transformers does not take a linear for quantized.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=emulate.attention_of(config),
        local_files_only=True,
        output_loading_info=True,
    )
    wrong = {name: sorted(keys) for name, keys in found.items() if keys}
    if wrong:
        raise RuntimeError(f"{folder}: transformers does not load it whole: {wrong}")
    return model.eval()


def log_probabilities(folder: Path, windows: np.ndarray, log: Path) -> np.ndarray:
    """Does what :func:`benchmarks.score.log_probabilities` does; the log receives progress bars and warnings."""
    with open(log, "w") as sink, contextlib.redirect_stderr(sink):
        return emulate.log_probabilities(load(folder), windows)

"""Whether two engines, or an engine and the emulation, say the same."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from benchmarks import emulate

CLOSE = 0.1
"""Nats between log-probabilities of one model through different kernels: a bf16 logit near 10 has steps of 0.06."""
CLOSE_THROUGHOUT = 0.15
"""The same for each of a hundred steps: 0.125 was the largest between stock's kernels and ours,
with two linears in float and with none."""


def assert_same_up_to_near_ties(first: dict, second: dict, noise: float = CLOSE_THROUGHOUT) -> None:
    """Tokens agree with close log-probabilities, until in a prompt two choices are closer than the noise."""
    for prompt, (tokens, others) in enumerate(zip(first["tokens"], second["tokens"], strict=True)):
        for step, (token, other) in enumerate(zip(tokens, others, strict=True)):
            mine, theirs = (result["logprobs"][prompt][step] for result in (first, second))
            assert mine[str(token)] == pytest.approx(theirs[str(other)], abs=noise)
            if token != other:
                assert mine[str(token)] - mine[str(other)] < noise
                break


def assert_close_to_emulation(
    model: Path,
    prompts: list[str],
    first_steps: list[dict[str, float]],
    updates: Mapping[str, torch.Tensor] = MappingProxyType({}),
    close: float = CLOSE,
) -> None:
    """The first step of each prompt has the log-probabilities that fp32 with our ops gives its tokens.

    ``updates`` are added to the weights of the linears that they name, in fp32.
    """
    from transformers import AutoTokenizer

    emulated, encode = emulate.load(model), AutoTokenizer.from_pretrained(model)
    for linear, update in updates.items():
        emulated.get_submodule(linear).register_forward_hook(
            lambda _, inputs, output, update=update: output + inputs[0] @ update.t()
        )
    for prompt, step in zip(prompts, first_steps, strict=True):
        with torch.no_grad():
            logits = emulated(encode(prompt, return_tensors="pt").input_ids).logits[0, -1].log_softmax(-1)
        assert len(step) >= 5
        for token, logprob in step.items():
            assert logprob == pytest.approx(logits[int(token)].item(), abs=close)

"""Rows of activations, and their moments."""

import torch
from hypothesis import strategies as st

from vllm_w8a8_bismooth.method.moments import Moments

CHANNELS = 48
seeds = st.integers(0, 2**31)


def noise(rows: int, channels: int = CHANNELS, seed: int = 0, decades: float = 0.0) -> torch.Tensor:
    """fp32 normal values whose channels differ by up to so many decades."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** ((torch.rand(channels, generator=generator) - 0.5) * decades)
    return torch.randn(rows, channels, generator=generator) * size


def moments(rows: torch.Tensor) -> Moments:
    found = Moments.none(rows.shape[1])
    found.add(rows.clone())
    return found

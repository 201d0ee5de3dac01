"""A sample of activations that passes through one block, and how the predictions depend on what the block leaves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vllm_w8a8_bismooth.measure.calibration import Calibration
from vllm_w8a8_bismooth.measure.perturbation import sampled
from vllm_w8a8_bismooth.method.smooth import Smoothing
from vllm_w8a8_bismooth.model.layers import Layer


@dataclass(frozen=True)
class Passing:
    """What there is to measure a block by.

    Attributes:
        calibration: whose model the block is part of.
        index: of the block.
        tensors: what is stored of it, by name inside it.
        smoothing: of the block.
        hidden: ``[windows, length, hidden]``, what the block reads, by :func:`perturbation.sample`.
        gradients: fp32 ``[draws, windows, length, hidden]``, of what it leaves.
    """

    calibration: Calibration
    index: int
    tensors: Mapping[str, torch.Tensor]
    smoothing: Smoothing
    hidden: torch.Tensor
    gradients: torch.Tensor

    @property
    def layer(self) -> Layer:
        """What the block holds."""
        return self.calibration.source.layers[self.index]

    @contextmanager
    def running(self) -> Iterator["Running"]:
        """The block with its weights, in fp32."""
        built = partial(self.calibration.source.construction.built, self.index)
        with self.calibration.lend(self.index, self.tensors, torch.float32) as (block, run):
            yield Running(block, run, built, self.hidden.float(), sampled(*self.calibration.hidden.shape[:2]))


@dataclass(frozen=True)
class Running:
    """A block that is lent its weights.

    Attributes:
        block: transformers' module.
        run: the block on hidden states of the windows with these numbers.
        built: what the module calls a linear of the checkpoint's.
        hidden: fp32 ``[windows, length, hidden]``.
        numbers: of these windows in the calibration.
    """

    block: torch.nn.Module
    run: Callable[..., torch.Tensor]
    built: Callable[[str], str]
    hidden: torch.Tensor
    numbers: Sequence[int]

    def windows(self) -> Iterator[tuple[int, torch.Tensor, Any]]:
        """Of each window its place in the sample, what the block reads, a leaf, and what it leaves, by autograd."""
        for place, window in enumerate(self.hidden.split(1)):
            leaf = window.detach().requires_grad_()
            with torch.enable_grad():
                out = self.run(leaf, self.numbers[place : place + 1])
            yield place, leaf, out

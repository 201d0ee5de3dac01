"""Plant the LLaMA3-70B pathology into a healthy checkpoint without changing what it computes.

    python -m benchmarks.testbed.plant SRC DST --kind norm --k 1000 --blocks 0,1,3 --channels 3 --seed 0

What it imitates: in LLaMA3-70B a few input columns of Q, K, V, Gate and Up in the first blocks are orders of magnitude
larger than the rest (arXiv 2408.15301), so that a row's INT8 step rounds all its other weights to zero.

* ``norm``: in the chosen blocks, for a few channels of each norm, gain / k and the consuming columns * k.
* ``residual``: the residual stream itself is small in a few channels: writers (embedding, o_proj, down_proj) / k,
  readers (q, k, v, gate, up, head) * k in every block, norm gains unchanged. The gains do not betray this kind.

What it does not: it says nothing of how training got the real model there, of how many channels it has, of how its
outlier columns correlate with each other or with tokens, or of its size; outliers here are exactly k times an ordinary
column. ``norm`` preserves the function up to bf16 rounding of the scaled tensors. ``residual`` also takes the
channels' share out of each norm's RMS (about channels / hidden_size), so the planted model is compared with itself.
"""

import argparse
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from vllm_w8a8_bismooth.checkpoint.companions import companions
from vllm_w8a8_bismooth.checkpoint.files import CONFIG
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.method.smooth import fold_vector
from vllm_w8a8_bismooth.model.names import Names


def plant(
    source: Path,
    destination: Path,
    kind: str = "norm",
    k: float = 1000.0,
    blocks: tuple[int, ...] = (0, 1, 3),
    channels: int = 3,
    seed: int = 0,
) -> None:
    """Write a planted copy of a LLaMA checkpoint.

    Args:
        source: healthy checkpoint folder.
        destination: folder to write.
        kind: ``norm`` or ``residual``.
        k: factor between an outlier column and an ordinary one.
        blocks: where (``norm`` only: the residual stream runs through all blocks).
        channels: how many input channels, per norm (``norm``) or in all (``residual``).
        seed: chooses the channels.
    """
    healthy = Source(source)
    checkpoint = healthy.checkpoint
    tensors = {name: checkpoint.read(name) for name in checkpoint.headers}
    generator = torch.Generator().manual_seed(seed)
    PLANTERS[kind](tensors, healthy, k, blocks, channels, generator)
    destination.mkdir(parents=True)
    save_torch_state_dict(tensors, destination)
    for relative in (CONFIG, *companions(checkpoint.place)):
        (destination / relative).parent.mkdir(exist_ok=True)
        shutil.copy(source / relative, destination / relative)


def _scaled(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (tensor.float() * factor).to(tensor.dtype)


def _factors(width: int, channels: int, k: float, generator: torch.Generator) -> torch.Tensor:
    factors = torch.ones(width)
    factors[torch.randperm(width, generator=generator)[:channels]] = k
    return factors


def _plant_norm(tensors, healthy, k, blocks, channels, generator) -> None:
    for block in blocks:
        for site in healthy.layers[block].sites:
            if site.producer in healthy.layers[block].linears:
                continue
            norm = f"{Names().block(block)}{site.producer}.weight"
            factors = _factors(tensors[norm].shape[0], channels, k, generator)
            tensors[norm], effective = fold_vector(tensors[norm].float(), factors, tensors[norm].dtype)
            for consumer in site.consumers:
                weight = f"{Names().block(block)}{consumer}.weight"
                tensors[weight] = _scaled(tensors[weight], effective)


def _plant_residual(tensors, healthy, k, blocks, channels, generator) -> None:
    factors = _factors(tensors[Names().norm].shape[0], channels, k, generator)
    layer = healthy.layers[0]
    readers = {consumer for site in layer.sites if site.producer not in layer.linears for consumer in site.consumers}
    for name, tensor in tensors.items():
        linear = re.sub(r"model\.layers\.\d+\.|\.weight$", "", name)
        if linear in readers or name == Names().head:
            tensors[name] = _scaled(tensor, factors)
        elif linear in layer.writers:
            tensors[name] = _scaled(tensor, 1 / factors.unsqueeze(1))
        elif name == Names().embedding:
            tensors[name] = _scaled(tensor, 1 / factors)
        elif name == Names().norm and Names().head not in tensors:
            # A tied head shrank with the embedding; the final norm, which nothing quantizes, makes up for both.
            tensors[name] = _scaled(tensor, factors**2)


PLANTERS = {"norm": _plant_norm, "residual": _plant_residual}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--kind", choices=list(PLANTERS), default="norm")
    parser.add_argument("--k", type=float, default=1000.0)
    parser.add_argument("--blocks", type=lambda text: tuple(map(int, text.split(","))), default=(0, 1, 3))
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    plant(**vars(parser.parse_args()))

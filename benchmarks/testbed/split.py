"""Split outlier channels into copies, QLLM's idea (arXiv 2310.08041), without changing what the model computes.

    python -m benchmarks.testbed.split SRC DST --calibration TEXT [--channels 32] [--tokens 16384]

The baseline that needs no new kernel: in every block the ``channels`` inputs of ``down_proj`` with the largest
calibrated magnitude become two copies of half the value. Gate rows are duplicated, up rows halved in both copies
(exact: a power of two), down columns duplicated. So an outlier of a quantized row is half as large. All blocks grow
alike, because a config knows one ``intermediate_size``. QLLM also merges similar channels to keep the width; that would
change the function, and is left out.

Inputs that a norm feeds (those of q, k, v, gate, up) cannot be split this way: they are the residual stream, whose
width, ``hidden_size``, is shared by all blocks, the embedding and the head, and whose mean square each norm divides by;
copies for one linear need an operation between norm and linear, hence a kernel. Inputs of ``o_proj`` come in whole
heads. Nor does it help against a large column of a *weight*, LLaMA3-70B's trouble, which both copies keep.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from vllm_w8a8_bismooth.checkpoint.companions import companions
from vllm_w8a8_bismooth.checkpoint.files import CONFIG
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.measure.text import read_text, tokenize
from vllm_w8a8_bismooth.model.names import Names

GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))


def split(source: Path, destination: Path, tokens: torch.Tensor, channels: int = 32) -> list[torch.Tensor]:
    """Write a copy of a checkpoint in which the largest intermediate channels are split in two.

    Args:
        source: checkpoint folder of a dense model with gate, up and down projections.
        destination: folder to write.
        tokens: int64 ``[windows, length]`` for calibration.
        channels: how many to split in every block; a multiple of 32, so that kernels and groups still divide.

    Returns:
        Per block, the indices of the channels that were split, largest first.

    Raises:
        ValueError: ``channels`` is no multiple of 32 or more than there are, or the model's MLP is another one.
    """
    healthy = Source(source)
    checkpoint, width = healthy.checkpoint, healthy.sizes["intermediate"]
    if channels % 32 or not 0 < channels <= width:
        raise ValueError(f"channels = {channels}; it must be a multiple of 32, at most intermediate_size = {width}")
    if any({GATE, UP, DOWN} - layer.linears.keys() for layer in healthy.layers):
        raise ValueError(f"{source}: not all blocks have {GATE}, {UP} and {DOWN}")
    tensors = {name: checkpoint.read(name) for name in checkpoint.headers}
    chosen = [extent.topk(channels).indices for extent in extents(source, tokens)]
    for block, copied in enumerate(chosen):
        for linear, factor in ((GATE, 1.0), (UP, 0.5)):
            for name in (f"{Names().block(block)}{linear}.{part}" for part in ("weight", "bias")):
                if name in tensors:
                    tensors[name][copied] *= factor
                    tensors[name] = torch.cat([tensors[name], tensors[name][copied]])
        name = f"{Names().block(block)}{DOWN}.weight"
        tensors[name] = torch.cat([tensors[name], tensors[name][:, copied]], dim=1)

    destination.mkdir(parents=True)
    save_torch_state_dict(tensors, destination)
    for relative in companions(checkpoint.place):
        (destination / relative).parent.mkdir(exist_ok=True)
        shutil.copy(source / relative, destination / relative)
    config = json.loads((source / CONFIG).read_text())
    (destination / CONFIG).write_text(json.dumps(config | {"intermediate_size": width + channels}, indent=2) + "\n")
    return chosen


@torch.no_grad()
def extents(source: Path, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Per block, fp32 ``[intermediate]``: the largest magnitude of each input channel of ``down_proj``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True).eval()
    found = [torch.zeros(model.config.intermediate_size) for _ in model.model.layers]

    def watch(extent: torch.Tensor):
        def hook(linear, inputs) -> None:
            torch.maximum(extent, inputs[0].abs().amax(dim=(0, 1)), out=extent)

        return hook

    for extent, layer in zip(found, model.model.layers, strict=True):
        layer.mlp.down_proj.register_forward_pre_hook(watch(extent))
    for row in tokens:
        model(input_ids=row[None])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="text for the source's tokenizer")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--channels", type=int, default=32)
    arguments = parser.parse_args()
    windows = tokenize(read_text(arguments.calibration), Source(arguments.source).checkpoint, arguments.tokens)
    split(arguments.source, arguments.destination, windows, arguments.channels)

"""Checkpoints with their sites folded and nothing quantized: they must compute what they did."""

import shutil
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from tests.support.moments import moments, noise
from tests.support.stored import as_stored
from vllm_w8a8_bismooth.checkpoint.basis import Means
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.method.balance import by_range
from vllm_w8a8_bismooth.method.smooth import Factors, smooth_block

RULE = partial(by_range, alpha=0.5)  # the fastest; what a fold costs does not depend on it


def smoothed_copy(folder: Path, destination: Path, means: Means | None = None) -> list[Factors]:
    """The checkpoint with every site smoothed for random activations over four decades, and nothing quantized."""
    source, records = Source(folder, means or Means()), []
    names = source.names
    tensors = {name: source.checkpoint.read(name) for name in source.outside}
    for index, layer in enumerate(source.layers):
        prefix = names.block(index)
        block = {name: source.checkpoint.read(prefix + name) for name in source.blocks[index]}
        read = {}
        for site in layer.sites:
            channels, seed = block[f"{site.consumers[0]}.weight"].shape[1], len(records) + len(read)
            read[site.name] = moments(noise(8, channels, seed, decades=4))
        smoothing = smooth_block(block, read, layer, RULE)
        assert [record.site for record in smoothing.sites] == [site.name for site in layer.sites]
        for name, tensor in block.items():
            fold = smoothing.fold(name.removesuffix(".weight"))
            # fp32, because rounding to the storage dtype is not part of what is tested
            new = fold.apply(tensor.float()) if fold else smoothing.vectors.get(name, tensor)
            tensors[prefix + name] = new
            matrices = layer.linears.keys() | layer.routers.keys()
            sites = {name for site in layer.sites for name in (site.producer, *site.consumers)}
            touched = tensor.dim() > 1 and name.removesuffix(".weight") in matrices & sites
            assert not touched or not torch.equal(new.float(), tensor.float()), name
        records += smoothing.sites
    shutil.copytree(folder, destination, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_torch_state_dict(as_stored(source.checkpoint, tensors), destination)
    return records

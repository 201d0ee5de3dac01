"""LoRA adapters."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint


def write_adapter(folder: Path, model: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA adapter of rank 8 on every INT8 linear, as PEFT writes it; linear -> what it adds to the weight."""
    headers = Checkpoint(model, dtypes=("BF16", "F32", "I8")).headers
    generator, tensors, updates = torch.Generator().manual_seed(seed), {}, {}
    for linear in (name.removesuffix(".weight_scale") for name in headers if name.endswith(".weight_scale")):
        rows, columns = headers[f"{linear}.weight"].shape
        down = torch.randn(8, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, 8, generator=generator) * 0.05
        lora = f"base_model.model.{linear}"
        tensors |= {f"{lora}.lora_A.weight": down, f"{lora}.lora_B.weight": up}
        updates[linear] = up @ down
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({linear.rpartition(".")[2] for linear in updates})
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return updates

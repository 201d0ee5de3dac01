"""Shows who would serve our layers in the installed vLLM, and why; runs in a process of its own.

``python -m vllm_w8a8_bismooth.serving.doctor ANSWER.json`` writes what :func:`answer` returns.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_w8a8_bismooth import NAME


def answer() -> dict[str, Any]:
    """What vLLM says of itself here, as its own processes would see it.

    Returns:
        ``platform`` (``cpu``, ``cuda``, ...), ``device`` (its name), ``capability`` (``9.0``, or ``None``),
        ``registered``, ``problem`` (why not, or ``None``), and ``layers``, see :func:`_layers`.
    """
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    capability = current_platform.get_device_capability()
    found: dict[str, Any] = {
        "platform": current_platform.device_type,
        "device": current_platform.get_device_name(),
        "capability": capability and capability.as_version_str(),
        "registered": NAME in QUANTIZATION_METHODS,
        "problem": None,
        "layers": {},
    }
    try:
        from vllm_w8a8_bismooth.serving import register

        register()
        found["layers"] = _layers(current_platform.device_type)
    except Exception as error:
        found["problem"] = f"{type(error).__name__}: {error}"
    return found


def _layers(device: str) -> dict[str, tuple[str, str, bool]]:
    """Kind of layer -> its kernel, why that one, and whether it is the one that is meant to serve it."""
    from vllm_w8a8_bismooth import ops
    from vllm_w8a8_bismooth.serving.config import reason_for_stock

    ours = ("our kernel", f"compiled for {device}", True)
    reference = ("the torch reference", f"this package was installed without its kernels for {device}: slow", False)
    per_group = ours if ops.has_kernel(device) else reference
    refused = ops.has_kernel(device) and ops.unsupported(4096, 4096, group_size=128, device=torch.device(device))
    stock = reason_for_stock()
    return {
        "per-channel": ("vLLM's own kernel", stock, False) if stock else per_group,
        "per-group": ("none, refused at load", refused, False) if refused else per_group,
        "experts": per_group if device == "cpu" else ("vLLM's own method", "ours is for CPUs", True),
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(answer()))

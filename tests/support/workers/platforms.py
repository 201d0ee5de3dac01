"""vLLM's own classes for GPUs that are not here, in a process that ``PRETENDED`` (a key of :data:`GPUS`) is for.

What lies below vLLM is made up before anything imports it: the GPU that AMD's and Intel's libraries name, the platform
that torch is a build for, vLLM's version, which names no CPU, and Triton's driver. Which platform that makes, and who
serves there, vLLM's code and ours then find out by themselves. No tensor is on the device.
"""

import importlib.metadata
import os
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

GPUS = {
    "MI300X": ("hip", "gfx942", 64),
    "RX 7900 XTX": ("hip", "gfx1100", 32),
    "RX 6900 XT": ("hip", "gfx1030", 32),
    "Max 1550": ("xpu", {"has_subgroup_matrix_multiply_accumulate": True}, 32),
}
"""Name -> Triton's backend, architecture (of Intel's a dict of what it has) and lanes of a warp."""
NAME = os.environ["PRETENDED"]
BACKEND, ARCHITECTURE, LANES = GPUS[NAME]


def _module(name: str, **content: Any) -> None:
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(content)


if BACKEND == "hip":
    asic = {"target_graphics_version": ARCHITECTURE, "device_id": "0x0", "market_name": NAME}
    _module(
        "amdsmi",
        AmdSmiException=Exception,
        AmdSmiMemoryType=SimpleNamespace(VRAM=0),
        amdsmi_init=lambda: None,
        amdsmi_shut_down=lambda: None,
        amdsmi_get_processor_handles=lambda: [0],
        amdsmi_get_gpu_asic_info=lambda handle: asic,
        amdsmi_get_gpu_device_uuid=lambda handle: "0",
        amdsmi_get_gpu_memory_total=lambda handle, kind: 1 << 34,
        amdsmi_topo_get_link_type=lambda *handles: {},
        amdsmi_topo_get_numa_node_number=lambda handle: 0,
    )
    torch.version.hip = "7.2"
    os.environ["HIP_VISIBLE_DEVICES"] = ""  # so vLLM does not ask Triton for a driver of its own
else:
    _module("vllm_xpu_kernels", __path__=[], xpumem_allocator=None)
    for _name, _functions in {
        "_C": (),
        "_moe_C": (),
        "_xpu_C": (),
        "flash_attn_interface": ("flash_attn_varlen_func",),
        "rotary": ("apply_rotary_emb",),
        "fused_moe_interface": ("XpuFusedMoe",),
    }.items():
        _module(f"vllm_xpu_kernels.{_name}", **dict.fromkeys(_functions))
    torch.version.xpu = "20250302"
    torch.xpu.is_available = lambda: True
    torch.xpu.device_count = lambda: 1
    torch.xpu.get_device_name = lambda index=0: NAME
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

_version = importlib.metadata.version
importlib.metadata.version = lambda name: _version(name).partition("+")[0]  # +cpu, of vLLM and torch
torch.accelerator.device_index = lambda index: nullcontext()

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from tests.support.workers.targets import Driver  # noqa: E402

driver.set_active(Driver(GPUTarget(BACKEND, ARCHITECTURE, LANES)))

from tests.support.mixture import CHECKPOINT, vllms_layer  # noqa: E402
from tests.support.quantization import STOCK, TOKEN, W8A8, config_class  # noqa: E402

GROUP = {"strategy": "group", "group_size": 32}


def _quantized(group: bool) -> dict:
    more = GROUP if group else {}
    groups = {"g": {"targets": ["Linear"], "weights": W8A8 | more, "input_activations": TOKEN | more}}
    return STOCK | {"config_groups": groups}


def platform() -> tuple[str, str, str]:
    """The class that vLLM made, torch's type of its devices, and what it says of our method: ``""`` accepts it."""
    from vllm.platforms import current_platform

    config_class()
    try:
        current_platform.verify_quantization("w8a8_bismooth")
    except ValueError as error:
        return type(current_platform).__name__, current_platform.device_type, str(error)
    return type(current_platform).__name__, current_platform.device_type, ""


def registered() -> dict[str, tuple[str, bool]]:
    """Operation -> who does it on the device, and whether torch's dispatcher knows."""
    from vllm.platforms import current_platform

    from vllm_w8a8_bismooth import ops
    from vllm_w8a8_bismooth.ops import schema

    device, known = current_platform.device_type, torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        name: (ops.server(device, name), known(f"w8a8_bismooth::{name}", device.upper())) for name in schema.OPERATIONS
    }


def doctor() -> dict[str, Any]:
    """What ``bismooth doctor`` hears from vLLM."""
    from vllm_w8a8_bismooth.serving.doctor import answer

    return answer(test=False)


def refused() -> str:
    """Why a linear with groups ends its load on the device, as its scheme says it, or ``""``."""
    from vllm.platforms import current_platform

    from vllm_w8a8_bismooth import ops

    return ops.unsupported(64, 128, group_size=32, device=torch.device(current_platform.device_type, 0))


def linear(group: bool) -> tuple[str, str | None]:
    """The scheme of a linear's weights, and vLLM's kernel, if it is one of vLLM's."""
    from vllm.model_executor import parameter

    config = config_class().from_config(_quantized(group))
    scheme = config.get_scheme(torch.nn.Linear(1, 1, device="meta"), "model.layers.0.mlp.down_proj")
    layer = torch.nn.Module()
    parameter.get_tensor_model_parallel_rank = lambda: 0
    parameter.get_tensor_model_parallel_world_size = lambda: 1
    scheme.create_weights(
        layer,
        output_partition_sizes=[64],
        input_size_per_partition=128,
        input_size=128,
        output_size=64,
        params_dtype=torch.bfloat16,
        weight_loader=lambda *a: None,
        layer_name="down_proj",
    )
    assert layer.weight.shape == (64, 128)
    return type(scheme).__name__, type(scheme.kernel).__name__ if hasattr(scheme, "kernel") else None


def experts(group: bool) -> tuple[str, str | None] | str:
    """The method of a mixture's experts, and vLLM's kernel, if it is one of vLLM's; or why they are refused."""
    checkpoint = CHECKPOINT | _quantized(group)
    try:
        method = vllms_layer(checkpoint=checkpoint).quant_method
    except ValueError as error:
        return str(error)
    return type(method).__name__, method.experts_cls.__name__ if hasattr(method, "experts_cls") else None

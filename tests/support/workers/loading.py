"""A checkpoint through vLLM's own loader, without an engine:
``python -m tests.support.workers.loading MODEL FLOAT ANSWER.json``.

It needs nothing of vLLM's compiled libraries, so a release that is there as Python sources alone will do. MODEL is a
quantized LLaMA in one file, FLOAT an unquantized one. The answer holds vLLM's version, the quantization method that it
settled on, the group size of each quantized linear, those linears and MLPs whose output is not what the checkpoint's
tensors give, and what vLLM says to FLOAT with our flag.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import vllm
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader import get_model

from vllm_w8a8_bismooth import ops

PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def stand_in() -> None:
    """What a CPU worker of vLLM does, and the compiled op that vLLM 0.26 looks up when it makes a LLaMA."""
    torch.accelerator.empty_cache = lambda: None
    if not hasattr(torch.ops._C, "silu_and_mul"):
        torch.library.define("_C::silu_and_mul", "(Tensor(a!) out, Tensor x) -> ()")
        torch.library.impl("_C::silu_and_mul", "CPU")(lambda out, x: out.copy_(silu_and_mul(x)) and None)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def load(model: Path) -> tuple[torch.nn.Module, str]:
    """The model, and the quantization method that vLLM chose for it."""
    config = EngineArgs(model=str(model), enforce_eager=True, max_model_len=128).create_engine_config()
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as scratch:
        init_distributed_environment(1, 0, f"file://{scratch}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        return get_model(vllm_config=config), config.model_config.quantization


def main(model: Path, plain: Path) -> dict:
    stand_in()
    loaded, method = load(model)
    stored = load_file(model / "model.safetensors")

    def expected(name: str, x: torch.Tensor) -> torch.Tensor:
        parent, _, last = name.rpartition(".")
        outputs = []
        for part in PARTS.get(last, [last]):
            weight, scale = (stored[f"{parent}.{part}.{kind}".lstrip(".")] for kind in ("weight", "weight_scale"))
            outputs.append(ops.linear(x, weight, scale, x.shape[1] // scale.shape[1]))
        return torch.cat(outputs, dim=1)

    generator, groups, unequal = torch.Generator().manual_seed(0), {}, []
    for name, module in loaded.named_modules():
        if hasattr(module, "scheme"):
            groups[name] = module.scheme.weight_group_size
            is_head = isinstance(module, ParallelLMHead)  # which vLLM never calls itself
            columns = module.embedding_dim if is_head else module.input_size
            x = torch.randn(5, columns, generator=generator).bfloat16()
            output = module.quant_method.apply(module, x) if is_head else module(x)[0]
            if not torch.equal(output, expected(name, x)):
                unequal.append(name)
        elif name.endswith(".mlp"):
            x = torch.randn(5, module.gate_up_proj.input_size, generator=generator).bfloat16()
            hidden = silu_and_mul(expected(f"{name}.gate_up_proj", x))
            whole = expected(f"{name}.down_proj", hidden).float()
            if (module(x).float() - whole).norm() > 0.02 * whole.norm():  # bf16 rounds before or after the product
                unequal.append(name)
    try:
        EngineArgs(model=str(plain), quantization="w8a8_bismooth").create_engine_config()
        refusal = None
    except Exception as error:
        refusal = str(error)
    return {"version": vllm.__version__, "method": method, "groups": groups, "unequal": unequal, "refusal": refusal}


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))

"""vLLM engines of many kinds, one after the other in a process:
``python -m tests.support.workers.features REQUEST.json RESULT.json``.

The request holds ``prompts``, ``max_tokens`` and ``engines``: name -> options for ``vllm.LLM``. For each name the
result holds what :func:`tests.support.workers.engine.answers` gives the first time (``first``) and the ``second``, and

- ``forwards``: how many tokens each step of the model took;
- ``cache``: the dtype that the KV cache stores and the scales of K and V of each block;
- ``linears``: how many linears run on which group size of ours, and those of the ``draft`` model if there is one;
- ``accepted``: how many tokens of a draft were kept;
- ``loose``: tensors of ours that are neither parameters nor buffers, which a GPU's sleep would lose;
- ``weights``: a digest of our linears' weights and scales;
- ``reloaded`` and ``reloaded_weights``: the answers and the digest after all parameters were lost and read again, as a
  GPU that slept at level 2 reads them;

or, if the engine failed, only its ``error``.
"""

import hashlib
import json
import sys
import traceback
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from tests.support.workers.engine import answers
from tests.support.workers.engines import clean_up, meet, schemes


def ours(model) -> list[tuple[str, torch.nn.Module]]:
    from vllm_w8a8_bismooth.serving.scheme import W8A8Scheme

    return [(n, m) for n, m in model.named_modules() if isinstance(getattr(m, "scheme", None), W8A8Scheme)]


def loose(model) -> list[str]:
    kept = ("_parameters", "_buffers", "_modules")
    return [
        f"{name}: {type(holder).__name__}.{attribute}"
        for name, module in ours(model)
        for holder in (module, module.scheme, module.quant_method)
        for attribute, value in vars(holder).items()
        if attribute not in kept and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
    ]


def cache(model) -> list[tuple[str, float, float]]:
    from vllm.model_executor.layers.attention import Attention

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    return [(layer.kv_cache_dtype, layer._k_scale_float, layer._v_scale_float) for layer in layers]


def weights(model) -> str:
    digest = hashlib.sha256()
    for _, module in ours(model):
        for tensor in (module.weight, module.weight_scale):
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def look(request: dict, options: dict) -> dict:
    from vllm import LLM

    engine = LLM(**{"enforce_eager": True, "enable_prefix_caching": False, "disable_log_stats": False} | options)
    (runner,) = engine.collective_rpc(lambda worker: worker.model_runner)
    forwards: list[int] = []
    runner.model.register_forward_pre_hook(
        lambda _, args, kwargs: forwards.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    result = {name: answers(engine, request) for name in ("first", "second")}
    result |= {
        "quantization": engine.llm_engine.model_config.quantization,
        "forwards": forwards,
        "cache": cache(runner.model),
        "linears": schemes(runner.model),
        "loose": loose(runner.model),
        "weights": weights(runner.model),
        "accepted": sum(m.value for m in engine.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens"),
    }
    if hasattr(getattr(runner, "drafter", None), "model"):
        result["draft"] = schemes(runner.drafter.model)
    for parameter in runner.model.parameters():
        parameter.data.fill_(77)
    engine.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))
    engine.collective_rpc("reload_weights")
    engine.reset_prefix_cache()
    return result | {"reloaded": answers(engine, request), "reloaded_weights": weights(runner.model)}


def main(request: dict) -> dict:
    result = {}
    for name, options in request["engines"].items():
        meet(options["model"])
        try:
            result[name] = look(request, options)
        except Exception:
            result[name] = {"error": traceback.format_exc()}
        clean_up()
    return result


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))

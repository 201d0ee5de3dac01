"""Shows what the installed vLLM makes of a quantization config; runs in a process of its own.

``python -m vllm_w8a8_bismooth.serving.probe ANSWER.json`` reads a request from stdin (see :func:`problems`) and writes
a list of ``[where, what]``, empty if vLLM takes everything as it is meant.
"""

import copy
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization import get_quantization_config

from vllm_w8a8_bismooth import NAME, switch
from vllm_w8a8_bismooth.serving import register
from vllm_w8a8_bismooth.serving.claim import Claim


def problems(request: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where vLLM refuses or misreads a checkpoint, and how.

    Args:
        request: ``config``, the raw quantization_config; ``marked``, whether it must be claimed without a flag;
            ``methods``, vLLM's names of those that must take it; ``linears``, vLLM's name -> group size (``None`` =
            per-channel); ``float``, linears that must stay in float; ``head``, the one among both that is the language
            model's head; ``fused``, last part of a fused name -> those of its parts.
    """
    register()
    claimed = Claim.override_quantization_method(request["config"], None if request["marked"] else NAME)
    if claimed != NAME:
        yield "config.json", f"{NAME} does not claim this quantization_config"
    linear = torch.nn.Linear(1, 1, bias=False, device="meta")
    # All that vLLM matches of them is the names of their classes.
    experts, head = (type(name, (torch.nn.Module,), {})() for name in ("RoutedExperts", "ParallelLMHead"))
    for method in request["methods"]:
        try:
            config = get_quantization_config(method).from_config(copy.deepcopy(request["config"]))
        except Exception as error:
            yield "config.json", f"vLLM's {method} refuses quantization_config ({_text(error)})"
            continue
        config.packed_modules_mapping = request["fused"]
        config._add_fused_moe_to_target_scheme_map()
        for name in (*request["linears"], *request["float"]):
            try:
                module = head if name == request["head"] else experts if ".experts." in name else linear
                scheme = config.get_scheme(module, name)
            except Exception as error:
                yield name, f"vLLM's {method} has no scheme for it ({_text(error)})"
                continue
            if name in request["float"]:
                if scheme is not None:
                    yield name, f"vLLM's {method} takes it for {type(scheme).__name__}, but it is stored in float"
            elif scheme is None:
                yield name, f"vLLM's {method} takes it for float, but it is stored as INT8"
            elif (given := getattr(scheme, "weight_group_size", None)) != (stored := request["linears"][name]):
                yield name, f"vLLM's {method} gives it group_size {given}, but it is stored with {stored}"


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    os.environ[switch.VARIABLE] = switch.OFF  # who would serve is not asked, so no GPU is woken for it
    Path(sys.argv[1]).write_text(json.dumps(list(problems(json.load(sys.stdin)))))

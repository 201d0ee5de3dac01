"""Shows who would serve our layers in the installed vLLM, and why; runs in a process of its own.

``python -m vllm_w8a8_bismooth.serving.doctor ANSWER.json`` reads from stdin what :func:`answer` takes, as JSON, and
writes what it returns.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_w8a8_bismooth import NAME, switch
from vllm_w8a8_bismooth.serving import servers


def answer(test: bool) -> dict[str, Any]:
    """What vLLM says of itself here, as its own processes would see it.

    Args:
        test: run the self-test of the compiled kernels now, also if there is a verdict, and on a CPU.

    Returns:
        ``platform`` (``cpu``, ``cuda``, ...), ``device`` (its name), ``capability`` (``9.0``, or ``None``),
        ``registered``, ``problem`` (why not, or ``None``), ``tests``, see :func:`_tests`, ``layers``, see
        :func:`_layers`, ``plan``, see :func:`_plan`, and ``plan_problem``, what is wrong with the one that is given.
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
        "tests": {},
        "layers": {},
        "plan": {},
        "plan_problem": None,
    }
    try:
        from vllm_w8a8_bismooth.serving import register

        register()
        found["tests"] = _tests(current_platform.device_type, test)
        found["layers"] = _layers()
        try:
            found["plan"] = _plan(current_platform.device_type)
        except ValueError as error:
            found["plan_problem"] = str(error)
    except Exception as error:
        found["problem"] = f"{type(error).__name__}: {error}"
    return found


def _tests(device_type: str, anew: bool) -> dict[str, dict[str, Any]]:
    """Device -> what the self-test of its kernels found, in ``words``, and all ``faults``; equal GPUs are one."""
    from vllm_w8a8_bismooth.ops import COMPILED, gate, server

    if server(device_type) != COMPILED or not (anew or (device_type == "cuda" and switch.wanted() == switch.AUTO)):
        return {}
    if device_type == "cpu":
        devices: dict[str, int | None] = {"this CPU": None}
    else:
        count = torch.cuda.device_count()
        devices = {torch.cuda.get_device_name(index): index for index in reversed(range(count))}
    found = {name: gate.judge(index, anew) for name, index in devices.items()}
    return {name: {"words": verdict.words(), "faults": verdict.faults} for name, verdict in found.items()}


def _plan(device_type: str) -> dict[str, str]:
    """Kind of linear -> its kernel, and why, by the plan that is given and those that are kept of the current device.

    Raises:
        ValueError: what is given is no plan.
    """
    from vllm_w8a8_bismooth.ops import COMPILED, server
    from vllm_w8a8_bismooth.serving import planning

    given = planning.given()
    plans = {"given": given} if given else {}
    if server(device_type) == COMPILED:
        plans |= planning.kept(planning.here(device_type))
    return {
        f"{name}: {shape}": f"{entry.kernel or 'open'} ({entry.words()})"
        for name, plan in plans.items()
        for shape, entry in plan.entries.items()
    }


def _layers() -> dict[str, servers.Served]:
    """Kind of layer -> its kernel, why that one, and whether it is the one that is meant to serve it."""
    platform = servers.here()
    return {kind: rule(platform) for kind, rule in servers.KINDS.items()}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(answer(**json.load(sys.stdin))))

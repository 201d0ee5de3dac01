"""Who may serve: the switch, the self-test's verdict on the device, and what follows from it in this process.

A wrong kernel is silent, and one that hangs takes the engine with it. So on a GPU compiled kernels serve only what they
have been seen to do right, there, by the processes of :mod:`selftest`.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_w8a8_bismooth import switch
from vllm_w8a8_bismooth.ops import kernels, schema
from vllm_w8a8_bismooth.ops.selftest import examination, machine, verdict
from vllm_w8a8_bismooth.ops.selftest.verdict import Verdict


@dataclass(frozen=True)
class Ruling:
    """Why compiled kernels serve what they do.

    Attributes:
        switch: what :func:`switch.wanted` says.
        reason: in words, for all that they do not serve; ``""`` if nothing keeps them from serving.
        lost: granularities that they do not serve -> why, in more detail.
        proof: in words, why they may serve the others; ``""`` if nothing was tried.
    """

    switch: str
    reason: str = ""
    lost: Mapping[str, str] = field(default_factory=dict)
    proof: str = ""


@functools.cache
def settle(device_type: str) -> Ruling:
    """Decide for the current device of a kind, once a process, and see to it that the decision holds in this process.

    Raises:
        ValueError: see :func:`switch.wanted`.
    """
    wanted = switch.wanted()
    if wanted == switch.OFF:
        return _without(device_type, wanted, f"{switch.VARIABLE}={wanted}")
    if device_type != "cuda" or not _compiled(device_type):
        return Ruling(wanted)
    try:
        index = torch.cuda.current_device()
        problem = torch.ops.w8a8_bismooth.device_problem(index)
    except Exception as error:  # without a GPU, or with a driver that is too old for this torch
        problem = f"torch finds no GPU: {str(error).splitlines()[0]}"
    if problem:
        return _without(device_type, wanted, problem)
    if wanted == switch.ON:
        return Ruling(wanted, proof=f"{switch.VARIABLE}={wanted}, no self-test")
    try:
        found = judge(index)
    except Exception as error:  # whatever the self-test could not foresee: the engine starts all the same
        found = Verdict(problem=f"{type(error).__name__}: {error}")
    return apply(device_type, index, wanted, found)


def judge(index: int | None, anew: bool = False) -> Verdict:
    """The verdict on a GPU, or on the CPU (``None``): the one that is kept, or a new one, which takes seconds.

    Args:
        index: the number of the GPU.
        anew: leave aside the one that is kept.
    """
    key = key_of(index)
    with verdict.alone(key):
        found = None if anew else verdict.kept(key)
        if found is None:
            found = examination.examine(index)
            verdict.keep(key, found)
    return found


def apply(device_type: str, index: int, wanted: str, found: Verdict) -> Ruling:
    """Relieve compiled kernels of all that they did not pass, from single tiles to whole operations."""
    if found.problem and not found.names:
        return _without(device_type, wanted, found.words())
    machine.restrict(index, found.tiles, found.faults)
    lost = found.lost()
    if lost:
        kernels.relieve(device_type, "scaled_mm", lost)
    for operation in machine.QUANTIZATIONS:
        if operation in found.faults:
            kernels.relieve(device_type, operation)
    return Ruling(wanted, found.words() if found.faults else "", lost, found.words())


def _without(device_type: str, wanted: str, reason: str) -> Ruling:
    for operation in _compiled(device_type):
        kernels.relieve(device_type, operation)
    return Ruling(wanted, reason, dict.fromkeys(kernels.GRANULARITIES, reason))


def _compiled(device_type: str) -> list[str]:
    return machine.compiled(device_type, ("scaled_mm", *machine.QUANTIZATIONS, *schema.COMPOSED))


def key_of(index: int | None) -> dict[str, Any]:
    """All that a verdict depends on, JSON values: kernels, device, driver.

    Args:
        index: the number of the GPU; ``None`` is the CPU.
    """
    common = {"sources": verdict.sources(), "torch": torch.__version__}
    if index is None:
        return common | {"device": "cpu", "level": torch.ops.w8a8_bismooth._cpu_level("")}
    device = torch.cuda.get_device_properties(index)
    module = Path("/proc/driver/nvidia/version")
    return common | {
        "device": device.name,
        "capability": [device.major, device.minor],
        "driver": [torch.ops.w8a8_bismooth.driver_version(), module.read_text() if module.exists() else ""],
    }

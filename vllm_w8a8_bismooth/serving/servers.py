"""Which kernels serve which layers on which platform, and why: rules over plain data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_w8a8_bismooth.ops import COMPILED, REFERENCE, TRITON, server


@dataclass(frozen=True)
class Platform:
    """What the rules ask of a platform.

    Attributes:
        device: torch's type, ``cpu``, ``cuda`` or ``xpu``.
        linears, experts: who does our ``scaled_mm`` and ``experts`` there, as :func:`ops.server` says.
        capability: of an NVIDIA GPU, 90 for 9.0; ``None`` for others.
        unsupported: why our products cannot, as :func:`ops.unsupported` says, or ``""``.
    """

    device: str
    linears: str
    experts: str
    capability: int | None = None
    unsupported: str = ""


class Served(NamedTuple):
    """Who serves a kind of layer.

    Attributes:
        kernel: in words.
        reason: why that one.
        meant: whether nothing better is missing.
    """

    kernel: str
    reason: str
    meant: bool


STOCK, STOCK_EXPERTS, REFUSED = "vLLM's own kernel", "vLLM's own method", "none, refused at load"
OLDEST, NEWEST = 80, 100
"""Compute capabilities: the first with our kernels, and the first for which vLLM picks an INT8 kernel that fails."""
_WORDS = {COMPILED: "the {} kernel", TRITON: "the Triton kernel for {}", REFERENCE: "the torch reference, slow"}


def here() -> Platform:
    """The platform that vLLM found in this process, without touching its devices."""
    from vllm.platforms import current_platform

    device = current_platform.device_type
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return Platform(device, server(device), server(device, "experts"), capability and capability.to_int())


def announce(logger: Any, layers: str, device: str) -> None:
    """Say once what ``layers`` run on where their weights are, aloud if that is the reference.

    Args:
        logger: vLLM's.
        layers: in words.
        device: torch's type.
    """
    found = server(device)
    say = logger.warning_once if found == REFERENCE else logger.info_once
    say("w8a8_bismooth: %s run on %s", layers, _WORDS[found].format(device))


def _ours(platform: Platform) -> Served:
    if platform.unsupported:
        return Served(REFUSED, platform.unsupported, False)
    return {
        COMPILED: Served("our kernel", f"compiled for {platform.device}", True),
        TRITON: Served("our Triton kernel", f"none was compiled for {platform.device}", True),
        REFERENCE: Served(
            "the torch reference", f"this package was installed without its kernels for {platform.device}: slow", False
        ),
    }[platform.linears]


def per_channel(platform: Platform) -> Served:
    """Who serves per-channel linears.

    vLLM's own kernel is faster than the reference, and has run, which Triton's has not, so it takes the place of
    compiled kernels that are missing, but not on CUDA of compute capability 10 and above (vLLM issue 54311).
    """
    capability = platform.capability
    if platform.device != "cpu":
        if capability and capability < OLDEST:
            return Served(STOCK, "this package's kernels need compute capability 8.0", False)
        if platform.linears != COMPILED and not (capability and capability >= NEWEST):
            return Served(STOCK, "this package was installed without its kernels for this device", False)
    return _ours(platform)


def per_group(platform: Platform) -> Served:
    """Who serves per-group linears, which vLLM has no kernel for."""
    return _ours(platform)


def experts(platform: Platform) -> Served:
    """Who serves per-channel experts: vLLM's own method on every GPU, because it has run there."""
    if platform.device == "cpu":
        return _ours(platform)
    return Served(STOCK_EXPERTS, "it has a kernel for every GPU", True)


def experts_per_group(platform: Platform) -> Served:
    """Who serves per-group experts, which vLLM has no kernel for.

    The reference would ask the GPU how many tokens each expert has, which no CUDA graph can hold.
    """
    if platform.device == "cpu" or platform.unsupported:
        return _ours(platform)
    if platform.experts == TRITON:
        return Served("our Triton kernel", "no other has groups", True)
    return Served(REFUSED, f"Triton, which would serve them, is not installed for {platform.device}", False)


KINDS: Mapping[str, Callable[[Platform], Served]] = {
    "per-channel": per_channel,
    "per-group": per_group,
    "experts": experts,
    "per-group experts": experts_per_group,
}
"""Kind of layer -> its rule."""

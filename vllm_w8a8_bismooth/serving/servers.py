"""Which kernels serve which layers on which platform, and why: rules over plain data."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_w8a8_bismooth import NAME, switch
from vllm_w8a8_bismooth.ops import COMPILED, REFERENCE, TRITON, gate, processor, server, unsupported
from vllm_w8a8_bismooth.ops.gate import Ruling
from vllm_w8a8_bismooth.ops.kernels import CHANNEL, GROUP_128
from vllm_w8a8_bismooth.serving import plan


@dataclass(frozen=True)
class Platform:
    """What the rules ask of a platform.

    Attributes:
        device: torch's type, ``cpu``, ``cuda`` or ``xpu``.
        per_channel, per_group: who does our linears there, as :func:`ours` says.
        experts: who does our ``experts``, as :func:`ops.server` says.
        capability: of an NVIDIA GPU, 90 for 9.0; ``None`` for others.
        unsupported: why our products cannot, as :func:`ops.unsupported` says of an ordinary weight, or ``""``.
        ruling: why compiled kernels do what they do.
        planned: whether a plan says who serves linears that several could.
        asked: whether somebody asked for one, so that kernels without a self-test may be timed, too.
        saturates: whether vLLM's own INT8 products are wrong there, see :func:`processor.saturates`.
    """

    device: str
    per_channel: str
    per_group: str
    experts: str
    capability: int | None = None
    unsupported: str = ""
    ruling: Ruling = Ruling(switch.AUTO)
    planned: bool = False
    asked: bool = False
    saturates: bool = False

    @property
    def off(self) -> bool:
        """Whether compiled kernels are not wanted."""
        return self.ruling.switch == switch.OFF

    @property
    def has_sources(self) -> bool:
        """Whether this package's kernels can be compiled for it at all: for CPUs and NVIDIA's GPUs."""
        return self.device == "cpu" or self.capability is not None

    @property
    def absence(self) -> str:
        """Why no compiled kernel is there, if none is."""
        if self.has_sources:
            return f"this package was installed without its kernels for {self.device}"
        return "this package's kernels are for CPUs and NVIDIA's GPUs"

    def lack(self, granularity: str) -> str:
        """Why compiled kernels that are there do not serve, or ``""``."""
        return self.ruling.lost.get(granularity) or self.ruling.reason


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
OR = " or "
SATURATION = "without VNNI, oneDNN sums products in 16 bits that saturate (docs/upstream/saturation.md)"
_KERNELS = {plan.STOCK: STOCK, COMPILED: "our kernel", TRITON: "our Triton kernel", REFERENCE: "the torch reference"}
OLDEST, NEWEST = 80, 100
"""Compute capabilities: the first with our kernels, and the first for which vLLM picks an INT8 kernel that fails."""
_UNPLANNED = {"cpu": (switch.OFF, switch.AUTO)}
"""Type of a device -> what :func:`switch.plan` says where no plan counts; on others it is :data:`switch.OFF` alone."""
_WORDS = {COMPILED: "the {} kernel", TRITON: "the Triton kernel for {}", REFERENCE: "the torch reference, slow"}


def ours(device: str, group_size: int | None) -> str:
    """Who does our linears on a kind of device: :data:`ops.COMPILED`, or the slowest of those who do a part of it."""
    parts = server(device, "quantize_activations"), server(device, "scaled_mm", group_size)
    return max(parts, key=(COMPILED, TRITON, REFERENCE).index)


def here() -> Platform:
    """The platform that vLLM found in this process; on a GPU, after the self-test of its kernels.

    Raises:
        ValueError: the environment asks for what is unknown, see :func:`switch.wanted`.
    """
    from vllm.platforms import current_platform

    device = current_platform.device_type
    ruling = gate.settle(device)
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return Platform(
        device,
        ours(device, None),
        ours(device, 128),
        server(device, "experts"),
        capability and capability.to_int(),
        unsupported(4096, 4096, group_size=128, device=torch.device(device)),
        ruling,
        planned=ruling.switch == switch.AUTO and switch.plan() not in _UNPLANNED.get(device, (switch.OFF,)),
        asked=switch.plan() not in (switch.AUTO, switch.OFF),
        saturates=device == "cpu" and processor.saturates(),
    )


def settle(logger: Any) -> Platform:
    """:func:`here` for a model that is being built: said in the log, and part of vLLM's key for its compiled graphs,
    which do not look alike whoever serves.

    Args:
        logger: vLLM's.
    """
    from vllm.config import get_current_vllm_config

    platform = here()
    report(logger, platform)
    with suppress(AssertionError):  # vLLM's, where nothing builds a model
        more = get_current_vllm_config().additional_config
        if isinstance(more, dict):
            operations = ("quantize_activations", "silu_mul_quantize", "scaled_mm", "linear", "linear_rows", "experts")
            who = [server(platform.device, name, size) for name in operations for size in (None, 128, 32)]
            more[NAME] = [*(rule(platform).kernel for rule in KINDS.values()), *who]
    return platform


def announce(logger: Any, layers: str, device: str, group_size: int | None) -> None:
    """Say once what ``layers`` run on where their weights are, aloud if that is the reference.

    Args:
        logger: vLLM's.
        layers: in words.
        device: torch's type.
        group_size: columns that share a weight scale; ``None`` is per-channel.
    """
    found = ours(device, group_size)
    say = logger.warning_once if found == REFERENCE else logger.info_once
    say("w8a8_bismooth: %s run on %s", layers, _WORDS[found].format(device))


def report(logger: Any, platform: Platform) -> None:
    """Say once who serves what here, and why; on a CPU only if somebody chose otherwise, as there is no more to say.

    Also that a plan that somebody asked for counts for nothing.
    """
    why = "" if platform.planned else f"{switch.VARIABLE}={platform.ruling.switch} says who serves"
    if platform.planned and platform.saturates:
        why = f"vLLM's own products are wrong here: {SATURATION}"
    if platform.asked and why:
        words = "w8a8_bismooth: %s=%s counts for nothing, because %s"
        logger.warning_once(words, switch.PLAN, str(switch.plan()), why)
    if platform.device == "cpu" and platform.ruling.switch == switch.AUTO:
        return
    found = {kind: rule(platform) for kind, rule in KINDS.items()}
    say = logger.info_once if all(served.meant for served in found.values()) else logger.warning_once
    words = "; ".join(f"{kind} on {served.kernel} ({served.reason})" for kind, served in found.items())
    say("w8a8_bismooth, %s=%s: %s", switch.VARIABLE, platform.ruling.switch, words)


def _ours(platform: Platform, kernel: str, granularity: str) -> Served:
    if platform.unsupported:
        return Served(REFUSED, platform.unsupported, False)
    lack, proof = platform.lack(granularity), platform.ruling.proof
    no_triton = "" if platform.device == "cpu" else ", and Triton is not installed"
    return {
        COMPILED: Served(_KERNELS[kernel], f"compiled for {platform.device}{proof and ', '}{proof}", True),
        TRITON: Served(_KERNELS[kernel], lack or f"none was compiled for {platform.device}", not lack or platform.off),
        REFERENCE: Served(_KERNELS[kernel], f"{lack or platform.absence}{no_triton}: slow", False),
    }[kernel]


def linears(platform: Platform, grouped: bool) -> tuple[str, ...]:
    """Who could serve linears, as :data:`plan.KERNELS` names them, first who does without a plan.

    Triton's, which no self-test has tried, is one of them only where nobody else can, or somebody asked for a plan: a
    kernel that hangs while it is timed takes the engine with it.
    """
    mine = platform.per_group if grouped else platform.per_channel
    capability = platform.capability or 0
    if grouped or capability >= NEWEST:
        both = platform.asked and mine == COMPILED and platform.experts == TRITON and platform.device != "cpu"
        return (COMPILED, TRITON) if both else (mine,)
    if platform.device == "cpu":
        if platform.saturates and not platform.off:
            return (mine,)
        return (plan.STOCK, mine) if platform.off else (mine, plan.STOCK)
    if mine != COMPILED or capability < OLDEST:
        return (plan.STOCK,)
    return (mine, plan.STOCK) if platform.ruling.switch == switch.ON else (plan.STOCK, mine)


def _planned(platform: Platform, grouped: bool) -> Served | None:
    """What is said where a plan says who serves."""
    could = linears(platform, grouped)
    if not platform.planned or len(could) == 1 or (grouped and platform.unsupported):
        return None
    proof = platform.ruling.proof
    return Served(OR.join(_KERNELS[each] for each in could), f"by plan{proof and ', '}{proof}", True)


def per_channel(platform: Platform) -> Served:
    """Who serves per-channel linears.

    vLLM's own kernel is faster than the reference, and has run, which Triton's has not, so it takes the place of
    compiled kernels that are missing or not to be relied on, but not on CUDA of compute capability 10 and above (vLLM
    issue 54311). It also does where nobody has measured that compiled ones are faster.
    """
    if planned := _planned(platform, False):
        return planned
    capability = platform.capability
    if platform.device != "cpu" or platform.off:
        if capability and capability < OLDEST:
            return Served(STOCK, "this package's kernels need compute capability 8.0", False)
        if (platform.off or platform.per_channel != COMPILED) and not (capability and capability >= NEWEST):
            reason = platform.lack(CHANNEL) or platform.absence
            if platform.saturates:
                return Served(STOCK, f"{reason}; its products are wrong here: {SATURATION}", False)
            return Served(STOCK, reason, platform.off or not platform.has_sources)
        if linears(platform, False)[0] == plan.STOCK:
            return Served(STOCK, f"{switch.PLAN}={switch.OFF}: nobody measures whether ours is faster", True)
    return _ours(platform, platform.per_channel, CHANNEL)


def per_group(platform: Platform) -> Served:
    """Who serves per-group linears, which vLLM has no kernel for."""
    return _planned(platform, True) or _ours(platform, platform.per_group, GROUP_128)


def experts(platform: Platform) -> Served:
    """Who serves per-channel experts: vLLM's own method on every GPU, because it has run there."""
    if platform.device == "cpu" and not platform.off:
        return _ours(platform, platform.per_channel, CHANNEL)
    return Served(STOCK_EXPERTS, platform.ruling.reason if platform.off else "it has a kernel for every GPU", True)


def experts_per_group(platform: Platform) -> Served:
    """Who serves per-group experts, which vLLM has no kernel for.

    The reference would ask the GPU how many tokens each expert has, which no CUDA graph can hold.
    """
    if platform.device == "cpu" or platform.unsupported:
        return _ours(platform, platform.per_group, GROUP_128)
    if platform.experts == TRITON:
        return Served("our Triton kernel", "no other has groups", True)
    return Served(REFUSED, f"Triton, which would serve them, is not installed for {platform.device}", False)


def rows_of_four_bits(platform: Platform) -> Served:
    """Who serves linears with rows of four bits: never others, though all but our CPU kernels do so as INT8."""
    return _ours(platform, platform.per_channel, CHANNEL)


KINDS: Mapping[str, Callable[[Platform], Served]] = {
    "per-channel": per_channel,
    "per-group": per_group,
    "experts": experts,
    "per-group experts": experts_per_group,
    "rows of four bits": rows_of_four_bits,
}
"""Kind of layer -> its rule."""

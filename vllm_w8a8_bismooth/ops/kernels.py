"""Who does each operation on each kind of device: compiled kernels, else Triton's, else the reference.

The compiled kernels of ``csrc/``, where they were built, register themselves for their own device (``CPU``, ``CUDA``).
Where torch is a build for a GPU, Triton's are registered for what is then missing there. torch's dispatcher prefers
either to the reference, and nothing above this module changes. What the compiled ones should not do, see :mod:`gate`,
they can be relieved of.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_w8a8_bismooth.ops import schema

COMPILED, TRITON, REFERENCE = "compiled", "triton", "reference"
GRANULARITIES = CHANNEL, GROUP_128, GROUP_ANY = "per-channel", "groups of 128", "other groups"
"""What compiled products are specialised for, in the order of ``csrc/cuda/layout.h``."""
LIBRARY_FILE = Path(__file__).parents[1] / "_C.so"
"""The compiled kernels, if there are any."""
_BUILDS: Mapping[str, str | None] = {"cuda": torch.version.cuda or torch.version.hip, "xpu": torch.version.xpu}
"""Type of a device that Triton compiles for -> the version of its platform, if torch is a build for it."""
_logger = logging.getLogger("vllm.w8a8_bismooth")


def _load_library() -> None:
    if not LIBRARY_FILE.exists():
        return
    try:
        torch.ops.load_library(LIBRARY_FILE)
    except OSError as error:
        _logger.warning("the compiled kernels do not load, so they are not used: %s", error)


def granularity(group_size: int | None) -> str:
    """The one of :data:`GRANULARITIES` that serves groups of so many columns; ``None`` is the whole row."""
    return {None: CHANNEL, 128: GROUP_128}.get(group_size, GROUP_ANY)


def _registered(device: str, operation: str) -> bool:
    if device == "cuda" and torch.version.hip:  # what was compiled for CUDA does not run on ROCm's devices
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"w8a8_bismooth::{operation}", device.upper())


def _triton(device: str, operations: Iterable[str]) -> Mapping[str, Callable]:
    """Triton's kernels for a kind of device, by operation; nothing where there are none, aloud if there should be."""
    if not _BUILDS.get(device):
        return {}
    try:
        from vllm_w8a8_bismooth.ops import triton
    except Exception as error:  # triton is absent, or broken, in which case it can raise anything
        _logger.warning(
            "triton cannot be imported (%s), so %s on %s run on the torch reference, which is slow: install the triton "
            "that this torch requires, or this package with its compiled kernels",
            error,
            ", ".join(operations),
            device,
        )
        return {}
    return triton.OPERATIONS


def _servers() -> dict[tuple[str, str, str], str]:
    """Register all that there is: (type of a device, operation, granularity) -> who; the reference does the others."""
    _load_library()
    found: dict[tuple[str, str, str], str] = {}
    for device in ("cpu", *_BUILDS):
        compiled = [each for each in (*schema.OPERATIONS, *schema.COMPOSED) if _registered(device, each)]
        missing = [operation for operation in schema.OPERATIONS if operation not in compiled]
        triton = _triton(device, missing) if missing else {}
        for operation in missing if triton else ():
            schema.LIBRARY.impl(operation, triton[operation], device.upper())
        who = dict.fromkeys(compiled, COMPILED) | (dict.fromkeys(missing, TRITON) if triton else {})
        found |= {(device, operation, each): name for operation, name in who.items() for each in GRANULARITIES}
    return found


_SERVERS = _servers()
_COMPILED: dict[tuple[str, str], Any] = {}
"""Type of a device, operation -> the compiled kernel that was relieved of something."""
_LEFT_OUT: set[tuple[str, int, int, int]] = set()
"""Type of a device, N, K, groups of the weights whose products the compiled kernels leave to others."""


def server(device_type: str, operation: str = "scaled_mm", group_size: int | None = None) -> str:
    """Who does an operation on this kind of device (``cpu``, ``cuda``, ``xpu``).

    Args:
        device_type: torch's type; that of ROCm's devices is ``cuda``.
        operation: a key of :data:`schema.OPERATIONS`, or of :data:`schema.COMPOSED`, which only compiled kernels do.
        group_size: of the weights of a product; ``None`` is per-channel.

    Returns:
        :data:`COMPILED`, :data:`TRITON` or :data:`REFERENCE`.
    """
    return _SERVERS.get((device_type, operation, granularity(group_size)), REFERENCE)


def relieve(device_type: str, operation: str, granularities: Iterable[str] = GRANULARITIES) -> None:
    """Have Triton's kernels, or else the reference, do what the compiled kernels of a kind of device do until now.

    In this process, for good. Where compiled kernels do not do it, nothing changes.

    Args:
        device_type, operation: see :func:`server`.
        granularities: of :data:`GRANULARITIES`, those of the product that go. Of other operations all go.
    """
    going = [(device_type, operation, each) for each in granularities]
    if COMPILED not in (_SERVERS.get(each) for each in going):
        return
    who, portable = _portable(device_type, operation)
    _SERVERS.update(dict.fromkeys(going, who))
    _route(device_type, operation, portable)


def choose(device_type: str, rows: int, columns: int, groups: int, who: str) -> None:
    """Have products with one shape of weight done by compiled kernels, or by those who would do them otherwise.

    In this process, until it is chosen anew.

    Args:
        device_type: see :func:`server`.
        rows, columns, groups: N and K of the weight, and its scales a row.
        who: :data:`COMPILED`, or who else does it on this kind of device.

    Raises:
        ValueError: they do not do it here.
    """
    now = server(device_type, "scaled_mm", None if groups == 1 else columns // groups)
    shape = device_type, rows, columns, groups
    if who == now:
        _LEFT_OUT.discard(shape)
        return
    other, portable = _portable(device_type, "scaled_mm")
    if now != COMPILED or who != other:
        raise ValueError(f"the {who} kernel cannot serve linears on {device_type}, where the {now} one does")
    _LEFT_OUT.add(shape)
    if (device_type, "scaled_mm") not in _COMPILED:
        _route(device_type, "scaled_mm", portable)


def _portable(device_type: str, operation: str) -> tuple[str, Callable]:
    """Who does it where the compiled kernels do not, and how."""
    if operation in schema.COMPOSED:
        return REFERENCE, schema.COMPOSED[operation]
    triton = _triton(device_type, [operation])
    return (TRITON, triton[operation]) if triton else (REFERENCE, schema.OPERATIONS[operation])


def _route(device_type: str, operation: str, portable: Callable) -> None:
    """Put in the compiled kernel's place what asks who is to do it: that, or who does it otherwise."""
    name, key = f"w8a8_bismooth::{operation}", device_type.upper()
    if (device_type, operation) not in _COMPILED:
        _COMPILED[device_type, operation] = torch.library.get_kernel(name, key)
    compiled: Any = _COMPILED[device_type, operation]

    def route(keys: torch.DispatchKeySet, a: torch.Tensor, b: torch.Tensor, *more: Any) -> torch.Tensor:
        columns, (rows, groups) = a.shape[1], more[1].shape
        who = server(device_type, operation, None if groups == 1 else columns // groups)
        if who != COMPILED or (device_type, rows, columns, groups) in _LEFT_OUT:
            return portable(a, b, *more)
        return compiled.call_boxed(keys, a, b, *more)

    some_left = any(_SERVERS[device_type, operation, each] == COMPILED for each in GRANULARITIES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, that this overrides a kernel
        made = route if some_left else portable
        schema.LIBRARY.impl(operation, made, key, with_keyset=some_left, allow_override=True)

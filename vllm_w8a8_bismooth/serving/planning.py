"""Finds who serves a linear: by the plan that is given, the one that is kept, or by trying it now."""

import functools
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_w8a8_bismooth import switch
from vllm_w8a8_bismooth.ops import gate
from vllm_w8a8_bismooth.ops.shelf import Shelf
from vllm_w8a8_bismooth.serving import plan, trial
from vllm_w8a8_bismooth.serving.plan import Entry, Plan, Shape

logger = init_logger("vllm.w8a8_bismooth")

SHELF = Shelf("plans", "plan", "who serves what is measured anew")
_PACKAGES = "vllm", "triton"
_FOUND: dict[tuple[Shape, tuple[str, ...], torch.device, torch.dtype], str] = {}


def given() -> Plan | None:
    """The plan that somebody gives, if there is one.

    Raises:
        ValueError: it is none.
    """
    wanted = switch.plan()
    return plan.load(wanted) if isinstance(wanted, Path) else None


def key_on(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """All that measured times depend on but the shape, as JSON values: what the gate's verdict does, and more."""
    found = gate.key_of(device.index if device.type == "cuda" else None)
    found |= {"dtype": str(dtype).removeprefix("torch."), "code": _code()}
    if device.type == "cpu":
        found["threads"] = torch.get_num_threads()
    return found | {name: _version(name) for name in _PACKAGES}


def here(device_type: str) -> torch.device:
    """The current device of a kind."""
    return torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")


def kernel_of(
    shape: Shape,
    could: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    makes: Mapping[str, trial.Make],
) -> str:
    """Who serves a linear in this process, said once in the log.

    Args:
        shape: of the linear.
        could: who could, the first of whom does unless a plan says otherwise.
        device: where it is.
        dtype: of its input and output.
        makes: kernel -> makes the scheme that has it serve.

    Raises:
        ValueError: the plan that is given is none, or of another device, or names who cannot.
    """
    known = shape, could, device, dtype
    if known not in _FOUND:
        entry = _given(shape, could, device, dtype)
        if entry is None and (device.type != "cpu" or switch.plan() == switch.ON):
            entry = _measured(shape, could, device, dtype, makes)
        _FOUND[known] = could[0] if entry is None else _chosen(shape, could, entry)
    return _FOUND[known]


def _chosen(shape: Shape, could: tuple[str, ...], entry: Entry) -> str:
    among = Entry({each: entry.seconds.get(each, {}) for each in could}, entry.given)
    kernel = among.kernel or could[0]
    logger.info_once("w8a8_bismooth: linears of %s on %s (%s)", str(shape), kernel, among.words())
    return kernel


def _given(shape: Shape, could: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> Entry | None:
    found = given()
    if found is None:
        return None
    here = key_on(device, dtype)
    if found.holds_for is not None and found.holds_for != here:
        differs = [name for name in {**found.holds_for, **here} if found.holds_for.get(name) != here.get(name)]
        raise ValueError(
            f"{switch.PLAN}={switch.plan()} was made with another {', '.join(sorted(differs))}; measure anew, or take "
            "holds_for out of the file"
        )
    entry = found.entries.get(shape)
    if entry is not None and entry.given not in (None, *could):
        raise ValueError(
            f"{switch.PLAN}={switch.plan()} has linears of {shape} run on {entry.given}, which cannot serve them here; "
            f"expected {' or '.join(could)}"
        )
    return entry


def _measured(
    shape: Shape, could: tuple[str, ...], device: torch.device, dtype: torch.dtype, makes: Mapping[str, trial.Make]
) -> Entry | None:
    """What is kept, or else is tried now, while other processes on such a device wait for it."""
    key = key_on(device, dtype)
    with SHELF.alone(key):
        kept = SHELF.read(key, Plan.from_json) or Plan()
        entry = kept.entries.get(shape)
        if entry is not None and {*could} <= {*entry.seconds}:
            return entry
        logger.info_once("w8a8_bismooth: measuring who serves linears of %s", str(shape))
        try:
            seconds = trial.measure({kernel: makes[kernel] for kernel in could}, shape, dtype, device)
        except torch.OutOfMemoryError as error:
            logger.warning_once("w8a8_bismooth: linears of %s were not measured: %s", str(shape), _line(error))
            seconds = dict.fromkeys(could, {})  # kept, so that all ranks do the same
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        entry = Entry(seconds)
        if SHELF.write(key, Plan({**kept.entries, shape: entry}, key).to_json()):
            return entry
    # Other ranks could not read it, and measure otherwise.
    logger.warning_once("w8a8_bismooth: %s cannot be written, so no measurement counts", str(SHELF.folder()))
    return None


def kept(device: torch.device) -> dict[str, Plan]:
    """The plans that are kept of a device, by dtype."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    found = {str(dtype): SHELF.read(key_on(device, dtype), Plan.from_json) for dtype in dtypes}
    return {dtype: plan for dtype, plan in found.items() if plan is not None}


@functools.cache
def _code() -> str:
    """A hash of all that runs while it is measured, but the library."""
    digest = sha256()
    for folder in (Path(plan.__file__).parent, Path(gate.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]

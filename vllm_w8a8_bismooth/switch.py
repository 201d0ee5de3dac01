"""The two variables that say who may serve, read when a process first needs to know."""

import os
from pathlib import Path

VARIABLE, PLAN = "BISMOOTH_KERNELS", "BISMOOTH_PLAN"
AUTO, ON, OFF = "auto", "on", "off"


def wanted() -> str:
    """What :data:`VARIABLE` asks for; :data:`AUTO` if nothing.

    :data:`AUTO`: on a GPU, compiled kernels serve what they passed a self-test of; on a CPU, they serve. :data:`ON`:
    they serve without. :data:`OFF`: they serve nothing.

    Raises:
        ValueError: it is none of the three.
    """
    value = os.environ.get(VARIABLE) or AUTO
    if value not in (AUTO, ON, OFF):
        raise ValueError(f"{VARIABLE}={value!r} is unknown; expected {AUTO}, {ON} or {OFF}")
    return value


def plan() -> str | Path:
    """What :data:`PLAN` asks for; :data:`AUTO` if nothing. It counts where :func:`wanted` is :data:`AUTO`.

    :data:`AUTO`: on a GPU, who serves a linear that several could is measured. :data:`ON`: on a CPU, too, and on a GPU
    with Triton's kernels, which no self-test has tried. :data:`OFF`: nowhere. A path: a file says it, and what it does
    not name is as with :data:`ON` on a GPU, and not measured on a CPU.
    """
    value = os.environ.get(PLAN) or AUTO
    return value if value in (AUTO, ON, OFF) else Path(value)
